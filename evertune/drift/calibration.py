"""Thresholds that keep a stated average run length, found from a reference alone.

A run starts when a detector is armed and ends with an alarm, while nothing has changed. Its length has two sources of
chance: the records to come, and the reference, which is one sample of many that the user might have had. Both are
imitated: the reference is resampled to make other references and other streams (the bootstrap; Efron 1979), and the
threshold is chosen so that the mean run length over both is the one asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def resample(n: int, shape: tuple[int, ...], block_size: int, generator: torch.Generator) -> Tensor:
    """Positions in a reference of ``n`` records, drawn with replacement in blocks of consecutive ones.

    The circular block bootstrap (Politis & Romano 1992): blocks keep the correlation of records that are near in time,
    and the reference is a ring, so that every record is drawn as often.

    Args:
        n: records in the reference.
        shape: of the result; the last dimension is time.
        block_size: records that are drawn together; 1 for records that are independent.
        generator: what is drawn depends on nothing else.

    Returns:
        Integers below ``n`` of the shape asked for.

    Example:
        >>> resample(10, (2, 6), 3, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 6])
    """
    *leading, length = shape
    starts = torch.randint(n, (*leading, math.ceil(length / block_size), 1), generator=generator)
    positions = (starts + torch.arange(block_size)) % n
    return positions.flatten(-2)[..., :length]


def resample_windows(n: int, count: int, window_size: int, block_size: int, generator: torch.Generator) -> Tensor:
    """Positions of windows of a reference of ``n`` records, none twice in a window.

    New records seldom repeat, so a window that holds the same one twice would be too far from the others: with many
    features, where all records are about equally far from each other, by much. The blocks of the reference are shuffled
    and dealt to as many windows as they fill, again and again.

    A window of ``w`` records without repetition is nearer to the mean of all than a new one, by a factor of
    ``sqrt(1 - w / n)`` (the finite population correction): see :func:`apart`.

    Args:
        n: records in the reference.
        count: windows.
        window_size: a multiple of ``block_size``, and at most half of ``n``.
        block_size: records that are drawn together; where the first block starts is drawn, too.
        generator: what is drawn depends on nothing else.

    Returns:
        Integers below ``n``: ``[count, window_size]``.

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
    """What the distance of a resampled window from the mean of the reference has to be multiplied by to be that of a
    new one; see :func:`resample_windows`."""
    return math.sqrt(n / (n - window_size))


def threshold_of_tests(scores: Tensor, run_length: float) -> float:
    """The threshold for tests that are independent of each other, given the reference.

    With a probability ``p`` of an alarm in each test, the mean run length is ``1 / p`` tests; it is averaged over
    references. Of ``n`` scores of which ``k`` are above a threshold, ``(n + 1) / (k + 1)`` estimates ``1 / p`` without
    bias where alarms are rare.

    Args:
        scores: ``[tests, references]``, of resampled tests against resampled references.
        run_length: the mean number of tests up to a false alarm.

    Returns:
        The smallest of the scores that keeps the run length, where alarms are scores above it.

    Raises:
        ValueError: when there are too few tests to tell such a rate.
    """
    n, references = scores.shape
    largest = scores.topk(min(n, math.ceil(10 * n / run_length)), 0).values
    ordered = largest.flip(0).T.contiguous()  # [references, tests], ascending

    def mean_run_length(threshold: Tensor) -> float:
        above = ordered.shape[1] - torch.searchsorted(ordered, threshold.repeat(references, 1), right=True)
        return ((n + 1) / (above + 1)).double().mean().item()

    return _smallest(ordered, mean_run_length, run_length)


def threshold_of_paths(maxima: Tensor, times: Tensor, run_length: float) -> float:
    """The threshold for scores that follow each other in time, from paths of them.

    Runs that are longer than the paths are counted by the time that they lasted: the mean run length of a reference is
    the time watched, divided by the number of alarms. (Of run lengths that are exponentially distributed, as those of
    rare alarms are, that is the maximum likelihood estimate; with one alarm more, its bias is removed.)

    Args:
        maxima: ``[moments, paths, references]``: the largest score of each path up to each moment.
        times: ``[moments]``: how long a path has lasted at each moment, in records; ascending.
        run_length: the mean number of records up to a false alarm.

    Returns:
        The smallest of the last maxima that keeps the run length, where alarms are scores above it.

    Raises:
        ValueError: when the paths are too few or too short to tell such a rate.
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
    while low < high:
        middle = (low + high) // 2
        if mean_run_length(candidates[middle]) >= asked:
            high = middle
        else:
            low = middle + 1
    return float(candidates[low])
