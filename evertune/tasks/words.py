"""Words of texts, their tags, and the pieces of words that a tokenizer makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from evertune.metrics.entities import OUTSIDE, Entity, entities_in, tags_of

Span = tuple[int, int]
"""Where a word or a piece of one begins in its text, and where it ends (excluded), in characters."""

NO_TAG = ""
"""The tag of a token that carries none: a special token, or one inside a word."""

# A character of these scripts is a word: Thai, Lao, Khmer, Burmese, Chinese and Japanese are written without spaces.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"  # accents and vowel signs, which end no word
_WORD = re.compile(rf"[{_ALONE}]|(?:[^\W{_ALONE}]|[{_MARKS}])+|[^\w\s]")


def words_in(text: str) -> list[Span]:
    """The words of a running text; each punctuation mark is a word.

    Example:
        >>> text = "Paris, 1990-95"
        >>> [text[start:end] for start, end in words_in(text)]
        ['Paris', ',', '1990', '-', '95']
    """
    return [match.span() for match in _WORD.finditer(text)]


def words_between_spaces(text: str) -> list[Span]:
    """The words of a text that was joined of words."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def tagged_words(text: str, label: Any) -> tuple[list[Span], list[str]]:
    """The words of a record, and the tag of each in IOB2.

    Args:
        text: Text of the record.
        label: Its tags, one for each word between spaces, or its entities, by characters.

    Example:
        >>> tagged_words("In Paris.", [{"start": 3, "end": 8, "label": "LOC"}])
        ([(0, 2), (3, 8), (8, 9)], ['O', 'B-LOC', 'O'])
    """
    if label and isinstance(label[0], str):
        words = words_between_spaces(text)
        return words, tags_of(entities_in(label), len(words))
    words = words_in(text)
    return words, tags_of(entities_at(words, label or []), len(words))


def entities_at(words: Sequence[Span], spans: Sequence[Mapping[str, Any]]) -> list[Entity]:
    """Entities by the numbers of their words, from those by characters; without those that are in no word."""
    found = []
    for span in spans:
        inside = [number for number, (start, end) in enumerate(words) if start < span["end"] and end > span["start"]]
        if inside:
            found.append(Entity(inside[0], inside[-1] + 1, span["label"]))
    return found


def first_pieces(text: str, words: Sequence[Span], pieces: Sequence[Span]) -> list[int | None]:
    """The number of the first piece of each word; None for a word without a piece of its own.

    A word has none if the text was truncated before it, or if a piece holds several words, of which the first has it.

    Args:
        text: The text.
        words: Its words, in order.
        pieces: Where each token is in the text, in order; special tokens are empty.

    Example:
        >>> first_pieces("unseen words", [(0, 6), (7, 12)], [(0, 0), (0, 2), (2, 6), (7, 12), (0, 0)])
        [1, 3]
    """
    first: list[int | None] = [None] * len(words)
    word = 0
    for number, (start, end) in enumerate(pieces):
        piece = text[start:end]
        begin = end - len(piece.lstrip())  # tokenizers with a mark for spaces count the space
        while word < len(words) and words[word][1] <= begin:
            word += 1
        if word < len(words) and first[word] is None and begin < end and words[word][0] < end:
            first[word] = number
    return first


def tags_of_pieces(tags: Sequence[str], first: Sequence[int | None], n_pieces: int) -> list[str]:
    """The tags of pieces: the first piece of a word carries its tag, the others carry none.

    If the first word of an entity has no piece, the next one that has begins the entity.
    """
    found = [NO_TAG] * n_pieces
    begun = ""
    for tag, piece in zip(tags, first, strict=True):
        if not tag.startswith("I-"):
            begun = ""
        if piece is None:
            begun = tag if tag.startswith("B-") else begun
        else:
            found[piece], begun = begun or tag, ""
    return found


def tags_of_words(words: Sequence[Span], first: Sequence[int | None], tags: Mapping[int, str], read: int) -> list[str]:
    """The tags of words from those of pieces.

    Args:
        words: The words of a text.
        first: The first piece of each.
        tags: The tag of each of these pieces.
        read: Character up to which the text was read; what comes after it is outside.
    """
    found: list[str] = []
    for (start, _), piece in zip(words, first, strict=True):
        if piece is not None:
            found.append(tags[piece])
        elif start < read and found and found[-1] != OUTSIDE:  # within a piece that holds several words
            found.append(f"I-{found[-1][2:]}")
        else:
            found.append(OUTSIDE)
    return found
