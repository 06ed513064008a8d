"""Layout of line charts. Positions are in percent of the plot, so that the page can stretch it without its text.

``x`` runs from left to right and ``y`` from top to bottom, both from 0 to 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MAX_POINTS = 400
"""Points drawn of a long series, approximately. The lowest and highest of each stretch are kept: no peak is lost."""


@dataclass
class Line:
    """A line of a chart.

    Args:
        segments: The ``points`` of an SVG polyline for each segment. A line breaks where a value is missing.
        color: CSS colour.
        dashed: Whether the line is dashed.
    """

    segments: list[str]
    color: str
    dashed: bool = False


@dataclass
class Mark:
    """A dot, tick or label in the plot.

    Args:
        x: Position from the left, in percent.
        y: Position from the top, in percent.
        text: What is shown there: a tick's number, a label, or the tooltip of a dot.
        color: CSS colour; empty for that of the page.
        name: Second part of a label: the name of the line that it ends, or of a tick where there is room.
    """

    x: float
    y: float
    text: str
    color: str = ""
    name: str = ""


@dataclass
class Chart:
    """Everything that one chart draws.

    Args:
        summary: The content in words, for screen readers.
        lines: Lines, drawn first.
        dots: Dots with a tooltip.
        alarms: Dots that are marked as alarms, each with a vertical rule.
        x_ticks: Ticks of the horizontal axis.
        y_ticks: Ticks of the vertical axis, each with a grid line.
        ends: Labels at the right end of the lines.
    """

    summary: str
    lines: list[Line] = field(default_factory=list)
    dots: list[Mark] = field(default_factory=list)
    alarms: list[Mark] = field(default_factory=list)
    x_ticks: list[Mark] = field(default_factory=list)
    y_ticks: list[Mark] = field(default_factory=list)
    ends: list[Mark] = field(default_factory=list)


@dataclass
class Axis:
    """A linear scale from data to positions.

    Args:
        low: Value that is placed at ``start``.
        high: Value that is placed at ``stop``.
        start: Position of ``low``, in percent.
        stop: Position of ``high``, in percent; less than ``start`` for an axis that runs upwards.
    """

    low: float
    high: float
    start: float = 0.0
    stop: float = 100.0

    def __call__(self, value: float) -> float:
        """The position of a value.

        Example:
            >>> Axis(0, 1, start=100, stop=0)(0.25)
            75.0
        """
        # An axis without extent, as of a single point, places everything in the middle.
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
    """Round numbers from 0 to at most ``high``, in about ``count`` steps.

    Example:
        >>> ticks(0.9), ticks(130)
        ([0.0, 0.2, 0.4, 0.6, 0.8], [0.0, 50.0, 100.0])
    """
    if high <= 0:
        return [0.0]
    magnitude = 10.0 ** math.floor(math.log10(high / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * count >= 0.8 * high)
    # The factor and the rounding undo floating-point errors: 0.6 / 0.2 is less than 3, and 3 * 0.2 more than 0.6.
    return [round(i * step, 12) for i in range(int(high / step * 1.000001) + 1)]


def thin(length: int, count: int) -> list[int]:
    """At most ``count`` evenly spaced indices, starting with 0.

    Args:
        length: Number of values to choose from.
        count: Maximum number of indices.

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
    """Positions moved apart by at least ``gap``, so that labels do not overlap. They stay within 0 to 100 if they fit.

    Args:
        places: Positions in percent, in any order.
        gap: Minimum distance in percent.

    Returns:
        The new positions, in the order of ``places``.

    Example:
        >>> spread([50.0, 52.0, 10.0], gap=10)
        [50.0, 60.0, 10.0]
        >>> spread([99.0, 98.0], gap=10)
        [100.0, 90.0]
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    # Downwards first, which may push the last ones beyond 100, then back up from there.
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    limit = 100.0
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved
