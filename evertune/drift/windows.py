"""Detectors that compare windows of records with the reference by the means of a feature map."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from evertune.drift.calibration import apart, resample, resample_windows, threshold_of_tests
from evertune.drift.sums import SumDetector

_MAX_TESTS = 200_000  # maximum number of resampled windows
_MIN_TESTS = 2_000
_TESTS_ABOVE = 100  # resampled windows expected above the threshold: enough for a rate that is accurate to 10%
_REFERENCES = 32  # number of resampled references
_MIN_WINDOWS = 4  # a shorter reference is too noisy, whatever the false-alarm rate
_PART = 8_192  # resampled windows that are scored at once
_JITTER = 1e-6  # relative noise that breaks ties between equal scores
_ROUNDING = 1e-12  # rounding error relative to the squared length of the mapped records, for a constant reference


class WindowDetector(SumDetector):
    """Tests every ``window_size`` records by the distance of their mean from the reference's, in a feature map.

    Only the sum of a window is kept. The threshold is calibrated from the reference: resampled windows are compared
    with resampled references, so that the mean number of records up to a false alarm, over references and streams, is
    ``arl`` (see :mod:`evertune.drift.calibration`). The p-value of a test is ``(k + 1) / (n + 1)``, where ``k`` of
    ``n`` resampled windows are at least as far away.

    A subclass implements :meth:`_fit`, :meth:`_map` and :meth:`_distance`.

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm.
        reference_size: Number of records in the reference.
        window_size: Number of records in a test.
        block_size: Number of consecutive records that are resampled together. Must divide both sizes.
        seed: Seed of all that the detector draws.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small for the false-alarm rate (the
            message names the size needed).
    """

    _kept: tuple[str, ...] = (*SumDetector._kept, "_null", "_rounding")
    _lattice = False
    """Whether scores repeat, as those of counts do. Ties are then broken at random, so that any false-alarm rate can be
    met."""
    _distinct = True
    """Whether resampled windows contain no record twice (see ``resample_windows``). If features are tested one by one,
    repetitions do no harm, and without them the tails would be slightly too light."""

    def __init__(self, arl: float, reference_size: int, window_size: int, block_size: int, seed: int) -> None:
        self.window_size = window_size
        super().__init__(window_size, arl, reference_size, block_size, seed)
        if window_size <= 0:
            raise ValueError(f"window_size must be positive, got {window_size}")
        if window_size % block_size:
            raise ValueError(f"block_size must divide window_size, got {block_size} for {window_size}")
        self.level = self.window_size / self.arl
        """The probability of a false alarm in one test, on average over references."""
        if not 1 / _MAX_TESTS <= self.level < 1:
            raise ValueError(
                f"arl must be above window_size={self.window_size} and at most {self.window_size * _MAX_TESTS}, "
                f"got {self.arl:g}"
            )
        needed = reference_needed(self.level, self.window_size, self.block_size)
        if self.reference_size < needed:
            raise ValueError(
                f"a reference of {self.reference_size} records is too small for arl={self.arl:g} with window_size="
                f"{self.window_size} and block_size={self.block_size}: reference_size must be at least {needed}"
            )

    def _distance(self, windows: Tensor, references: Tensor) -> Tensor:
        """The distances of means: ``[windows, n_map]`` and ``[references, n_map]`` to ``[windows, references]``.

        Default: the squared Euclidean distance.
        """
        squares = windows.square().sum(1, keepdim=True) + references.square().sum(1)
        return (squares - 2 * windows @ references.T).clamp(min=0)

    def _clear(self) -> None:
        super()._clear()
        self._null = torch.empty(0)  # scores of resampled windows, ascending
        self._rounding = 0.0  # scores up to it are rounding errors, and count as 0

    def _arm(self, reference: Tensor, generator: torch.Generator) -> None:
        mapped = self._mapped(reference, generator)
        centred = (mapped - self._mean).float()
        n, size = len(centred), self.window_size
        n_tests = self._n_resampled()
        drawn = resample(n, (_REFERENCES, n), self.block_size, generator)
        references = embedding_bag(drawn, centred, mode="mean")
        scores = torch.empty(n_tests, _REFERENCES)
        for part in torch.arange(n_tests).split(_PART):
            if self._distinct:
                drawn = resample_windows(n, len(part), size, self.block_size, generator)
                windows = embedding_bag(drawn, centred, mode="mean") * apart(n, size)
            else:
                drawn = resample(n, (len(part), size), self.block_size, generator)
                windows = embedding_bag(drawn, centred, mode="mean")
            scores[part] = self._distance(windows, references)
        if self._lattice:
            scores = scores.double() * (1 + _JITTER * torch.rand(scores.shape, generator=generator))
        self._rounding = _ROUNDING * mapped.square().sum(1).mean().item()
        self._calibrate(scores.masked_fill(scores <= self._rounding, 0.0))

    def _n_resampled(self) -> int:
        """The number of windows to resample."""
        return min(max(_MIN_TESTS, math.ceil(_TESTS_ABOVE / self.level)), _MAX_TESTS)

    def _calibrate(self, scores: Tensor) -> None:
        """Set the threshold and the null distribution of p-values from resampled scores ``[windows, references]``."""
        self.threshold = threshold_of_tests(scores, 1 / self.level)
        self._null = scores.flatten().sort().values[_REFERENCES // 2 :: _REFERENCES].double().contiguous()

    def _p_value(self, score: float) -> float:
        n = len(self._null)
        as_large = n - int(torch.searchsorted(self._null, score))
        return (as_large + 1) / (n + 1)

    def _take(self, sums: Tensor, count: int) -> None:
        for added in sums:
            taken = min(self.window_size - self._filled, count)
            self._window = self._window + added
            self._filled += taken
            self.n_seen += taken
            count -= taken
            if self._filled == self.window_size:
                mean = self._window / self.window_size - self._mean
                score = self._distance(mean[None], torch.zeros_like(mean)[None]).item()
                if score <= self._rounding:
                    score = 0.0
                if self._lattice:
                    score *= 1 + _JITTER * torch.rand(1, generator=self._generator_of_test()).item()
                self._window, self._filled = torch.zeros_like(self._window), 0
                self._test(score, self._p_value(score))

    def _generator_of_test(self) -> torch.Generator:
        # Derived from the number of the test: a resumed detector breaks ties in the same way.
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.n_tests)


def reference_needed(level: float, window_size: int, block_size: int) -> int:
    """The smallest reference that has enough windows, and enough different ones for a p-value of ``level``."""
    in_window = window_size // block_size
    n_blocks = _MIN_WINDOWS * in_window
    while math.comb(n_blocks, in_window) + 1 < 1 / level:
        n_blocks += 1
    return n_blocks * block_size
