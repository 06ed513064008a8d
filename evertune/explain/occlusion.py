"""Occlusion: how much the probability of an answer falls when a part of the text is hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evertune.drift.scripts import places_of

MOST_PARTS = 200
"""Number of parts of a text that are hidden in turn; those of a longer text are of several words each."""


@dataclass(frozen=True)
class Part:
    """A part of a text.

    Args:
        start: First character.
        end: Character after the last.
        text: The part.
        effect: Probability of the answer minus that without the part: positive if the part speaks for the answer.
    """

    start: int
    end: int
    text: str
    effect: float


def occlusion(module: Any, text: str, label: str, batch_size: int = 32) -> list[Part]:
    """The effect of each word on the probability of a class, with one forward pass for each (Li et al. 2016).

    A word is replaced by the mask token of the tokenizer, or left out if it has none. In scripts without spaces between
    words, each character is a part.

    Args:
        module: Module with a ``tokenizer`` whose ``predict`` returns the probability of each class by name.
        text: The text.
        label: The class.
        batch_size: Texts per forward pass. Default: 32.

    Example::

        for part in occlusion(module, "Shares fell after the merger", "business"):
            print(part.text, part.effect)
    """
    spans = parts_of(text)
    mask = module.tokenizer.mask_token or ""
    hidden = [f"{text[:start]}{mask}{text[end:]}" for start, end in spans]
    blank = [not one.strip() for one in hidden]  # the only word of a text cannot be left out
    answers = iter(module.predict([text, *(one for one in hidden if one.strip())], batch_size=batch_size))
    whole = next(answers)[label]
    return [
        Part(start, end, text[start:end], 0.0 if is_blank else whole - next(answers)[label])
        for (start, end), is_blank in zip(spans, blank, strict=True)
    ]


def parts_of(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end; of a long one, groups of words.

    Example:
        >>> parts_of("a good day"), len(parts_of("word " * 1_000))
        ([(0, 1), (2, 6), (7, 10)], 200)
    """
    words = places_of(text)
    size = max(1, -(-len(words) // MOST_PARTS))
    return [(words[i][0], words[i : i + size][-1][1]) for i in range(0, len(words), size)]
