"""Words of texts in many scripts, and their pieces under tokenizers that see them otherwise."""

from __future__ import annotations

import pytest

from evertune.tasks.words import first_pieces, tags_of_pieces, tags_of_words, words_in


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("In Paris, 1990-95", ["In", "Paris", ",", "1990", "-", "95"]),
        ("naïve cafe\u0301", ["naïve", "cafe\u0301"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("東京に", ["東", "京", "に"]),
        ("서울에서 왔다", ["서울에서", "왔다"]),
        ("  \n ", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in words_in(text)] == words


def test_a_piece_that_holds_several_words_has_the_tag_of_the_first() -> None:
    text, words = "a...b", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    first = first_pieces(text, words, [(0, 0), (0, 1), (1, 4), (4, 5)])
    assert first == [1, 2, None, None, 3]
    assert tags_of_pieces(["O", "B-X", "I-X", "I-X", "O"], first, 4) == ["", "O", "B-X", "O"]
    assert tags_of_words(words, first, {1: "O", 2: "B-X", 3: "O"}, read=5) == ["O", "B-X", "I-X", "I-X", "O"]


def test_an_entity_whose_first_word_has_no_piece_begins_with_the_next() -> None:
    assert tags_of_pieces(["O", "B-X", "I-X"], [0, None, 1], 2) == ["O", "B-X"]
    assert tags_of_pieces(["B-X", "B-Y", "I-Y"], [None, 0, 1], 2) == ["B-Y", "I-Y"]


def test_spaces_before_a_piece_belong_to_no_word() -> None:
    """As the tokenizers of SentencePiece and of GPT-2 count them."""
    assert first_pieces("on Mars", [(0, 2), (3, 7)], [(0, 2), (2, 5), (5, 7)]) == [0, 1]


def test_what_was_cut_off_is_outside() -> None:
    words = [(0, 2), (3, 7), (8, 9)]
    first = first_pieces("on Mars x", words, [(0, 2), (3, 5)])
    assert first == [0, 1, None]
    assert tags_of_words(words, first, {0: "O", 1: "B-X"}, read=5) == ["O", "B-X", "O"]
