"""A detector that tests each feature on its own, at one false-alarm rate for all features together."""

from __future__ import annotations

import torch
from torch import Tensor

from evertune.drift.windows import WindowDetector

_EXACT = 20  # resampled windows that are compared with every reference, as a multiple of those that raise alarms
_ELEMENTS = 2_000_000  # elements compared at once
_GOLDEN = (5**0.5 - 1) / 2  # the golden ratio: its multiples modulo 1 are spread evenly


class MarginalKS(WindowDetector):
    """Detects a change in the distribution of any single feature, and shows which feature has changed.

    The empirical distribution function of each feature is evaluated at some quantiles of the reference; the score is
    its largest change over features and quantiles, in standard errors of a window: a Kolmogorov-Smirnov statistic on a
    grid, weighted as that of Anderson & Darling (1952). The threshold is that of this maximum, found by resampling
    whole records (max-T; Westfall & Young 1993): features may depend on each other in any way, and 16 copies of one
    feature do not count as 16 tests, as they would with Bonferroni's correction.

    The test is strong if few features change (a new category, a unit, a sensor). A change that is spread thinly over
    all features is detected sooner by :class:`~evertune.drift.MMD`, and a change of correlations alone only by that.

    The guarantee is that of :class:`~evertune.drift.windows.WindowDetector`: false alarms occur once in ``arl``
    records, on average over references and streams.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = MarginalKS(arl=10_000, reference_size=256, window_size=32)
        >>> detector.update(torch.randn(512, 4, generator=generator))
        >>> detector.drift_detected
        False
        >>> moved = torch.tensor([0.0, 0.0, 2.0, 0.0])  # the third feature, by two sigma
        >>> detector.update(torch.randn(32, 4, generator=generator) + moved)
        >>> detector.drift_detected, detector.feature_scores.argmax().item()
        (True, 2)

    Attributes:
        feature_scores: Largest change of each feature in the last test, in standard errors, ``[n_features]``. Empty
            before the first test.

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm. Default: 10,000.
        reference_size: Number of records in the reference. Default: 512.
        window_size: Number of records in a test. Small windows react fast, large ones detect small changes. Default:
            32.
        block_size: Number of consecutive records that are resampled together. Records that are further apart should be
            independent. Default: 1.
        n_knots: Number of quantiles of each feature. Default: 8.
        seed: Seed of the resampling.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small for the false-alarm rate (the
            message names the size needed).
    """

    _kept: tuple[str, ...] = (*WindowDetector._kept, "_knots", "feature_scores")
    _lattice = True
    _distinct = False

    def __init__(
        self,
        arl: float = 10_000,
        *,
        reference_size: int = 512,
        window_size: int = 32,
        block_size: int = 1,
        n_knots: int = 8,
        seed: int = 0,
    ) -> None:
        if n_knots < 1:
            raise ValueError(f"n_knots must be positive, got {n_knots}")
        self.n_knots = n_knots
        super().__init__(arl, reference_size, window_size, block_size, seed)

    def _clear(self) -> None:
        super()._clear()
        self._knots = torch.empty(0)  # [n_features, n_knots]
        self.feature_scores = torch.empty(0)

    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        # The levels are scattered around evenly spaced ones: otherwise all features would share the few values that a
        # window can have. They are not random, as a stream made with the same seed would depend on its knots.
        scatter = (torch.arange(self.n_knots * reference.shape[1]) * _GOLDEN % 1).view(self.n_knots, -1)
        levels = torch.arange(1, self.n_knots + 1)[:, None] - 0.5 + scatter
        places = (levels * (len(reference) / (self.n_knots + 1))).long()
        knots = reference.sort(0).values.gather(0, places).T.contiguous()
        # The lower half of the knots counts records below the knot, the upper half those not above it, so that a
        # feature that has always been 0 is seen to change in either direction.
        lower = self.n_knots // 2
        knots[:, :lower] = knots[:, :lower].nextafter(torch.tensor(-torch.inf))
        self._knots = knots

    def _map(self, records: Tensor) -> Tensor:
        """Whether each feature is at most as large as each of its knots, ``[records, n_features * n_knots]``."""
        return (records.unsqueeze(2) <= self._knots).flatten(1).double()

    def _distance(self, windows: Tensor, references: Tensor) -> Tensor:
        if len(windows) == 1:  # a test
            changes = (windows - references).abs() * self._precision(references)
            self.feature_scores = changes[0].view(-1, self.n_knots).amax(1)
            return changes.amax(1)[None]
        # Windows near the mean are far from any alarm: their distance from each reference is approximated by that from
        # the mean. Only the others are compared with each of the references.
        size = (windows * self._precision(torch.zeros_like(windows[:1]))).abs_().amax(1)
        distances: Tensor = (size * (1 + self.window_size / self.reference_size) ** 0.5)[:, None].repeat(
            1, len(references)
        )
        far = size.topk(min(len(size), max(1, round(_EXACT * self.level * len(size))))).indices
        precisions = self._precision(references)
        rows = max(1, _ELEMENTS // windows.shape[1])
        for start in range(0, len(far), rows):
            chosen = windows[far[start : start + rows]]
            for column, (reference, precision) in enumerate(zip(references, precisions, strict=True)):
                distances[far[start : start + rows], column] = ((chosen - reference) * precision).abs_().amax(1)
        return distances

    def _precision(self, references: Tensor) -> Tensor:
        """The reciprocal of the standard error of a window's shares, for each reference.

        If the true share of rare records is larger than that in the reference by chance, it also varies more. Resampled
        windows do not reproduce this, so that their differences are stretched.
        """
        mean = self._mean.to(references.dtype)
        variance = self._variance(mean)
        precision: Tensor = (self.window_size * self._variance(mean - references)).sqrt() / variance
        return precision

    def _variance(self, shares: Tensor) -> Tensor:
        # Values that were hardly ever seen are assumed to occur once in a window; otherwise the first such record would
        # raise an alarm.
        return (shares * (1 - shares)).clamp(min=1 / self.window_size)
