"""Entities of tags and their scores, against cases worked out by hand."""

from __future__ import annotations

import pytest

from evertune.metrics import Entity, EntityScores, check_tags, entities_in, entity_scores, sentence_f1
from evertune.metrics.entities import tags_of


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("", []),
        ("O O", []),
        ("B-A I-A O B-A", [(0, 2, "A"), (3, 4, "A")]),
        ("B-A B-A", [(0, 1, "A"), (1, 2, "A")]),
        ("B-A I-B I-B", [(0, 1, "A"), (1, 3, "B")]),  # as conlleval: a tag that continues nothing begins an entity
        ("O I-A I-A B-A", [(1, 3, "A"), (3, 4, "A")]),
        ("S-A B-B I-B E-B S-B", [(0, 1, "A"), (1, 4, "B"), (4, 5, "B")]),
        ("E-A E-A I-A", [(0, 1, "A"), (1, 2, "A"), (2, 3, "A")]),
        ("B-A-1 I-A-1 I-A", [(0, 2, "A-1"), (2, 3, "A")]),
    ],
)
def test_entities_of_tags(tags: str, found: list[tuple[int, int, str]]) -> None:
    assert entities_in(tags.split()) == [Entity(*one) for one in found]


def test_tags_of_entities_and_back() -> None:
    tags = ["B-A", "B-A", "I-A", "O", "B-B"]
    check_tags(tags)
    assert tags_of(entities_in(tags), 5) == tags


@pytest.mark.parametrize(
    ("scheme", "tags", "reason"),
    [
        ("IOB2", "O I-A", "word 2 has the tag 'I-A', which continues no A: it follows 'O'"),
        ("IOB2", "B-A I-B", "word 2 has the tag 'I-B', which continues no B: it follows 'B-A'"),
        ("IOB2", "S-A", "word 1 has the tag 'S-A', which is not of IOB2: O, B-TYPE, I-TYPE"),
        ("IOB2", "B-", "word 1 has the tag 'B-', which is not of IOB2"),
        ("IOB2", "PER", "word 1 has the tag 'PER', which is not of IOB2"),
        ("BIOES", "B-A O", "word 1 has the tag 'B-A', but 'O' follows: no E-A ends it"),
        ("BIOES", "B-A B-A E-A", "word 1 has the tag 'B-A', but 'B-A' follows"),
        ("BIOES", "B-A I-A", "word 2 has the tag 'I-A', but the sentence ends: no E-A ends it"),
        ("BIOES", "S-A E-A", "word 2 has the tag 'E-A', which continues no A: it follows 'S-A'"),
    ],
)
def test_tags_that_are_not_well_formed(scheme: str, tags: str, reason: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_tags(tags.split(), scheme)  # type: ignore[arg-type]
    assert reason in str(refusal.value)


def test_well_formed_tags() -> None:
    check_tags([])
    check_tags(["B-A", "I-A", "B-A", "O", "B-B"])
    check_tags(["S-A", "B-A", "E-A", "B-B", "I-B", "E-B", "O"], "BIOES")


def test_scores_by_hand() -> None:
    """The example of seqeval's documentation: one of two entities is right, the other is a word too short."""
    gold = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = entity_scores([entities_in(tags) for tags in gold], [entities_in(tags) for tags in said])
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)
    assert found.types == {"MISC": EntityScores(0, 1, 1), "PER": EntityScores(1, 1, 1)}
    a, b, c = Entity(0, 1, "A"), Entity(2, 4, "A"), Entity(0, 1, "B")  # right words, wrong type: wrong
    found = entity_scores([[a, b], []], [[b, c], [a]])
    assert (found.n_right, found.n_predicted, found.n_gold) == (1, 3, 2)
    assert (found.precision, found.recall, found.f1) == (1 / 3, 1 / 2, 0.4)


def test_scores_without_entities() -> None:
    empty = entity_scores([[]], [[]])
    assert (empty.precision, empty.recall, empty.f1, empty.types) == (0, 0, 0, {})
    assert [sentence_f1([], []), sentence_f1([Entity(0, 1, "A")], [])] == [1, 0]
    with pytest.raises(ValueError, match="got 1 sentences, 0 predictions"):
        entity_scores([[]], [])
