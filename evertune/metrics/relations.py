"""The F1 of relations, in which the class "no relation" earns nothing (as in TACRED, Zhang et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class RelationCounts(NamedTuple):
    """What the F1 is made of. Counts of several batches or ranks add up.

    Args:
        right: Number of relations that were found, and are the right ones.
        found: Number of relations that were found.
        there: Number of relations that are there.
    """

    right: int
    found: int
    there: int

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; 0.0 if nothing is right, NaN if there was nothing to find."""
        if not self.found and not self.there:
            return float("nan")
        return 2 * self.right / (self.found + self.there)


def relation_counts(predicted: Sequence[str], labels: Sequence[str], null: str | None) -> RelationCounts:
    """Count relations among predictions and labels, all but ``null``.

    Args:
        predicted: Name of the predicted relation of each record.
        labels: Name of the true relation of each record.
        null: Name of the class that stands for no relation; None if there is no such class.

    Raises:
        ValueError: If there are not as many predictions as labels.

    Example:
        >>> counts = relation_counts(["works for", "none", "born in"], ["works for", "born in", "none"], null="none")
        >>> counts, counts.f1
        (RelationCounts(right=1, found=2, there=2), 0.5)
    """
    if len(predicted) != len(labels):
        raise ValueError(f"expected one prediction for each label, got {len(predicted)} for {len(labels)} labels")
    right = sum(said == label != null for said, label in zip(predicted, labels, strict=True))
    return RelationCounts(right, sum(said != null for said in predicted), sum(label != null for label in labels))


def relation_f1(predicted: Sequence[str], labels: Sequence[str], null: str | None) -> float:
    """The micro-averaged F1 over all relations but ``null``, see :func:`relation_counts`.

    Example:
        >>> relation_f1(["works for", "works for"], ["works for", "none"], null="none")
        0.6666666666666666
    """
    return relation_counts(predicted, labels, null).f1
