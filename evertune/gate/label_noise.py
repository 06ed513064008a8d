"""Estimates how many labels of an update are wrong: those contradicted by confident models, one of which never saw
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from evertune.gate.predictions import Label, Predictions, names_of

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


def label_noise(
    old: Predictions,
    new: Predictions,
    known: Collection[str],
    second: float | None = UNSURE,
    past: tuple[Predictions, Predictions] | None = None,
) -> Noise:
    """Count the labels that confident models contradict, among those of classes that the champion has learned.

    A wrong label is an ordinary text under the name of another class. A model that can do the task is as confident on
    such a text as on any other, so that the share of wrong labels is the same among the texts on which it is confident
    as among all. Its own mistakes are different: on most of them it is not confident. (Confident learning rests on the
    same assumption: Northcutt et al. 2021.) A model counts as confident unless its confidence is in the lowest part of
    its confidences on the same records where it agrees with the label. The threshold is relative, so that a version
    that is less confident in general, such as one trained on noise, hides nothing.

    The champion is asked first, as it learned nothing from these records. The challenger is asked second: where it has
    learned to disagree with the champion, the data may have changed while the label is right. Where it names a class
    that the champion has not learned, only the challenger is asked.

    Args:
        old: Predictions of the version in production, the champion.
        new: Predictions of the new version, the challenger, on the same records.
        known: Classes that the champion has learned. Labels of other classes are left to :func:`unlike_their_class`.
        second: Quantile of the challenger's confidence, among its predictions that agree with the label, below which it
            does not count. None asks the champion alone.
        past: Predictions of both on past records, whose confidences are used where a version agrees with no label.
    """
    known_label = _known(new.labels, known)
    sure_before = known_label & _sure(old, UNSURE, past and past[0])
    sure_after = _sure(new, UNSURE if second is None else second, past and past[1])
    if second is None:
        first, told = sure_before, known_label
    else:
        agree = np.array([_same(*said) for said in zip(old.predicted, new.predicted, strict=True)], bool)
        first, told = sure_before & agree & sure_after, known_label & _known(new.predicted, known)
    counted = known_label & np.where(told, first, sure_after)
    wrong = ~old.correct & np.where(told & (second is None), True, ~new.correct)
    resolved = sure_before & ~old.correct & new.correct
    return Noise(int(counted.sum()), int((counted & wrong).sum()), int(resolved.sum()))


def unlike_their_class(
    old: Predictions,
    new: Predictions,
    untrained: Predictions,
    known: Collection[str],
    past: tuple[Predictions, Predictions] | None = None,
) -> Noise:
    """Count the labels that do not fit their records, among those of classes that the champion has not learned.

    Neither version is a witness here: the champion does not know the class, and the challenger may not have learned it
    yet, so that it contradicts right labels with confidence. A model that was not trained is asked first: a label is
    only in doubt if the record resembles another class more than its own, and if one of the two versions is sure of
    that same other class.

    Args:
        old: Predictions of the version in production, the champion.
        new: Predictions of the new version, the challenger, on the same records.
        untrained: Answers of :func:`~evertune.gate.untrained.nearest_class_means` for the same records, or some of
            them.
        known: Classes that the champion has learned.
        past: Predictions of both on past records, whose confidences are used where a version agrees with no label.
    """
    places = {one: place for place, one in enumerate(untrained.ids)}
    resembles = [untrained.predicted[places[one]] if one in places else "" for one in new.ids]
    heard = ~_known(new.labels, known) & np.array([answer != "" for answer in resembles], bool)
    doubted = np.zeros(len(new), bool)
    for side, before in ((old, past and past[0]), (new, past and past[1])):
        same = np.array([_same(*said) for said in zip(side.predicted, resembles, strict=True)], bool)
        doubted |= same & _sure(side, UNSURE, before)
    other = np.array([not _same(*said) for said in zip(new.labels, resembles, strict=True)], bool)
    return Noise(int(heard.sum()), int((heard & doubted & other).sum()))


def learned_classes(champion: Iterable[Predictions], past: Iterable[Predictions]) -> set[str]:
    """The classes that a champion has learned: it is right on half of their past records, or names them anywhere if
    there are none."""
    records, right = Counter[str](), Counter[str]()
    for one in filter(_has_classes, past):
        for label, said in zip(one.labels, one.predicted, strict=True):
            records.update(names_of(label))
            right.update(names_of(label) & names_of(said))
    named = {name for one in filter(_has_classes, champion) for said in one.predicted for name in names_of(said)}
    return {name for name in named | set(records) if 2 * right[name] >= records[name]}


def _sure(predictions: Predictions, unsure: float, fallback: Predictions | None = None) -> np.ndarray:
    """Whether a model is confident; never, if it agrees with no label and so shows no confidence to compare with."""
    for one in (predictions, fallback):
        agreeing = one.confidence[one.correct] if one is not None else ()
        if len(agreeing):
            sure: np.ndarray = predictions.confidence >= np.quantile(agreeing, unsure)
            return sure
    return np.zeros(len(predictions), bool)


def _has_classes(predictions: Predictions) -> bool:
    return predictions.has_classes


def _known(labels: Iterable[Label], known: Collection[str]) -> np.ndarray:
    return np.array(
        [label in known if isinstance(label, str) else all(name in known for name in label) for label in labels], bool
    )


def _same(left: Label, right: Label) -> bool:
    return left == right or names_of(left) == names_of(right)
