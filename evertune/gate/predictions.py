"""The predictions of a version on held-out records, and their cost: all that the gate compares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Label = str | list[str]
"""The name of a class, or a list of names if a record has several labels."""

_DECIMALS = 6
_ALWAYS = ("ids", "labels", "predicted", "confidence", "label_probability")


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of one version on the records of one slice.

    Probabilities are rounded to six decimals, so that predictions read from a file are judged like new ones.

    Args:
        ids: Ids of the records.
        labels: Labels of the records: names, or lists of names.
        predicted: Predicted labels, of the same kind.
        confidence: Probability of each predicted label, ``[records]``.
        label_probability: Probability of each true label, ``[records]``; 0 for a class that the version does not know.
        scores: Score of each prediction in [0, 1], ``[records]``, for a task whose labels are not classes (see
            :meth:`scored`). Default: None, for a task where each prediction is right or wrong.

    Raises:
        ValueError: If the lengths differ, an id occurs twice, or a score is not in [0, 1].

    Example:
        >>> sure, of_label = np.array([0.9, 0.6]), np.array([0.9, 0.2])
        >>> p = Predictions(["1", "2"], ["sport", "sport"], ["sport", "law"], sure, of_label)
        >>> p.correct.tolist(), p.accuracy
        ([True, False], 0.5)
        >>> Predictions.from_dict(p.to_dict()).confidence.tolist()
        [0.9, 0.6]
    """

    ids: list[str]
    labels: list[Label]
    predicted: list[Label]
    confidence: np.ndarray
    label_probability: np.ndarray
    scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        numbers = ("confidence", "label_probability", "scores")[: 2 if self.scores is None else 3]
        for name in numbers:
            object.__setattr__(self, name, np.round(np.asarray(getattr(self, name), np.float64), _DECIMALS))
        if self.scores is not None and ((self.scores < 0) | (self.scores > 1)).any():
            worst = self.scores[np.abs(self.scores - 0.5).argmax()]
            raise ValueError(f"scores must be in [0, 1], got {worst:g}: give the module a task whose score() is")
        lengths = {name: len(getattr(self, name)) for name in (*_ALWAYS, *numbers[2:])}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"predictions need one value of each kind per record, got {lengths}")
        if len(set(self.ids)) < len(self.ids):
            twice = next(one for one in self.ids if self.ids.count(one) > 1)
            raise ValueError(f"a record must be predicted once, but the id {twice!r} is there twice")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def scored(cls, ids: list[str], labels: list[Any], scores: np.ndarray) -> Predictions:
        """Predictions of a task whose labels are not classes, and which has a score in [0, 1] for each record instead.

        Example:
            >>> p = Predictions.scored(["1", "2"], [0.3, 4.0], np.array([0.9, 0.5]))
            >>> p.accuracy, p.has_classes
            (0.7, False)
        """
        unknown = np.full(len(ids), math.nan)
        return cls(ids, labels, [""] * len(ids), unknown, unknown, scores)

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes, so that a prediction is either right or wrong."""
        return self.scores is None

    @property
    def score(self) -> np.ndarray:
        """The score of each prediction in [0, 1], ``[records]``; 0 or 1 if labels are classes."""
        return self.correct.astype(np.float64) if self.scores is None else self.scores

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right, ``[records]``; for several labels, whether all of them are."""
        pairs = zip(self.labels, self.predicted, strict=True)
        return np.array([label == said or names_of(label) == names_of(said) for label, said in pairs], bool)

    @property
    def accuracy(self) -> float:
        """The share of right predictions, or the mean score if labels are not classes; NaN without records."""
        return float(self.score.mean()) if self.ids else math.nan

    @property
    def log_loss(self) -> float:
        """The mean of ``-log p(label)`` with p at least 1e-6; NaN without records."""
        return float(-np.log(np.maximum(self.label_probability, 1e-6)).mean()) if self.ids else math.nan

    def class_counts(self) -> tuple[Counter[str], Counter[str], Counter[str]]:
        """For each class the records with that label, those with that answer, and those with both."""
        labels, answers, both = Counter[str](), Counter[str](), Counter[str]()
        for label, answer in zip(self.labels, self.predicted, strict=True):
            true, given = names_of(label), names_of(answer)
            labels.update(true)
            answers.update(given)
            both.update(true & given)
        return labels, answers, both

    def pick(self, rows: Sequence[int]) -> Predictions:
        """The predictions at these positions, in this order."""
        chosen = list(rows)
        return Predictions(
            [self.ids[row] for row in chosen],
            [self.labels[row] for row in chosen],
            [self.predicted[row] for row in chosen],
            self.confidence[chosen],
            self.label_probability[chosen],
            None if self.scores is None else self.scores[chosen],
        )

    def without(self, ids: Collection[str]) -> Predictions:
        """The predictions without those on some records."""
        return self.pick([row for row, one in enumerate(self.ids) if one not in ids])

    def to_dict(self) -> dict[str, list[Any]]:
        """The predictions as JSON values: lists, with None for a probability that is not finite."""
        scores = {} if self.scores is None else {"scores": _or_none(self.scores)}
        return {
            "ids": self.ids,
            "labels": self.labels,
            "predicted": self.predicted,
            "confidence": _or_none(self.confidence),
            "label_probability": _or_none(self.label_probability),
            **scores,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Predictions:
        """The predictions that :meth:`to_dict` returned.

        Raises:
            ValueError: If a key is missing, or the values do not fit together.
        """
        names = list(_ALWAYS)
        if not isinstance(values, Mapping) or set(values) - {"scores"} != set(names):
            raise ValueError(f"predictions have the keys {names}, got {list(values)}")
        return cls(
            list(values["ids"]),
            list(values["labels"]),
            list(values["predicted"]),
            _or_nan(values["confidence"]),
            _or_nan(values["label_probability"]),
            _or_nan(values["scores"]) if "scores" in values else None,
        )


@dataclass(frozen=True)
class Cost:
    """The cost of serving a version.

    Args:
        latency_ms: Time for one text in milliseconds.
        batch_ms: Time for a batch of texts in milliseconds.
        size_bytes: Size of all parameters and buffers in bytes.
    """

    latency_ms: float
    batch_ms: float
    size_bytes: int


def names_of(label: Label) -> frozenset[str]:
    """The names of the classes in a label."""
    return frozenset([label] if isinstance(label, str) else label)


def _or_none(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _or_nan(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], np.float64)
