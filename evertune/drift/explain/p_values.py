"""The p-values that are needed to explain a change."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray


def normal(z: float) -> float:
    """The two-sided p-value of a standard normal variable.

    Example:
        >>> round(normal(1.96), 3)
        0.05
    """
    return math.erfc(abs(z) / math.sqrt(2))


def chi_squared(statistic: float, degrees: int) -> float:
    """The p-value of a chi-squared variable with this many degrees of freedom.

    Example:
        >>> round(chi_squared(5.991, 2), 3)
        0.05
    """
    of = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(of[0], of[1]))


def kolmogorov_smirnov(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
    """The largest distance between the distribution functions of two samples, and its asymptotic p-value.

    The p-value has Stephens' correction (1970) for small samples; ties make it conservative.

    Example:
        >>> distance, p_value = kolmogorov_smirnov(np.arange(100.0), np.arange(100.0) + 20)
        >>> round(distance, 2), round(p_value, 3)
        (0.2, 0.031)
    """
    places = np.concatenate([before, after])
    shares = [np.searchsorted(np.sort(side), places, side="right") / len(side) for side in (before, after)]
    distance = float(np.abs(shares[0] - shares[1]).max())
    root = math.sqrt(len(before) * len(after) / (len(before) + len(after)))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.2:  # the series converges slowly there, to 1
        return distance, 1.0
    total = sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return distance, min(max(2 * total, 0.0), 1.0)


def two_shares(before: int, n_before: int, after: int, n_after: int) -> float:
    """The z-score of the change of a share, from ``before`` of ``n_before`` to ``after`` of ``n_after``.

    Example:
        >>> round(two_shares(10, 100, 30, 100), 2)
        3.54
    """
    pooled = (before + after) / (n_before + n_after)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / n_before + 1 / n_after))
    return (after / n_after - before / n_before) / spread if spread else 0.0
