"""From which value on a reading alarms: a fixed one, or one that follows the readings before it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean


class Threshold(ABC):
    """A limit for the next reading, given those before it. A subclass writes :meth:`limit`.

    Stateless: the caller keeps the readings, or computes them again from the records, so that a restarted process
    decides as the one before it.

    Args:
        window: how many readings it looks back on.

    Raises:
        ValueError: when it is not positive.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be positive, got {window}")
        self.window = window

    @abstractmethod
    def limit(self, readings: Sequence[float]) -> float | None:
        """The limit, above which a reading alarms; None while there are too few readings to say.

        Args:
            readings: those before the one in question, oldest first.
        """


class Static(Threshold):
    """A fixed limit.

    Example:
        >>> Static(0.05).limit([])
        0.05

    Args:
        value: the limit.

    Raises:
        ValueError: when it is not finite.
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
    """A quantile of the last readings: what is unusual here, whatever the scale.

    While nothing changes, a reading is above it in about a share ``1 - q`` of cases. A change that comes slowly enough
    moves the limit along with it; combine it with a :class:`Static` one where that matters.

    Example:
        >>> Quantile(0.9, window=5).limit([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        4.6

    Args:
        q: which, between 0 and 1; interpolated between readings.
        window: Number of latest readings that are required.

    Raises:
        ValueError: when a number is out of its range.
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
    """The mean of the last readings, times a factor, plus a distance.

    Example:
        >>> RollingAverage(delta=0.25, window=2).limit([9.0, 0.5, 1.0])
        1.0

    Args:
        factor: for readings that are never negative, such as a detector's score: 2.0 is twice the mean.
        delta: for readings around zero, such as a loss of accuracy: 0.05 is five points above the mean.
        window: Number of latest readings that are required.

    Raises:
        ValueError: when the two leave the mean itself as the limit, which half of all readings are above, or less.
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
