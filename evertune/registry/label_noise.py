"""How many labels of an update look wrong: contradicted with confidence by two models of which one never saw them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from evertune.registry.predictions import Label, Predictions

SURE = 0.25
"""A model is sure of a prediction when it is as confident as in the upper three quarters of those that agree with the
label."""


@dataclass(frozen=True)
class Noise:
    """What was found among some records.

    Args:
        contradicted: records whose label is contradicted with confidence.
        records: all of them.
    """

    contradicted: int
    records: int

    @property
    def share(self) -> float:
        """The estimated share of wrong labels: a quarter of them is contradicted with less confidence, and not found.

        >>> Noise(contradicted=15, records=200).share
        0.1
        """
        return min(self.contradicted / ((1 - SURE) * self.records), 1.0) if self.records else 0.0


def label_noise(champion: Sequence[Predictions], challenger: Sequence[Predictions], known: Collection[str]) -> Noise:
    """Count the labels that are contradicted with confidence.

    A wrong label is a right text under another name: a model that can do the task says so, and is as sure of it as of
    any other text. A model's own mistakes are different: it is unsure of them. So if a share of the labels was
    replaced at random, the confidence of contradicting predictions is distributed like that of the agreeing ones, and
    the contradictions above the lower quartile of the agreeing ones are three quarters of the wrong labels and few
    others. (The idea is that of confident learning, Northcutt et al. 2021; the estimate of a proportion from one end of
    a known distribution is Storey's, 2002.)

    The champion is the first witness: it learnt without these records. The challenger is the second one: where it has
    come to agree with the label, the world has changed rather than the label been wrong, and nothing is counted. So
    new domains and new meanings pass. About a class that the champion does not know, as the label or as the prediction,
    the challenger is the only witness.

    Args:
        champion: predictions of the version in production, one for each set of records.
        challenger: predictions of the new version about the same records.
        known: the classes that the champion knows.
    """
    contradicted = records = 0
    for old, new in zip(champion, challenger, strict=True):
        testifies = np.array(
            [_within(a, known) and _within(b, known) for a, b in zip(new.labels, new.predicted, strict=True)], bool
        )
        same = np.array([_set(a) == _set(b) for a, b in zip(old.predicted, new.predicted, strict=True)], bool)
        sure = np.where(testifies, same & _sure(old), _sure(new))
        contradicted += int((~old.correct & ~new.correct & sure).sum())
        records += len(new)
    return Noise(contradicted, records)


def known_classes(champion: Sequence[Predictions], past: Sequence[Predictions]) -> set[str]:
    """The classes that a champion knows, as far as can be seen: those it predicts, and those of the past records."""
    names: set[str] = set()
    for label in [name for one in champion for name in one.predicted] + [name for one in past for name in one.labels]:
        names |= _set(label)
    return names


def _sure(predictions: Predictions) -> np.ndarray:
    agreeing = predictions.confidence[predictions.correct]
    limit = np.quantile(agreeing, SURE) if len(agreeing) else 0.0
    sure: np.ndarray = predictions.confidence >= limit
    return sure


def _within(label: Label, known: Collection[str]) -> bool:
    return all(name in known for name in _set(label))


def _set(label: Label) -> set[str]:
    return {label} if isinstance(label, str) else set(label)
