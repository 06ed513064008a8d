"""Where the marks of a line chart go, in percent of the plot: the page stretches it to any width, its text does not.

``x`` runs from left to right and ``y`` from top to bottom, both from 0 to 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MAX_POINTS = 400
"""Points drawn of a long series; the lowest and highest of each stretch are kept, so that no peak is lost."""


@dataclass
class Line:
    """A line in several segments (it breaks where a value is missing), each the ``points`` of an SVG polyline."""

    segments: list[str]
    color: str
    dashed: bool = False


@dataclass
class Mark:
    """A dot, tick or label at a place in the plot."""

    x: float
    y: float
    text: str
    color: str = ""
    name: str = ""


@dataclass
class Chart:
    """Everything one chart draws; ``summary`` says it in words."""

    summary: str
    lines: list[Line] = field(default_factory=list)
    dots: list[Mark] = field(default_factory=list)
    alarms: list[Mark] = field(default_factory=list)
    x_ticks: list[Mark] = field(default_factory=list)
    y_ticks: list[Mark] = field(default_factory=list)
    ends: list[Mark] = field(default_factory=list)


@dataclass
class Axis:
    """A linear scale from data to percent."""

    low: float
    high: float
    start: float = 0.0
    stop: float = 100.0

    def __call__(self, value: float) -> float:
        """Where a value goes.

        Example:
            >>> Axis(0, 1, start=100, stop=0)(0.25)
            75.0
        """
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.stop - self.start), 2)


def polyline(xs: Sequence[float], ys: Sequence[float]) -> list[str]:
    """The points of an SVG polyline, broken where ``y`` is NaN.

    Example:
        >>> polyline([0, 50, 75, 100], [10, 20, float("nan"), 40])
        ['0,10 50,20', '100,40']
    """
    segments: list[list[str]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isnan(y):
            segments.append([])
        else:
            segments[-1].append(f"{x:g},{y:g}")
    return [" ".join(segment) for segment in segments if segment]


def ticks(high: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at most ``high``, about ``count`` steps.

    Example:
        >>> ticks(0.9), ticks(130)
        ([0.0, 0.2, 0.4, 0.6, 0.8], [0.0, 50.0, 100.0])
    """
    if high <= 0:
        return [0.0]
    magnitude = 10.0 ** math.floor(math.log10(high / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * count >= 0.8 * high)
    return [round(i * step, 12) for i in range(int(high / step * 1.000001) + 1)]


def thin(length: int, count: int) -> list[int]:
    """At most ``count`` indices, evenly spaced, the first among them.

    Example:
        >>> thin(3, 10), thin(20, 10)
        ([0, 1, 2], [0, 2, 4, 6, 8, 10, 12, 14, 16, 18])
    """
    return list(range(0, length, math.ceil(length / count))) if length else []


def keep_peaks(values: Sequence[float]) -> list[int]:
    """Indices of at most about ``MAX_POINTS`` values: the lowest and the highest of each stretch, first and last.

    Example:
        >>> keep_peaks([1.0, 5.0, 2.0])
        [0, 1, 2]
        >>> kept = keep_peaks([0.0] * 5_000 + [9.0] + [0.0] * 5_000)
        >>> 5_000 in kept, len(kept) <= MAX_POINTS + 2
        (True, True)
    """
    length = len(values)
    if length <= MAX_POINTS:
        return list(range(length))
    width = math.ceil(length / (MAX_POINTS // 2))
    kept = {0, length - 1}
    for start in range(0, length, width):
        stretch = range(start, min(start + width, length))
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved apart to at least ``gap``, within 0 and 100 while they fit, in the order given.

    Example:
        >>> spread([50.0, 52.0, 10.0], gap=10)
        [50.0, 60.0, 10.0]
        >>> spread([99.0, 98.0], gap=10)
        [100.0, 90.0]
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    limit = 100.0
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved
