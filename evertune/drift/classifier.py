"""A classifier that tries to distinguish new records from the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from evertune.drift.calibration import resample, resample_windows
from evertune.drift.windows import _REFERENCES, WindowDetector

_COMPONENTS = 64  # random directions that more features are reduced to: a few hundred records give their covariance
_RIDGE = 0.05  # share of the average variance that is added to each variance
_PART = 64  # windows scored at once


class ClassifierTest(WindowDetector):
    """Trains a small classifier to distinguish each window from the reference; if it can, the data has drifted.

    The classifier two-sample test (Lopez-Paz & Oquab 2017; Kim, Ramdas, Singh & Wasserman 2021) with a linear
    discriminant: it is learned from all folds of the window but one, with the reference's covariance, and ranks the
    records of the fold left out; each fold in turn. The score is the area under the ROC curve: how often a new record
    is ranked above an old one, 0.5 by chance and 1 if every record reveals the change. (It is computed as if both were
    normal, with the spread of the new records along the learned direction: Green & Swets 1966.) The test detects
    changes in the mean of the features; :attr:`weights` shows which features have changed.

    False alarms occur once in ``arl`` records, on average over references and streams: the whole procedure is repeated
    on resampled windows and references (see :class:`~evertune.drift.windows.WindowDetector`), so that what a classifier
    learns by chance is not an alarm. More than 64 features are projected on 64 random directions.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = ClassifierTest(arl=10_000, reference_size=256, window_size=32)
        >>> detector.update(torch.randn(1_000, 4, generator=generator))
        >>> detector.drift_detected
        False
        >>> detector.update(torch.randn(56, 4, generator=generator) + torch.tensor([0, 2, 0, 0]))
        >>> detector.drift_detected, round(detector.score, 2), detector.weights.argmax().item()
        (True, 0.73, 1)

    Args:
        arl: Average run length: the mean number of records from one false alarm to the next. Default: 10,000.
        reference_size: Number of records in the reference. Default: 512.
        window_size: Number of records in a test. Default: 64.
        block_size: Number of consecutive records that are resampled together: many times the stretch over which they
            are correlated, as otherwise what is learned from a record helps to rank its neighbours more than it does in
            resampled windows. Must divide both sizes. Default: 1, for independent records.
        n_folds: Number of folds of a window, of consecutive records each. Must divide ``window_size``. Default: 4.
        seed: Seed of the random directions and the resampling.

    Attributes:
        weights: The discriminant of the last test (of the first alarm, if the last ``update`` raised one),
            ``[n_features]``; new records score higher than those of the reference. Empty before the first test.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small for the false-alarm rate (the
            message names the size needed).
    """

    _kept = ("_mean", "_null", "_window", "_filled", "_whiten", "_centre", "weights")

    def __init__(
        self,
        arl: float = 10_000,
        *,
        reference_size: int = 512,
        window_size: int = 64,
        block_size: int = 1,
        n_folds: int = 4,
        seed: int = 0,
    ) -> None:
        if n_folds < 2 or window_size % n_folds:
            raise ValueError(f"n_folds must be at least 2 and divide window_size={window_size}, got {n_folds}")
        self.n_folds = n_folds
        super().__init__(arl, reference_size, window_size, block_size, seed)

    def _clear(self) -> None:
        super()._clear()
        self._whiten = torch.empty(0)  # [n_features, n_map]
        self._centre = torch.empty(0)  # of the reference
        self.weights = torch.empty(0)

    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        n_features = reference.shape[1]
        self._centre = reference.double().mean(0)
        directions = torch.eye(n_features, dtype=torch.float64)
        if n_features > _COMPONENTS:
            directions = torch.linalg.qr(torch.randn(n_features, _COMPONENTS, generator=generator).double()).Q
        records = (reference - self._centre) @ directions
        values, vectors = torch.linalg.eigh(records.T @ records / len(records))
        # The ridge keeps directions in which the reference hardly varies from dominating the discriminant.
        values = values.clamp(min=0) + _RIDGE * values.mean()
        self._whiten = directions @ vectors / torch.where(values > 0, values, 1.0).sqrt()

    def _map(self, records: Tensor) -> Tensor:
        return (records - self._centre) @ self._whiten

    def _arm(self, reference: Tensor, generator: torch.Generator) -> None:
        mapped = self._mapped(reference, generator)
        self._window = mapped[:0]
        records = mapped.float()
        n, size = len(records), self.window_size
        n_tests = self._n_resampled()
        means = embedding_bag(resample(n, (2 * _REFERENCES, n), self.block_size, generator), records, mode="mean")
        references, others = means.split(_REFERENCES)
        scores = torch.empty(n_tests, _REFERENCES)
        for part in torch.arange(n_tests).split(_PART):
            windows = records[resample_windows(n, len(part), size, self.block_size, generator)]
            # Records drawn without repetition are negatively correlated; moving each window to the mean of another
            # resampled reference restores the variance of its mean.
            moved = others[torch.randint(_REFERENCES, (len(part), 1), generator=generator)] - records.mean(0)
            scores[part] = self._areas(windows + moved, references)
        self._calibrate(scores)

    def _areas(self, windows: Tensor, references: Tensor) -> Tensor:
        """Areas under the ROC curve: ``[windows, window_size, n_map]`` and ``[references, n_map]`` to ``[windows,
        references]``."""
        folds = windows.unflatten(1, (self.n_folds, -1))
        learned = self._learnt(folds)
        # (x - r) . (a - r) / |a - r|, for a record x left out, the mean a of the others, and the reference's mean r
        squares, learnt_by = references.square().sum(1), learned @ references.T
        lengths = learned.square().sum(2, keepdim=True) + squares - 2 * learnt_by
        scale = lengths.clamp(min=1e-12).rsqrt()[:, :, None]
        along = (folds @ learned[..., None] - folds @ references.T).add_((squares - learnt_by)[:, :, None]).mul_(scale)
        mean = along.mean((1, 2))
        spread = (along.square_().mean((1, 2)) - mean.square()).clamp(min=1e-12).sqrt()
        areas: Tensor = torch.special.ndtr(mean / spread / math.sqrt(2))
        return areas

    def _learnt(self, folds: Tensor) -> Tensor:
        """The mean of the records outside each fold: ``[windows, folds, records, n_map]`` to ``[windows, folds,
        n_map]``."""
        sums = folds.sum(2)
        return (sums.sum(1, keepdim=True) - sums) / (self.window_size - folds.shape[2])

    def sums(self, records: Tensor, positions: Tensor, count: int) -> None:
        """Always None, as the records themselves are needed; see :meth:`update`."""

    def _watch(self, records: Tensor) -> None:
        kept = torch.cat([self._window, self._map(records)])
        seen = self.n_seen + len(records)
        *full, rest = kept.tensor_split(list(range(self.window_size, len(kept) + 1, self.window_size)))
        for i, window in enumerate(full):
            self.n_seen = seen - len(rest) - (len(full) - 1 - i) * self.window_size
            self._judge(window)
        self._window, self._filled, self.n_seen = rest.clone(), len(rest), seen

    def _judge(self, window: Tensor) -> None:
        score = self._areas(window[None], self._mean[None]).item()
        if not self.drift_detected:
            self.weights = (self._whiten @ (window.mean(0) - self._mean)).float()
        self._test(score, self._p_value(score))
