"""What a version says about held-out records, and what a prediction costs: all that the gate looks at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Label = str | list[str]
"""The name of a class, or with several labels a record their names."""

_DECIMALS = 6
_ALWAYS = ("ids", "labels", "predicted", "confidence", "label_probability")


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one version says about the records of one slice.

    Probabilities are rounded to six decimals, so that predictions read back from a file are judged like fresh ones.

    Args:
        ids: of the records.
        labels: their labels: names, or lists of names.
        predicted: what the version says they are, of the same kind.
        confidence: the probability of what it says, ``[records]``.
        label_probability: the probability of the label, ``[records]``; 0 for a class that the version does not know.
        scores: how good each prediction is, in [0, 1], ``[records]``, for a task whose labels are not classes (see
            :meth:`scored`). By default None: a prediction is right or wrong.

    Raises:
        ValueError: when the lengths differ, an id is there twice, or a score is not in [0, 1].

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
        """Predictions of a task whose labels are not classes: what counts is a score in [0, 1] for each record.

        Example:
            >>> p = Predictions.scored(["1", "2"], [0.3, 4.0], np.array([0.9, 0.5]))
            >>> p.accuracy, p.has_classes
            (0.7, False)
        """
        unknown = np.full(len(ids), math.nan)
        return cls(ids, labels, [""] * len(ids), unknown, unknown, scores)

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes, so that a prediction is right or wrong."""
        return self.scores is None

    @property
    def score(self) -> np.ndarray:
        """How good each prediction is, in [0, 1], ``[records]``: 0 or 1 where labels are classes."""
        return self.correct.astype(np.float64) if self.scores is None else self.scores

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether each record is predicted right (with several labels: all of them), as bools ``[records]``."""
        pairs = zip(self.labels, self.predicted, strict=True)
        return np.array([label == said or _names(label) == _names(said) for label, said in pairs], bool)

    @property
    def accuracy(self) -> float:
        """The share predicted right, or the mean score where labels are not classes; NaN without records."""
        return float(self.score.mean()) if self.ids else math.nan

    @property
    def log_loss(self) -> float:
        """The mean of ``-log p(label)``, p at least 1e-6; NaN without records."""
        return float(-np.log(np.maximum(self.label_probability, 1e-6)).mean()) if self.ids else math.nan

    def pick(self, rows: Sequence[int]) -> Predictions:
        """The predictions in these places, in this order."""
        chosen = list(rows)
        return Predictions(
            [self.ids[row] for row in chosen],
            [self.labels[row] for row in chosen],
            [self.predicted[row] for row in chosen],
            self.confidence[chosen],
            self.label_probability[chosen],
            None if self.scores is None else self.scores[chosen],
        )

    def to_dict(self) -> dict[str, list[Any]]:
        """For JSON: lists, with None for a probability that is not a number."""
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
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: when something is missing, or does not fit together.
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
    """What a version costs to serve.

    Args:
        latency_ms: the time that one text takes.
        batch_ms: the time that a batch of texts takes.
        size_bytes: of all parameters and buffers.
    """

    latency_ms: float
    batch_ms: float
    size_bytes: int


def _names(label: Label) -> frozenset[str]:
    return frozenset([label] if isinstance(label, str) else label)


def _or_none(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _or_nan(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], np.float64)
