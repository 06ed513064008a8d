"""Estimates how many labels of an update are wrong: those contradicted by confident models, one of which never saw
them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from evertune.gate.predictions import Label, Predictions

UNSURE = 0.25
"""Quantile of a model's confidence, among its predictions that agree with the label, below which it does not count."""
UNSURE_LEARNT = 0.1
"""The same quantile for the new version on records that it was trained on, whose labels it tends to believe."""


@dataclass(frozen=True)
class Noise:
    """The counts for some records.

    Args:
        sure: Number of records on which the models are confident.
        contradicted: Number of those whose label they contradict.
        resolved: Number of records whose label the champion confidently contradicts and the challenger predicts.
    """

    sure: int
    contradicted: int
    resolved: int = 0

    @property
    def share(self) -> float:
        """The estimated share of wrong labels.

        >>> Noise(sure=200, contradicted=20).share
        0.1
        """
        return self.contradicted / self.sure if self.sure else 0.0

    @property
    def drifted(self) -> bool:
        """Whether the data has changed: most labels that the champion contradicts could be learned, so that they are
        not random, and the rest may simply not be learned yet."""
        return self.resolved >= max(self.contradicted, 1)

    def __add__(self, other: Noise) -> Noise:
        return Noise(self.sure + other.sure, self.contradicted + other.contradicted, self.resolved + other.resolved)


def label_noise(old: Predictions, new: Predictions, known: Collection[str], second: float | None = UNSURE) -> Noise:
    """Count the labels that confident models contradict.

    A wrong label is an ordinary text under the name of another class. A model that can do the task is as confident on
    such a text as on any other, so that the share of wrong labels is the same among the texts on which it is confident
    as among all. Its own mistakes are different: on most of them it is not confident. (Confident learning rests on the
    same assumption: Northcutt et al. 2021.) A model counts as confident unless its confidence is in the lowest part of
    its confidences on the same records where it agrees with the label. The threshold is relative, so that a version
    that is less confident in general, such as one trained on noise, hides nothing.

    The champion is asked first, as it learned nothing from these records. The challenger is asked second: where it has
    learned to disagree with the champion, the data may have changed while the label is right. For a class that the
    champion does not know, only the challenger is asked.

    Args:
        old: Predictions of the version in production, the champion.
        new: Predictions of the new version, the challenger, on the same records.
        known: Classes that the champion knows.
        second: Quantile of the challenger's confidence, among its predictions that agree with the label, below which it
            does not count. None asks the champion alone, where it knows the class.
    """
    known_label = _known(new.labels, known)
    sure_before = known_label & _sure(old, UNSURE)
    if second is None:
        first, told = sure_before, known_label
    else:
        agree = np.array([_same(*said) for said in zip(old.predicted, new.predicted, strict=True)], bool)
        first, told = sure_before & agree & _sure(new, second), known_label & _known(new.predicted, known)
    counted = np.where(told, first, _sure(new, UNSURE))
    wrong = ~old.correct & np.where(told & (second is None), True, ~new.correct)
    resolved = sure_before & ~old.correct & new.correct
    return Noise(int(counted.sum()), int((counted & wrong).sum()), int(resolved.sum()))


def known_classes(champion: Iterable[Predictions], past: Iterable[Predictions]) -> set[str]:
    """The classes that a champion is seen to know: those that it predicts, and those of the past records."""
    labels = [said for one in champion for said in one.predicted] + [label for one in past for label in one.labels]
    return {name for label in labels for name in _names(label)}


def _sure(predictions: Predictions, unsure: float) -> np.ndarray:
    agreeing = predictions.confidence[predictions.correct]
    sure: np.ndarray = predictions.confidence >= (np.quantile(agreeing, unsure) if len(agreeing) else 0.0)
    return sure


def _known(labels: Iterable[Label], known: Collection[str]) -> np.ndarray:
    return np.array(
        [label in known if isinstance(label, str) else all(name in known for name in label) for label in labels], bool
    )


def _same(left: Label, right: Label) -> bool:
    return left == right or _names(left) == _names(right)


def _names(label: Label) -> set[str]:
    return {label} if isinstance(label, str) else set(label)
