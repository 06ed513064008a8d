"""Thresholds for a stated average run length, calibrated from a reference alone.

A run starts when a detector is armed and ends with an alarm, while nothing has changed. Its length is random for two
reasons: the records to come are random, and so is the reference, which is one of many samples that the user might have
had. Both are simulated: the reference is resampled to make other references and other streams (the bootstrap; Efron
1979), and the threshold is chosen so that the mean run length over both is the requested one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def resample(n: int, shape: tuple[int, ...], block_size: int, generator: torch.Generator) -> Tensor:
    """Positions in a reference of ``n`` records, drawn with replacement in blocks of consecutive ones.

    The circular block bootstrap (Politis & Romano 1992): blocks preserve the correlation of records that are close in
    time, and the reference is treated as a ring, so that every record is drawn equally often.

    Args:
        n: Number of records in the reference.
        shape: Shape of the result; the last dimension is time.
        block_size: Number of consecutive records that are drawn together; 1 for independent records.
        generator: Source of all randomness.

    Returns:
        Integers below ``n``, of the given shape.

    Example:
        >>> resample(10, (2, 6), 3, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 6])
    """
    *leading, length = shape
    starts = torch.randint(n, (*leading, math.ceil(length / block_size), 1), generator=generator)
    positions = (starts + torch.arange(block_size)) % n
    return positions.flatten(-2)[..., :length]


def resample_windows(n: int, count: int, window_size: int, block_size: int, generator: torch.Generator) -> Tensor:
    """Positions of windows of a reference of ``n`` records, with no record twice in a window.

    New records seldom repeat, so that a window which contains the same record twice would be too far from the others;
    with many features, where all records are about equally far from each other, much too far. The blocks of the
    reference are therefore shuffled and dealt to as many windows as they fill, repeatedly.

    A window of ``w`` records without repetition is closer to the mean of the reference than a window of new records, by
    a factor of ``sqrt(1 - w / n)`` (the finite population correction): see :func:`apart`.

    Args:
        n: Number of records in the reference.
        count: Number of windows.
        window_size: Number of records in a window: a multiple of ``block_size``, and at most half of ``n``.
        block_size: Number of consecutive records that are drawn together; the start of the first block is random, too.
        generator: Source of all randomness.

    Returns:
        Integers below ``n``, ``[count, window_size]``.

    Example:
        >>> windows = resample_windows(8, 4, 4, 2, torch.Generator().manual_seed(0))
        >>> windows.shape, [len(set(window)) for window in windows.tolist()]
        (torch.Size([4, 4]), [4, 4, 4, 4])
    """
    in_window = window_size // block_size
    per_deal = n // block_size // in_window
    deals = math.ceil(count / per_deal)
    blocks = torch.rand(deals, n // block_size, generator=generator).argsort(1)[:, : per_deal * in_window]
    starts = blocks * block_size + torch.randint(n, (deals, 1), generator=generator)
    positions = (starts.unsqueeze(-1) + torch.arange(block_size)) % n
    return positions.reshape(deals * per_deal, window_size)[:count]


def apart(n: int, window_size: int) -> float:
    """The factor that corrects the distance of a resampled window from the mean of the reference to that of a window of
    new records; see :func:`resample_windows`."""
    return math.sqrt(n / (n - window_size))


def threshold_of_tests(scores: Tensor, run_length: float) -> float:
    """The threshold for tests that are independent of each other, given the reference.

    With a probability ``p`` of an alarm in each test, the mean run length is ``1 / p`` tests; it is averaged over
    references. Of ``n`` scores of which ``k`` are above a threshold, ``(n + 1) / (k + 1)`` estimates ``1 / p`` without
    bias where alarms are rare.

    Args:
        scores: Scores of resampled tests against resampled references, ``[tests, references]``.
        run_length: Mean number of tests up to a false alarm.

    Returns:
        The smallest score that keeps the run length, if scores above it are alarms.

    Raises:
        ValueError: If there are too few tests to estimate such a rate.
    """
    n, references = scores.shape
    # Only the tail matters: ten times the expected number of alarms is kept, which saves sorting all scores.
    largest = scores.topk(min(n, math.ceil(10 * n / run_length)), 0).values
    ordered = largest.flip(0).T.contiguous()  # [references, tests], ascending

    def mean_run_length(threshold: Tensor) -> float:
        above = ordered.shape[1] - torch.searchsorted(ordered, threshold.repeat(references, 1), right=True)
        return ((n + 1) / (above + 1)).double().mean().item()

    return _smallest(ordered, mean_run_length, run_length)


def threshold_of_paths(maxima: Tensor, times: Tensor, run_length: float) -> float:
    """The threshold for scores that follow each other in time, from simulated paths.

    Runs that are longer than the paths are censored: the mean run length of a reference is the total time watched,
    divided by the number of alarms. (If run lengths are exponentially distributed, as those of rare alarms are, this is
    the maximum likelihood estimate; counting one more alarm removes its bias.)

    Args:
        maxima: Largest score of each path up to each moment, ``[moments, paths, references]``.
        times: Length of a path at each moment, in records, ascending, ``[moments]``.
        run_length: Mean number of records up to a false alarm.

    Returns:
        The smallest of the final maxima that keeps the run length, if scores above it are alarms.

    Raises:
        ValueError: If the paths are too few or too short to estimate such a rate.
    """
    moments, paths, _ = maxima.shape
    before = torch.cat([torch.zeros(1), times.double()])
    middle = torch.cat([(before[1:] + before[:-1]) / 2, before[-1:]])  # when a path was first above, or its end

    def mean_run_length(threshold: Tensor) -> float:
        quiet = (maxima <= threshold).sum(0)  # moments without an alarm, [paths, references]
        watched, alarms = middle[quiet].sum(0), (quiet < moments).sum(0)
        return (watched / (alarms + 1)).mean().item() * (paths + 1) / paths

    return _smallest(maxima[-1], mean_run_length, run_length)


def _smallest(scores: Tensor, mean_run_length: Callable[[Tensor], float], asked: float) -> float:
    candidates = scores.flatten().unique()
    low, high = 0, len(candidates) - 1
    longest = mean_run_length(candidates[high])
    if longest < asked:
        raise ValueError(
            f"{scores.shape[0]} resampled runs can calibrate run lengths up to {longest:.3g}, not {asked:.3g}"
        )
    # The mean run length grows with the threshold, so that a binary search finds the smallest one.
    while low < high:
        middle = (low + high) // 2
        if mean_run_length(candidates[middle]) >= asked:
            high = middle
        else:
            low = middle + 1
    return float(candidates[low])
