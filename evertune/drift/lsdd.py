"""A detector based on the least-squares density difference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evertune.drift.mmd import median_distance
from evertune.drift.windows import WindowDetector, reference_needed


class LSDD(WindowDetector):
    """Detects any change in the distribution of feature vectors by the squared difference of the two densities.

    The difference ``p - q`` of the densities of a window and of the reference is fitted directly, as a sum of Gaussian
    kernels, by regularised least squares; the statistic estimates the integral of ``(p - q) ** 2``, up to a factor
    (Sugiyama et al. 2013; on streams: Bu, Alippi & Zhao 2018). The width of the kernels is the median distance within
    the reference. Their centres are its first ``n_centers`` records, which are not used otherwise: a record that is
    itself a centre does not look like a new record, and would distort the threshold. Compared with
    :class:`~evertune.drift.MMD`, directions in which the kernels overlap have more weight.

    The guarantee is that of :class:`~evertune.drift.windows.WindowDetector`: false alarms occur once in ``arl``
    records, on average over references and streams.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = LSDD(arl=1_000, reference_size=256, window_size=32)
        >>> detector.update(torch.randn(512, 4, generator=generator))
        >>> detector.drift_detected
        False
        >>> detector.update(torch.randn(64, 4, generator=generator) + 1.0)  # the mean moves by one sigma
        >>> detector.detected_at
        544

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm. Default: 10,000.
        reference_size: Number of records in the reference, including the centres. Default: 512.
        window_size: Number of records in a test. Small windows react fast, large ones detect small changes. Default:
            32.
        block_size: Number of consecutive records that are resampled together. Records that are further apart should be
            independent. Default: 1.
        n_centers: Number of kernels; more of them can fit a finer difference. Default: 64.
        regularization: Value that is added to the diagonal of the kernels' overlaps (which are 1 there). A smaller
            value gives more weight to directions in which kernels hardly differ, where noise dominates. Default: 0.1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small for the false-alarm rate (the
            message names the size needed).
    """

    _kept: tuple[str, ...] = (*WindowDetector._kept, "_centers", "_weights", "_width")

    def __init__(
        self,
        arl: float = 10_000,
        *,
        reference_size: int = 512,
        window_size: int = 32,
        block_size: int = 1,
        n_centers: int = 64,
        regularization: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, value in (("n_centers", n_centers), ("regularization", regularization)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.n_centers, self.regularization = n_centers, regularization
        super().__init__(arl, reference_size, window_size, block_size, seed)
        needed = n_centers + reference_needed(self.level, window_size, block_size)
        if reference_size < needed:
            raise ValueError(
                f"a reference of {reference_size} records, of which {n_centers} are centres, is too small for "
                f"arl={self.arl:g} with window_size={window_size} and block_size={block_size}: reference_size must be "
                f"at least {needed}"
            )

    def _clear(self) -> None:
        super()._clear()
        self._width = math.nan
        self._centers = torch.empty(0)  # [n_centers, n_features]
        self._weights = torch.empty(0)  # [n_centers, n_centers]: the statistic is |h @ weights| ** 2

    def _arm(self, reference: Tensor, generator: torch.Generator) -> None:
        self._centers = reference[: self.n_centers].double()
        super()._arm(reference[self.n_centers :], generator)

    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        self._width = median_distance(reference)
        overlaps = (-torch.cdist(self._centers, self._centers).square() / (4 * self._width**2)).exp()
        values, vectors = torch.linalg.eigh(overlaps)
        # theta = (H + rI)^-1 h, and 2 theta'h - theta'H theta = h'M h, where M has the eigenvectors of H.
        values = values.clamp(min=0)
        self._weights = vectors * ((values + 2 * self.regularization).sqrt() / (values + self.regularization))

    def _map(self, records: Tensor) -> Tensor:
        """Kernels ``[records, n_centers]``, transformed so that the statistic is a squared distance."""
        # The direct computation: with a matrix product, a distance would depend slightly on the batch it is computed
        # in.
        distances = torch.cdist(records.double(), self._centers, compute_mode="donot_use_mm_for_euclid_dist")
        return (-distances.square() / (2 * self._width**2)).exp() @ self._weights
