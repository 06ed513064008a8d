"""Estimates the accuracy of a classifier whose labels arrive late."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from evertune.drift.detector import check_settings, settings_of

_BINS = 100  # bins of confidence, of equal width
_COUNTERS = ("n_seen", "n_labelled", "n_unknown", "n_repeated", "n_expired")
_TENSORS = ("_seen", "_seen_squares", "_labelled", "_labelled_squares", "_correct")


class PerformanceEstimator:
    """Estimates how accurate a classifier is on recent records, from its confidences and from labels that arrive late.

    A calibrated confidence is the probability of being right, so that the mean of calibrated confidences is the
    expected accuracy: confidence-based performance estimation (NannyML's CBPE; related: Guillory et al. 2021, who use
    differences of mean confidence, and Garg et al. 2022, who count confidences above a learned threshold). The map from
    confidence to accuracy is learned from the records whose labels have arrived. It never decreases (isotonic
    regression by pooling adjacent violators, on 100 bins; Ayer et al. 1955), and old labels are forgotten, so that it
    follows changes in the meaning of a confidence.

    **What it detects, and what it does not.** A change of the inputs that moves records between confidences shows at
    once, without labels. A loss of accuracy at the same confidence shows only as labels arrive. Labelled records must
    be like the others of the same confidence: this holds if only doubtful cases are labelled, but not if only
    complaints are.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> confidences = torch.rand(2_000, generator=generator) / 2 + 0.5
        >>> correct = torch.rand(2_000, generator=generator) < confidences - 0.1  # too confident by 0.1
        >>> estimator = PerformanceEstimator()
        >>> estimator.update(range(2_000), confidences)
        >>> estimator.labels(range(1_000), correct[:1_000])  # the others' labels are still to come
        >>> round(estimator.estimate, 2), round(correct.float().mean().item(), 2)
        (0.66, 0.66)

    Args:
        half_life: Number of further records after which the weight of a record in the estimate has halved. Default:
            1,000.
        label_half_life: Number of further labels after which the weight of a label in the map has halved. Default:
            1,000.
        min_labels: Minimum number of labels before there is an estimate. Default: 100.
        max_pending: Maximum number of records kept until their labels arrive. Beyond it, the oldest are dropped, and
            counted. Default: 100,000.
        level: Coverage probability of the interval. Default: 0.95.

    Attributes:
        n_seen: Number of records given to :meth:`update`.
        n_labelled: Number of labels used.
        n_unknown: Number of labels for ids that are not waiting for one: never seen, dropped, or labelled before.
        n_repeated: Number of records whose id was already waiting for a label; the first record counts.
        n_expired: Number of records dropped without a label.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        half_life: float = 1_000,
        label_half_life: float = 1_000,
        min_labels: int = 100,
        max_pending: int = 100_000,
        level: float = 0.95,
    ) -> None:
        self.half_life, self.label_half_life, self.level = float(half_life), float(label_half_life), float(level)
        self.min_labels, self.max_pending = min_labels, max_pending
        self._config = settings_of(self)
        for name, value in self._config.items():
            if not float(value) > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        self._kept, self._label_kept = 0.5 ** (1 / half_life), 0.5 ** (1 / label_half_life)
        self._deviations = NormalDist().inv_cdf((1 + level) / 2)
        self.n_seen = self.n_labelled = self.n_unknown = self.n_repeated = self.n_expired = 0
        self._pending: dict[int | str, int] = {}  # id -> bin of the confidence, the oldest first
        # Weights by bin, and their squares.
        self._seen, self._seen_squares, self._labelled, self._labelled_squares, self._correct = torch.zeros(
            len(_TENSORS), _BINS, dtype=torch.float64
        )

    def update(self, ids: Sequence[int | str], confidences: Any) -> None:
        """Add records that have been predicted.

        Args:
            ids: Numbers or strings by which the labels will name the records.
            confidences: Probability that the classifier gave to the class it chose, ``[records]``.

        Raises:
            ValueError: If a confidence is NaN or outside [0, 1], or their number differs from that of the ids. Nothing
                is added then.
        """
        values = torch.as_tensor(confidences).detach().to("cpu", torch.float64).reshape(-1)
        _same_length(ids, values, "confidences")
        bad = (~((values >= 0) & (values <= 1))).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(values)} confidences are NaN or outside [0, 1], first: {values[bad[0]].item()} "
                f"of record {ids[int(bad[0])]!r}; give the probability of the predicted class, not its logit"
            )
        bins = (values * _BINS).long().clamp(max=_BINS - 1)
        new: dict[int | str, int] = {}
        for record, place in zip(ids, bins.tolist(), strict=True):
            if record not in self._pending:
                new.setdefault(record, place)
        self.n_seen += len(values)
        self.n_repeated += len(values) - len(new)
        self._pending.update(new)
        expired = list(islice(self._pending, max(0, len(self._pending) - self.max_pending)))
        self.n_expired += len(expired)
        for record in expired:
            del self._pending[record]
        places = torch.tensor(list(new.values()), dtype=torch.long)
        _add(self._seen, places, self._kept)
        _add(self._seen_squares, places, self._kept**2)

    def labels(self, ids: Sequence[int | str], correct: Any) -> None:
        """Add labels that have arrived: whether the predictions were right.

        Args:
            ids: Ids of the records, in any order.
            correct: Whether each prediction was right, ``[records]``, booleans or 0 and 1.

        Raises:
            ValueError: If a value is not 0 or 1, or their number differs from that of the ids. Nothing is added then.
        """
        values = torch.as_tensor(correct).detach().to("cpu", torch.float64).reshape(-1)
        _same_length(ids, values, "labels")
        bad = ((values != 0) & (values != 1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"labels tell whether a prediction was right, by True or False; got {values[bad[0]].item()} for record "
                f"{ids[int(bad[0])]!r}: compare the predicted class with the true one first"
            )
        found = [self._pending.pop(record, -1) for record in ids]
        places = torch.tensor(found, dtype=torch.long)
        known = places >= 0
        places, values = places[known], values[known]
        self.n_unknown += len(found) - len(places)
        self.n_labelled += len(places)
        _add(self._labelled, places, self._label_kept)
        _add(self._labelled_squares, places, self._label_kept**2)
        _add(self._correct, places, self._label_kept, values)

    @property
    def estimate(self) -> float:
        """The expected accuracy on recent records; NaN before ``min_labels`` labels."""
        return self._estimated()[0]

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the accuracy on recent records at probability ``level``; NaN before ``min_labels`` labels.

        A normal approximation that adds two variances: that of the map, which is learned from a limited number of
        labels, and that of the records, each of which is right or wrong by chance. It does not cover changes that only
        later labels would reveal.
        """
        value, variance = self._estimated()
        margin = self._deviations * math.sqrt(variance)
        return max(value - margin, 0.0), min(value + margin, 1.0)

    def calibrated(self, confidences: Any) -> Tensor:
        """The accuracy that confidences stand for, by the labels so far: float64, in the shape of ``confidences``.

        Raises:
            ValueError: If no label has arrived yet.
        """
        if not self.n_labelled:
            raise ValueError("no label has come yet: confidences cannot be calibrated")
        values = torch.as_tensor(confidences).detach().to("cpu", torch.float64)
        accuracies, _ = self._map()
        return accuracies[(values * _BINS).long().clamp(0, _BINS - 1)]

    def _estimated(self) -> tuple[float, float]:
        """The estimate and its variance."""
        total = self._seen.sum()
        if self.n_labelled < self.min_labels or not total:
            return math.nan, math.nan
        accuracies, blocks = self._map()
        value = (self._seen * accuracies).sum() / total
        outcomes = (self._seen_squares * accuracies * (1 - accuracies)).sum() / total**2
        # The share of each block in the records, and the variance of its accuracy, with Jeffreys' prior, as it would be
        # zero if none or all were right.
        shares, labelled, squares, correct = (
            torch.zeros(_BINS, dtype=torch.float64).index_add(0, blocks, weights)
            for weights in (self._seen / total, self._labelled, self._labelled_squares, self._correct)
        )
        effective = labelled.square() / squares.clamp(min=1e-12)
        fraction = (correct / labelled.clamp(min=1e-12) * effective + 0.5) / (effective + 1)
        mapped = (shares.square() * fraction * (1 - fraction) / (effective + 1)).sum()
        return value.item(), (outcomes + mapped).item()

    def _map(self) -> tuple[Tensor, Tensor]:
        """The accuracy of each bin, and the number of the block of bins that it was pooled into."""
        filled = (self._labelled > 0).nonzero().flatten()
        blocks: list[list[float]] = []  # labels, right ones, bins
        for labels, right in zip(self._labelled[filled].tolist(), self._correct[filled].tolist(), strict=True):
            blocks.append([labels, right, 1])
            # Pooling adjacent violators: compares accuracies without dividing.
            while len(blocks) > 1 and blocks[-2][1] * blocks[-1][0] >= blocks[-1][1] * blocks[-2][0]:
                last = blocks.pop()
                blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
        numbers = torch.arange(len(blocks)).repeat_interleave(torch.tensor([int(block[2]) for block in blocks]))
        # A bin without labels is treated like the nearest one with labels.
        nearest = (torch.arange(_BINS)[:, None] - filled).abs().argmin(1)
        accuracies = torch.tensor([right / labels for labels, right, _ in blocks], dtype=torch.float64)
        return accuracies[numbers[nearest]], numbers[nearest]

    def state_dict(self) -> dict[str, Any]:
        """The state for resuming: tensors, numbers and strings only."""
        return {
            "config": dict(self._config),
            **{name: getattr(self, name) for name in _COUNTERS},
            **{name.lstrip("_"): getattr(self, name).clone() for name in _TENSORS},
            "pending_ids": list(self._pending),
            "pending_bins": torch.tensor(list(self._pending.values()), dtype=torch.long),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`.

        Raises:
            ValueError: If the state was saved by an estimator with other settings.
        """
        check_settings(self._config, state_dict["config"])
        for name in _COUNTERS:
            setattr(self, name, state_dict[name])
        for name in _TENSORS:
            setattr(self, name, state_dict[name.lstrip("_")].clone())
        self._pending = dict(zip(state_dict["pending_ids"], state_dict["pending_bins"].tolist(), strict=True))


def _add(weights: Tensor, places: Tensor, kept: float, values: Tensor | None = None) -> None:
    """Add records in their order to the weights of the bins; every record decays all earlier weights."""
    n = len(places)
    faded = kept ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    weights *= kept**n
    weights.index_add_(0, places, faded if values is None else faded * values)


def _same_length(ids: Sequence[int | str], values: Tensor, what: str) -> None:
    if len(ids) != len(values):
        raise ValueError(f"there are {len(ids)} ids for {len(values)} {what}")
