"""Limits above which a reading raises an alarm: fixed ones, and ones that follow earlier readings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean


class Threshold(ABC):
    """A limit for the next reading, given the earlier ones. A subclass implements :meth:`limit`.

    Stateless: the caller keeps the readings, or recomputes them from the records, so that a restarted process decides
    like the one before it.

    Args:
        window: Number of earlier readings that the limit depends on.

    Raises:
        ValueError: If ``window`` is not positive.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be positive, got {window}")
        self.window = window

    @abstractmethod
    def limit(self, readings: Sequence[float]) -> float | None:
        """The limit above which a reading raises an alarm; None while there are too few readings.

        Args:
            readings: The readings before the one to be judged, oldest first.
        """


class Static(Threshold):
    """A fixed limit.

    Example:
        >>> Static(0.05).limit([])
        0.05

    Args:
        value: The limit.

    Raises:
        ValueError: If ``value`` is not finite.
    """

    def __init__(self, value: float) -> None:
        super().__init__(window=1)
        if not math.isfinite(value):
            raise ValueError(f"value must be finite, got {value}")
        self.value = value
        self.window = 0

    def limit(self, readings: Sequence[float]) -> float | None:
        return self.value


class Quantile(Threshold):
    """A quantile of the latest readings: what is unusual for this stream, whatever the scale.

    While nothing changes, about a share ``1 - q`` of the readings exceed it. A change that is slow enough moves the
    limit along with it; where that matters, combine it with a :class:`Static` limit.

    Example:
        >>> Quantile(0.9, window=5).limit([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        4.6

    Args:
        q: The quantile, above 0 and at most 1, interpolated between readings. Default: 0.95.
        window: Number of latest readings that are required. Default: 20.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, q: float = 0.95, window: int = 20) -> None:
        super().__init__(window)
        if not 0 < q <= 1:
            raise ValueError(f"q must be above 0 and at most 1, got {q}")
        self.q = q

    def limit(self, readings: Sequence[float]) -> float | None:
        if len(readings) < self.window:
            return None
        ordered = sorted(readings[-self.window :])
        place = self.q * (self.window - 1)
        low = math.floor(place)
        high = min(low + 1, self.window - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class RollingAverage(Threshold):
    """The mean of the latest readings, times a factor, plus a margin.

    Example:
        >>> RollingAverage(delta=0.25, window=2).limit([9.0, 0.5, 1.0])
        1.0

    Args:
        factor: Factor for readings that are never negative, such as a detector's score: 2.0 is twice the mean. Default:
            1.0.
        delta: Margin for readings around zero, such as a loss of accuracy: 0.05 is five points above the mean. Default:
            0.0.
        window: Number of latest readings that are required. Default: 10.

    Raises:
        ValueError: If the limit would be the mean itself, which half of all readings exceed, or less.
    """

    def __init__(self, factor: float = 1.0, delta: float = 0.0, window: int = 10) -> None:
        super().__init__(window)
        if not (factor >= 1 and delta >= 0 and factor + delta > 1 and math.isfinite(factor + delta)):
            raise ValueError(
                "factor must be at least 1 and delta at least 0, and one of them more than that, "
                f"got factor={factor} and delta={delta}"
            )
        self.factor, self.delta = factor, delta

    def limit(self, readings: Sequence[float]) -> float | None:
        if len(readings) < self.window:
            return None
        return self.factor * fmean(readings[-self.window :]) + self.delta
