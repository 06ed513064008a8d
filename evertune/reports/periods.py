"""Ways to keep a model, compared over periods such as weeks, as one self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from evertune.reports.chart import Axis, Chart, Line, Mark, polyline, spread, thin
from evertune.reports.page import fill
from evertune.reports.summary import percent

_SHORT = 12  # characters


@dataclass(frozen=True)
class Way:
    """One way to keep a model.

    Args:
        name: Its name.
        about: What it does, in half a sentence.
        scores: By the name of a measure, its value in [0, 1] for each period.
        seconds: How long its training took in all.
    """

    name: str
    about: str
    scores: Mapping[str, Sequence[float]]
    seconds: float

    def mean(self, measure: str) -> float:
        """The mean of a measure over the periods."""
        return fmean(self.scores[measure])


@dataclass(frozen=True)
class Part:
    """A further section of the page: lines over the periods, a table, or both.

    Args:
        title: Its title.
        about: What it shows, in a sentence or two.
        lines: By name, a share in [0, 1] for each period.
        marks: What happened in a period, by its position; marked in the chart.
        columns: Names of the table's columns.
        rows: Cells of the table, a row each.
    """

    title: str
    about: str = ""
    lines: Mapping[str, Sequence[float]] = field(default_factory=dict)
    marks: Mapping[int, str] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    @property
    def figures(self) -> int:
        """How many cells of a row stand side by side on a narrow screen: three if all are short."""
        return 3 if all(len(cell) <= _SHORT for row in self.rows for cell in row[1:]) else 1

    def check(self, n_periods: int) -> None:
        """Raises ValueError if a line has not one value for each period, or a row not one cell for each column."""
        for name, values in self.lines.items():
            if len(values) != n_periods:
                raise ValueError(f"{name!r} of {self.title!r} must have {n_periods} values, got {len(values)}")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {self.title!r} must have {len(self.columns)} cells, got {len(row)}")


def write_periods(
    title: str,
    headline: str,
    ways: Sequence[Way],
    periods: Sequence[str],
    notes: Sequence[str],
    changes: Mapping[int, str] | None = None,
    out: str | os.PathLike[str] = "periods.html",
    *,
    parts: Sequence[Part] = (),
) -> Path:
    """Write the comparison as one page: no network, no script. Needs the extra ``evertune[reports]``.

    Args:
        title: Title of the page.
        headline: What was found, in a sentence.
        ways: The ways, with the same measures.
        periods: Names of the periods.
        notes: How it was measured, a paragraph each.
        changes: What changed in a period, by its position; marked in the charts.
        out: File to write; its folders are created.
        parts: Further sections, shown after the comparison.

    Returns:
        The path of the page.

    Raises:
        ImportError: If jinja2 is not installed.
        ValueError: If there are no ways, or a way or the line of a part has not one value (of each measure) for each
            period, or a row of a table not one cell for each column.
    """
    if not ways:
        raise ValueError("there is nothing to compare: ways is empty")
    measures = list(ways[0].scores)
    for way in ways:
        lengths = {name: len(values) for name, values in way.scores.items()}
        if lengths != dict.fromkeys(measures, len(periods)):
            raise ValueError(f"{way.name!r} must have {len(periods)} values of {', '.join(measures)}, got {lengths}")
    for part in parts:
        part.check(len(periods))
    colors = _colors([way.name for way in ways])
    page = fill(
        "periods.html",
        title=title,
        headline=headline,
        ways=ways,
        colors=colors,
        measures=measures,
        notes=notes,
        changes=[f"{periods[place]}: {words}" for place, words in (changes or {}).items()],
        charts=[
            (name, _chart(name, {way.name: way.scores[name] for way in ways}, periods, changes or {}))
            for name in measures
        ],
        parts=[
            (part, _colors(part.lines), _chart(part.title, part.lines, periods, part.marks) if part.lines else None)
            for part in parts
        ],
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _colors(names: Iterable[str]) -> dict[str, str]:
    return {name: f"var(--run-{number % 6})" for number, name in enumerate(names)}


def _chart(title: str, lines: Mapping[str, Sequence[float]], periods: Sequence[str], marks: Mapping[int, str]) -> Chart:
    """Lines over the periods, and a vertical rule where something happened."""
    across, up = Axis(0, len(periods) - 1, 4, 96), Axis(0, 1, 100, 0)
    chart = Chart(f"{title} in each of {len(periods)} periods")
    chart.y_ticks = [Mark(0, up(value), f"{100 * value:.0f}") for value in (0, 0.25, 0.5, 0.75, 1)]
    chart.x_ticks = [Mark(across(place), 100, str(place + 1), name=periods[place]) for place in thin(len(periods), 10)]
    chart.alarms = [Mark(across(place), 0, f"{periods[place]}: {words}") for place, words in marks.items()]
    for (name, values), color in zip(lines.items(), _colors(lines).values(), strict=True):
        xs, ys = [across(place) for place in range(len(values))], [up(value) for value in values]
        chart.lines.append(Line(polyline(xs, ys), color))
        chart.dots += [
            Mark(x, y, f"{name}, {period}: {percent(value)} %", color)
            for x, y, period, value in zip(xs, ys, periods, values, strict=True)
        ]
        chart.ends.append(Mark(100, ys[-1], percent(values[-1]), color, name))
        chart.summary += f"; {name} ends at {percent(values[-1])} %"
    for mark, y in zip(chart.ends, spread([mark.y for mark in chart.ends], 8), strict=True):
        mark.y = y
    return chart
