"""A comparison of two sets of records as one self-contained HTML page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from evertune.drift.comparison.comparison import Comparison, Scan
from evertune.drift.comparison.wording import decision, described, false_alarms, shares_of, sure
from evertune.reports.chart import Axis, Chart, Line, Mark, keep_peaks, polyline, ticks
from evertune.reports.page import fill

_MAX_ALARMS = 60  # alarms marked in a plot
_SIDE, _MARGIN = 300, 8  # of the projection's SVG, in its units


@dataclass(frozen=True)
class Projection:
    """The features of both sides in two dimensions, as circles of an SVG.

    Args:
        before: Centres ``(x, y)`` of the circles of the reference.
        after: Centres ``(x, y)`` of the circles of the current records.
        size: Width and height of the SVG's view box.
    """

    before: list[tuple[float, float]]
    after: list[tuple[float, float]]
    size: int = _SIDE


@dataclass(frozen=True)
class Shares:
    """All values of a field whose shares have changed.

    Args:
        name: Name of the field.
        rows: Each value with its share before and now, the largest change first.
    """

    name: str
    rows: list[tuple[str, float, float]]


def write_drift_report(found: Comparison, out: str | os.PathLike[str] = "drift.html") -> Path:
    """Write a comparison as one self-contained page: no network, no script. Needs the extra ``evertune[reports]``.

    It shows the score over the records with the threshold and the alarms, what has changed, examples side by side, and
    the features of both sides in two dimensions. All text is escaped.

    Args:
        found: What :func:`~evertune.drift.comparison.compare` returned.
        out: File to write; its folders are created.

    Returns:
        The path of the page.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    page = fill(
        "drift.html",
        title=f"{found.current} against {found.reference}",
        found=found,
        headline=decision(found),
        notes=false_alarms(found),
        plots=[(scan, _scores(scan)) for scan in found.scans if scan.points],
        projection=_circles(found),
        fields=[(change, described(change)) for change in found.attribution.fields if sure(change)],
        shares=[
            Shares(change.name, shares_of(change))
            for change in found.attribution.fields
            if sure(change) and change.kind == "categorical"
        ],
        topics=list(zip(found.attribution.topics, found.topic_examples, strict=True)),
        asides=[
            (name, aside)
            for name, aside in (
                (found.reference, found.set_aside_reference),
                (found.current, found.set_aside_current),
            )
            if aside.n
        ],
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _scores(scan: Scan) -> Chart:
    points = scan.points
    scores, thresholds = ([point[name] for point in points] for name in ("score", "threshold"))
    # A little room above the highest point; 1.0 stands in for scores that are all 0.
    low, high = min(0.0, *scores, *thresholds), 1.08 * max(0.0, *scores, *thresholds) or 1.0
    across, up = Axis(0, scan.n_records, 1, 99), Axis(low, high, 100, 0)
    kept = keep_peaks(scores)
    xs = [across(points[i]["record"]) for i in kept]
    alarms = [point for point in points if point["alarm"]]
    chart = Chart(f"Score of {scan.detector} over {len(points)} tests; {len(alarms)} alarms")
    chart.lines = [
        Line(polyline(xs, [up(thresholds[i]) for i in kept]), "var(--muted)", dashed=True),
        Line(polyline(xs, [up(scores[i]) for i in kept]), "var(--score)"),
    ]
    chart.alarms = [
        Mark(across(point["record"]), up(point["score"]), f"record {point['record']:,}: score {point['score']:.3g}")
        for point in alarms[:_MAX_ALARMS]
    ]
    chart.y_ticks = [Mark(0, up(value), f"{value:g}") for value in ticks(high)]
    chart.x_ticks = [Mark(across(value), 100, f"{value:g}") for value in ticks(scan.n_records, 5)]
    return chart


def _circles(found: Comparison) -> Projection | None:
    before, after = found.projection
    if not before or not after:
        return None
    places = [*before, *after]
    axes = []
    # Both sides share the axes. The second one is flipped, as an SVG's y runs downwards.
    for i, (start, stop) in enumerate(((_MARGIN, _SIDE - _MARGIN), (_SIDE - _MARGIN, _MARGIN))):
        values = [place[i] for place in places]
        axes.append(Axis(min(values), max(values), start, stop))
    circles = [[(axes[0](x), axes[1](y)) for x, y in side] for side in (before, after)]
    return Projection(circles[0], circles[1])
