"""How many labels of an update look wrong: contradicted by two models that are sure, of which one never saw them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from evertune.gate.predictions import Label, Predictions

UNSURE = 0.25
"""The part of its agreeing predictions that a witness is less sure of than it must be to count."""
UNSURE_LEARNT = 0.1
"""The same for the new version about records that it was trained on, whose labels it half believes."""


@dataclass(frozen=True)
class Noise:
    """What was found among some records.

    Args:
        sure: records that the witnesses are sure of.
        contradicted: those of them that have another label.
        resolved: records whose label the champion is sure to contradict, and the challenger predicts.
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
        """Whether the world has changed: most labels that the champion contradicts could be learned, so they mean
        something, and the rest may as well be what is not learned yet."""
        return self.resolved >= max(self.contradicted, 1)

    def __add__(self, other: Noise) -> Noise:
        return Noise(self.sure + other.sure, self.contradicted + other.contradicted, self.resolved + other.resolved)


def label_noise(old: Predictions, new: Predictions, known: Collection[str], second: float | None = UNSURE) -> Noise:
    """Count the labels that are contradicted by those who are sure.

    A wrong label is a good text under another name. A model that can do the task is as sure of such a text as of any
    other, so that among the texts it is sure of, as many labels are wrong as among all. Its own mistakes are different:
    it is unsure of most of them. (Confident learning rests on the same: Northcutt et al. 2021.) A witness is sure when
    its confidence is not in the lowest part of its confidence where it agrees with the label, on the same records: a
    version that is less confident in general, as one trained on noise is, does not hide anything.

    The champion is the first witness: it learned nothing from these records. The challenger is the second: where it has
    come to disagree with the champion, the world may have changed rather than the label been wrong. About a class that
    the champion does not know, the challenger is the only witness.

    Args:
        old: predictions of the version in production, the champion.
        new: predictions of the new version, the challenger, about the same records.
        known: the classes that the champion knows.
        second: the part of its agreeing predictions that the challenger must be surer than; None asks the champion
            alone, where it can tell.
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
    """The classes that a champion knows, as far as can be seen: those it predicts, and those of the past records."""
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
