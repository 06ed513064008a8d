"""Maximum mean discrepancy with random Fourier features, calibrated by permuting its own reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from evertune.drift.detector import Detector

_COUNTERS = ("n_features", "n_seen", "n_tests", "detected_at", "drift_detected", "score", "threshold", "p_value")
_TENSORS = ("reference", "frequencies", "mean", "null", "window")
_MAX_PERMUTATIONS = 200_000
_MIN_WINDOWS = 4  # a shorter reference is too noisy a picture of the past, whatever the false-alarm rate


class MMD(Detector):
    """Detects any change in the distribution of feature vectors, at a stated rate of false alarms.

    The first ``reference_size`` records are the reference. From then on, each ``window_size`` records make one test:
    the squared maximum mean discrepancy between them and the reference (Gretton et al. 2012), in a Gaussian kernel
    whose width is the median distance within the reference, through random Fourier features (Rahimi & Recht 2007), so
    that only the reference's mean is kept and a record costs one small matrix product.

    The threshold comes from the reference alone: random windows of it are compared with the whole, and an alarm needs a
    p-value, (k + 1) / (n + 1), of at most ``window_size / arl``.

    **What is guaranteed, and what is not.** For records that are exchangeable (no trend, no correlation in time) a test
    raises a false alarm with probability ``window_size / arl``, on average over references: one false alarm in ``arl``
    records. Tests of one reference share its luck: some references alarm more often and others less, so that the mean
    run length over references is a little above ``arl`` (by 5 to 20% with the default sizes and Gaussian features).
    Records that are alike when they arrive together (batches sorted by length, an hour's news) alarm too often, unless
    ``block_size`` covers the stretch over which they are alike: whole blocks are permuted then.

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
        arl: average run length: how many records, on average, from one false alarm to the next.
        reference_size: records in the reference.
        window_size: records in a test. A change is found one to two windows after it; a larger window finds
            smaller changes.
        block_size: records permuted together, at least the stretch over which they are correlated. Must divide both
            sizes.
        n_frequencies: random frequencies; each gives two features (a cosine and a sine).
        seed: of the frequencies and the permutations.

    Raises:
        ValueError: for a setting out of its range, or a reference too small for the false-alarm rate (the size needed
            is named).
    """

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
        self._config: dict[str, float] = {
            "arl": float(arl),
            "reference_size": reference_size,
            "window_size": window_size,
            "block_size": block_size,
            "n_frequencies": n_frequencies,
            "seed": seed,
        }
        for name in ("reference_size", "window_size", "block_size", "n_frequencies"):
            if self._config[name] < 1:
                raise ValueError(f"{name} must be positive, got {self._config[name]}")
        if reference_size % block_size or window_size % block_size:
            raise ValueError(
                f"block_size must divide reference_size and window_size, got {block_size} for {reference_size} and "
                f"{window_size}"
            )
        self.level = window_size / arl if arl > 0 else math.inf
        """The probability of a false alarm in one test."""
        if not 1 / _MAX_PERMUTATIONS <= self.level < 1:
            raise ValueError(
                f"arl must be above window_size={window_size} and at most {window_size * _MAX_PERMUTATIONS}, "
                f"got {arl:g}"
            )
        needed = _reference_needed(self.level, window_size, block_size)
        if reference_size < needed:
            raise ValueError(
                f"a reference of {reference_size} records is too small for arl={arl:g} with window_size={window_size} "
                f"and block_size={block_size}: reference_size must be at least {needed}"
            )
        self.reference_size, self.window_size, self.block_size = reference_size, window_size, block_size
        self.n_frequencies, self.seed = n_frequencies, seed
        super().__init__()

    @property
    def armed(self) -> bool:
        """Whether the reference is complete, so that records are tested."""
        return self._null.numel() > 0

    def _clear(self) -> None:
        self._reference = torch.empty(0)  # [records, n_features] until armed
        self._frequencies = torch.empty(0)  # [n_features, n_frequencies]
        self._mean = torch.empty(0)  # of the reference, in the space of the kernel
        self._null = torch.empty(0)  # statistics of permuted windows, ascending
        self._window = torch.empty(0)  # sum over the records of the window begun
        self._filled = 0  # records in it

    def _observe(self, records: Tensor) -> None:
        if not self.armed:
            missing = self.reference_size - self.n_seen
            taken, records = records[:missing], records[missing:]
            self._reference = torch.cat([self._reference, taken]) if self.n_seen else taken.clone()
            self.n_seen += len(taken)
            if self.n_seen == self.reference_size:
                self._arm()
        while len(records):
            missing = self.window_size - self._filled
            taken, records = records[:missing], records[missing:]
            self._window += self._map(taken).sum(0)
            self.n_seen += len(taken)
            self._filled += len(taken)
            if self._filled == self.window_size:
                score = (self._window / self.window_size - self._mean).square().sum()
                self._window, self._filled = torch.zeros_like(self._mean), 0
                n_null = len(self._null)
                n_as_large = n_null - int(torch.searchsorted(self._null, score))
                self._test(score.item(), (n_as_large + 1) / (n_null + 1))

    def _arm(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(self._reference.shape[1], self.n_frequencies, generator=generator)
        self._frequencies = normal.double() / _median_distance(self._reference)
        mapped = self._map(self._reference)
        self._mean = mapped.mean(0)
        self._window = torch.zeros_like(self._mean)
        self._null = self._permuted(mapped, generator)
        rank = math.floor(self.level * (len(self._null) + 1))  # p <= level: fewer than this many are as large
        self.threshold = self._null[-rank].item()
        self._reference = torch.empty(0)

    def _map(self, records: Tensor) -> Tensor:
        """Random Fourier features ``[records, 2 * n_frequencies]``: their dot product approximates the kernel.

        In float64, so that how the records are cut into batches shows far below any difference between scores.
        """
        angles = records.double() @ self._frequencies
        return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(self.n_frequencies)

    def _permuted(self, mapped: Tensor, generator: torch.Generator) -> Tensor:
        """The statistic of random windows of the reference against the rest of it, ascending."""
        n, w = self.reference_size, self.window_size
        blocks = mapped.reshape(n // self.block_size, self.block_size, -1).mean(1) - self._mean
        n_permutations = min(max(1_000, math.ceil(25 / self.level)), _MAX_PERMUTATIONS)
        statistics = []
        for start in range(0, n_permutations, 1_000):
            size = min(1_000, n_permutations - start)
            order = torch.rand(size, len(blocks), generator=generator).topk(w // self.block_size, 1).indices
            statistics.append(embedding_bag(order, blocks, mode="mean").square().sum(1))
        # A window drawn from the reference differs from its mean by less than a new window does: the variance is
        # (1/w - 1/n) instead of (1/w + 1/n).
        return (torch.cat(statistics) * ((n + w) / (n - w))).sort().values

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in mid-stream: tensors, numbers and strings only."""
        tensors = {name: getattr(self, f"_{name}").clone() for name in _TENSORS}
        return {"config": dict(self._config), **{name: getattr(self, name) for name in _COUNTERS}, **tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`: no later decision differs.

        Raises:
            ValueError: when the state was saved by a detector with other settings.
        """
        for name, value in self._config.items():
            if state_dict["config"].get(name) != value:
                raise ValueError(f"the state was saved with {name}={state_dict['config'].get(name)}, this has {value}")
        for name in _COUNTERS:
            setattr(self, name, state_dict[name])
        for name in _TENSORS:
            setattr(self, f"_{name}", state_dict[name].clone())
        self._filled = 0 if not self.armed else (self.n_seen - self.reference_size) % self.window_size


def _reference_needed(level: float, window_size: int, block_size: int) -> int:
    """The smallest reference with enough different windows to tell a p-value of ``level``, and windows enough."""
    in_window = window_size // block_size
    n_blocks = math.ceil(_MIN_WINDOWS * in_window)
    while math.comb(n_blocks, in_window) + 1 < 1 / level:
        n_blocks += 1
    return n_blocks * block_size


def _median_distance(records: Tensor) -> float:
    """The median distance between two different records of at most 1,000; 1 when all are equal."""
    distances = torch.nn.functional.pdist(records[:1_000])
    distances = distances[distances > 0]
    return distances.median().item() if len(distances) else 1.0
