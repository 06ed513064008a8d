"""A detector based on the maximum mean discrepancy with random Fourier features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evertune.drift.windows import WindowDetector


class MMD(WindowDetector):
    """Detects any change in the distribution of feature vectors, at a stated rate of false alarms.

    The first ``reference_size`` records are the reference. From then on, every ``window_size`` records are tested by
    the squared maximum mean discrepancy between them and the reference (Gretton et al. 2012), with a Gaussian kernel
    whose width is the median distance within the reference. The kernel is approximated by random Fourier features
    (Rahimi & Recht 2007), so that only the reference's mean is kept and a record costs one small matrix product.

    **What is guaranteed, and what is not.** False alarms occur once in ``arl`` records, on average over references and
    streams (see :class:`~evertune.drift.windows.WindowDetector`). All tests share one reference: by chance, some
    references cause more alarms and others fewer; a larger reference reduces this variation. Records that are similar
    if they arrive together (batches sorted by length, an hour's news) cause too many alarms, unless ``block_size``
    covers the stretch over which they are similar, so that whole blocks are resampled.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = MMD(arl=10_000, reference_size=256, window_size=32)
        >>> detector.update(torch.randn(1_000, 4, generator=generator))
        >>> detector.armed, detector.drift_detected
        (True, False)
        >>> for record in torch.randn(200, 4, generator=generator) + 1.0:  # the mean moves by one sigma
        ...     detector.update(record)
        ...     if detector.drift_detected:
        ...         break
        >>> detector.detected_at
        1024

    Args:
        arl: Average run length: the mean number of records from one false alarm to the next. Default: 10,000.
        reference_size: Number of records in the reference. Default: 256.
        window_size: Number of records in a test. A change is detected one to two windows after it; a larger window
            detects smaller changes. Default: 32.
        block_size: Number of consecutive records that are resampled together: several times the stretch over which they
            are correlated. Must divide both sizes. Default: 1, for independent records.
        n_frequencies: Number of random frequencies; each gives two features, a cosine and a sine. Default: 128.
        seed: Seed of the frequencies and the resampling.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small for the false-alarm rate (the
            message names the size needed).
    """

    _kept = (*WindowDetector._kept, "_frequencies")

    def __init__(
        self,
        arl: float = 10_000,
        *,
        reference_size: int = 256,
        window_size: int = 32,
        block_size: int = 1,
        n_frequencies: int = 128,
        seed: int = 0,
    ) -> None:
        if n_frequencies < 1:
            raise ValueError(f"n_frequencies must be positive, got {n_frequencies}")
        self.n_frequencies = n_frequencies
        super().__init__(arl, reference_size, window_size, block_size, seed)

    def _clear(self) -> None:
        super()._clear()
        self._frequencies = torch.empty(0)  # [n_features, n_frequencies]

    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        self._frequencies = frequencies_for(reference, self.n_frequencies, generator)

    def _map(self, records: Tensor) -> Tensor:
        return fourier_features(records, self._frequencies)


def frequencies_for(reference: Tensor, n_frequencies: int, generator: torch.Generator) -> Tensor:
    """Random frequencies, ``[n_features, n_frequencies]``, of a Gaussian kernel as wide as the median distance."""
    normal = torch.randn(reference.shape[1], n_frequencies, generator=generator)
    return normal.double() / median_distance(reference)


def fourier_features(records: Tensor, frequencies: Tensor) -> Tensor:
    """Random Fourier features, ``[records, 2 * n_frequencies]``, whose dot product approximates the kernel."""
    angles = records.double() @ frequencies
    return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(frequencies.shape[1])


def median_distance(records: Tensor) -> float:
    """The median distance between different records, of at most the first 1,000.

    If all records are equal up to rounding, their length, or 1 if that is 0.
    """
    records = records[:1_000].double()
    unit = records.abs().max().item() or 1.0  # squares of very large and very small features cannot be represented
    records = records / unit
    length = records.norm(dim=1).max().item()
    distances = torch.nn.functional.pdist(records)
    distances = distances[distances > 1e-6 * length]
    return (distances.median().item() if len(distances) else length or 1.0) * unit
