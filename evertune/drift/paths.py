"""Simulates River's detectors of single numbers on many streams at once, to find their thresholds.

Each class repeats one detector of River step by step on arrays of streams; a test compares it with the original.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evertune.drift.calibration import resample, threshold_of_paths

Array = NDArray[np.float64]

_REFERENCES, _STREAMS = 64, 4  # number of resampled references, and of streams for each
_OWN_STREAMS = 64  # number of streams that follow the reference itself
_LENGTH = 3  # length of a stream in run lengths, as the probability of an alarm changes with time
_MOMENTS = 64  # moments at which alarms are checked for


class Paths(ABC):
    """The statistics of one detector on several streams in parallel."""

    @abstractmethod
    def feed(self, values: Array, largest: Array | None = None) -> None:
        """Process the next records, ``[records, streams]``.

        Args:
            values: Values as River's detector would be given them.
            largest: Largest statistic of each stream so far, ``[streams]``, which is updated in place. None while the
                detector is not yet armed.
        """


class PageHinkleyPaths(Paths):
    """The Page-Hinkley test in both directions without forgetting: sums of deviations above their lowest value."""

    def __init__(self, streams: int, delta: float) -> None:
        self._delta, self._n = delta, 0
        self._mean = np.zeros(streams)
        self._sums = np.zeros((2, streams))
        self._lowest = np.full((2, streams), np.inf)

    def feed(self, values: Array, largest: Array | None = None) -> None:
        for x in values:
            self._n += 1
            self._mean += (x - self._mean) / self._n
            self._sums += _both(x - self._mean)
            self._sums -= self._delta
            np.minimum(self._lowest, self._sums, out=self._lowest)
            if largest is not None:
                np.maximum(largest, (self._sums - self._lowest).max(0), out=largest)


class HoeffdingPaths(Paths):
    """HDDM_A: compares the mean of all records with that up to a cut; its statistic is the exponent in Hoeffding's
    bound."""

    def __init__(self, streams: int, cut_exponent: float) -> None:
        self._exponent, self._n = cut_exponent, 0
        self._mean = np.zeros(streams)
        self._bound = np.full((2, streams), np.inf)  # lowest upper bound of the mean so far, which sets the cut
        self._before = np.zeros((2, streams))  # mean up to the cut
        self._cut = np.ones((2, streams))  # records up to the cut

    def feed(self, values: Array, largest: Array | None = None) -> None:
        for x in values:
            self._n += 1
            self._mean += (x - self._mean) / self._n
            means = _both(self._mean)
            bound = means + math.sqrt(self._exponent / (2 * self._n))
            moved = self._bound >= bound
            np.copyto(self._bound, bound, where=moved)
            np.copyto(self._before, means, where=moved)
            np.copyto(self._cut, self._n, where=moved)
            if largest is not None:
                rise = np.maximum(means - self._before, 0)
                exponent = 2 * rise * rise * self._cut * self._n / np.maximum(self._n - self._cut, 1)
                np.maximum(largest, exponent.max(0), out=largest)


class AdaptiveWindowPaths(Paths):
    """ADWIN up to its first cut: until then, all its windows have the same buckets, with sizes that are powers of two.

    Its statistic is the negative logarithm of the largest ``delta`` that would not have cut.
    """

    def __init__(self, streams: int, clock: int, max_buckets: int, min_window_length: int) -> None:
        self._clock, self._max_buckets, self._min_length = clock, max_buckets, min_window_length
        self._n = 0
        self._rows: list[list[Array]] = [[]]  # totals of buckets of 1, 2, 4, ... records, the oldest first
        self._mean, self._squares = np.zeros(streams), np.zeros(streams)

    def feed(self, values: Array, largest: Array | None = None) -> None:
        for x in values:
            self._n += 1
            deviation = x - self._mean
            self._mean += deviation / self._n
            self._squares += deviation * (x - self._mean)
            self._insert(x)
            if largest is not None and self._n % self._clock == 0:
                np.maximum(largest, self._exponent(), out=largest)

    def _insert(self, total: Array) -> None:
        for row in self._rows:
            row.append(total)
            if len(row) <= self._max_buckets:
                return
            total = row.pop(0) + row.pop(0)
        self._rows.append([total])

    def _exponent(self) -> Array:
        sizes = np.concatenate([np.full(len(row), 2.0**i) for i, row in reversed(list(enumerate(self._rows)))])
        before = sizes.cumsum()[:-1, None]  # records before each possible cut
        possible = np.minimum(before, self._n - before)[:, 0] >= self._min_length
        sums = np.stack([total for row in reversed(self._rows) for total in row]).cumsum(0)[:-1][possible]
        before = before[possible]
        after = self._n - before
        difference = np.abs(sums / before - (self._mean * self._n - sums) / after)
        size = 1 / (before - self._min_length + 1) + 1 / (after - self._min_length + 1)
        spread = 2 * size * self._squares / self._n
        # A cut needs a difference above sqrt(spread * u^2) + 2/3 * size * u^2 with u^2 = log(2 log(n) / delta): this
        # quadratic equation is solved for u.
        root = (np.sqrt(spread + 8 / 3 * size * difference) - np.sqrt(spread)) / (4 / 3 * size)
        exponent: Array = np.square(root).max(0) - math.log(2 * math.log(self._n))
        return exponent


def _both(x: Array) -> Array:
    """The values for rises, and mirrored for falls, ``[2, streams]``."""
    return np.stack([x, -x])


def threshold_of_detector(
    reference: Tensor,
    paths: Callable[[int], Paths],
    transform: Callable[[Array], Array],
    arl: float,
    block_size: int,
    generator: torch.Generator,
) -> float:
    """The threshold that keeps a run length, for a detector that is given standardised records.

    References and streams are resampled from the reference, and each stream is standardised by its own resampled
    reference, as the real stream will be by the real one. If records are correlated, the statistics grow with the
    variance of sums, which a reference shows only approximately. They are therefore divided by its estimate
    (:func:`inflation`) from each resampled reference, so that the threshold accounts for the error of this estimate
    (the studentised bootstrap; Hall 1988). If most records are equal, streams after the reference itself must keep the
    run length, too.

    Args:
        reference: The reference, ``[records]``.
        paths: Function from a number of streams to the new :class:`Paths` that simulates the detector on them.
        transform: Function from standardised records to the values that the detector is given.
        arl: Mean number of records up to a false alarm.
        block_size: Number of consecutive records that are resampled together.
        generator: Source of all randomness.

    Returns:
        The threshold for the detector's statistic.
    """
    reference, n = reference.double(), len(reference)
    references = reference[resample(n, (_REFERENCES, n), block_size, generator)]
    length = math.ceil(_LENGTH * arl / _MOMENTS / block_size) * block_size
    times = length * torch.arange(1, math.ceil(_LENGTH * arl / length) + 1)

    def maxima(references: Tensor, streams: int) -> Tensor:
        """The largest statistic of each stream after each reference, up to each time, ``[times, streams,
        references]``."""
        centre, scale = standard(references)
        scale = torch.where(scale > 0, scale, standard(reference)[1])

        def values(records: Tensor) -> Any:
            standardised = (records - centre[:, None, None]) / scale[:, None, None]
            return transform(standardised.reshape(len(references) * streams, -1).T.contiguous().numpy())

        watched = paths(len(references) * streams)
        watched.feed(values(references[:, None].expand(-1, streams, -1)))
        largest, found = np.full(len(references) * streams, -np.inf), []
        for _ in times:
            positions = resample(n, (len(references), streams, length), block_size, generator)
            watched.feed(values(reference[positions]), largest)
            found.append(torch.from_numpy(largest.reshape(len(references), streams).T.copy()))
        return torch.stack(found)

    scores = maxima(references, _STREAMS) / inflation(references, block_size)
    threshold = threshold_of_paths(scores, times, arl) * inflation(reference, block_size).item()
    if reference.unique(return_counts=True)[1].max() > n / 2:
        # Statistics of rare events take few values, and half of the references have them above the threshold: the first
        # event after this one must not be an alarm.
        threshold = max(threshold, threshold_of_paths(maxima(reference[None], _OWN_STREAMS), times, arl))
    return threshold


def standard(records: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the last dimension; the latter is 1 if all records are equal."""
    scale = records.std(-1, correction=0)
    return records.mean(-1), torch.where(scale > 0, scale, 1.0)


def inflation(records: Tensor, block_size: int) -> Tensor:
    """The factor by which correlation of the records (last dimension) increases the variance of their sums.

    It is estimated from the means of all blocks, including those that wrap around to the beginning (1 for blocks of one
    record).

    Example:
        >>> inflation(torch.arange(8.0).repeat_interleave(4), block_size=4)
        tensor(3.6190)
    """
    if block_size == 1:
        return torch.ones(records.shape[:-1], dtype=records.dtype)
    n = records.shape[-1]
    sums = torch.cat([torch.zeros_like(records[..., :1]), records, records[..., : block_size - 1]], -1).cumsum(-1)
    means = (sums[..., block_size:] - sums[..., :-block_size]) / block_size
    variance = block_size * means.var(-1, correction=0) / (1 - block_size / n)
    scale = standard(records)[1]
    return torch.where(variance > 0, variance / scale.square(), 1.0)
