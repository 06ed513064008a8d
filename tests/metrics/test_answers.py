"""The scores of answers and relations against cases worked out by hand from the published rules."""

from __future__ import annotations

import math

import pytest

from evertune.metrics import answer_f1, exact_match, normalise_answer, relation_counts, relation_f1


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Cat", "cat"),
        ("an  apple, a pear", "apple pear"),
        ("theatre", "theatre"),  # an article inside a word stays
        ("U.S.", "us"),  # punctuation is removed before words are told apart
        ("twenty-one", "twentyone"),
        ("the", ""),
        ("?!", ""),
        ("Ünal\u00a0\tKaya\n", "ünal kaya"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation counts, as in the published script
    ],
)
def test_normalisation(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("Saint Bernadette Soubirous", ["Saint Bernadette Soubirous"], 1.0, 1.0),
        ("the Main Building", ["Main Building", "a copper statue of Christ"], 1.0, 1.0),
        ("copper statue", ["Main Building", "a copper statue of Christ"], 0.0, 2 * 2 / (2 + 4)),
        ("in 1882", ["1882."], 0.0, 2 / 3),
        ("to be to be", ["to be"], 0.0, 2 * 2 / (4 + 2)),  # words count as often as they occur in both
        ("Paris", ["Rome"], 0.0, 0.0),
        # without an answer (SQuAD 2)
        ("", [], 1.0, 1.0),
        ("Paris", [], 0.0, 0.0),
        ("", ["Paris"], 0.0, 0.0),
        ("the", [], 1.0, 1.0),  # nothing is left of it
        ("Paris", ["the"], 0.0, 0.0),
        ("", ["the", "Paris"], 0.0, 0.0),  # an answer without words does not count beside one with words
    ],
)
def test_exact_match_and_f1(prediction: str, answers: list[str], exact: float, f1: float) -> None:
    assert exact_match(prediction, answers) == exact
    assert answer_f1(prediction, answers) == pytest.approx(f1)


def test_no_relation_earns_nothing_and_costs_recall_and_precision() -> None:
    labels = ["born in", "born in", "works for", "none", "none"]
    assert relation_f1(labels, labels, "none") == 1.0
    said = ["born in", "none", "born in", "works for", "none"]
    counts = relation_counts(said, labels, "none")
    assert counts == (1, 3, 3)
    precision, recall = 1 / 3, 1 / 3
    assert counts.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert relation_f1(said, labels, None) == pytest.approx(2 / 5)  # without a null class, F1 is accuracy


def test_relations_that_are_not_there() -> None:
    assert math.isnan(relation_f1(["none"], ["none"], "none"))
    assert relation_f1(["none"], ["born in"], "none") == 0.0
    with pytest.raises(ValueError, match="expected one prediction for each label, got 1 for 2 labels"):
        relation_f1(["none"], ["none", "none"], "none")
