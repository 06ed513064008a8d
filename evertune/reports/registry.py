"""The page of a registry: what is in production, how accurate each version was, and why some were refused."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from evertune.metrics.history import History
from evertune.registry.registry import Registry, RegistryError
from evertune.reports.answers import MAX_CLASSES, MAX_CONFUSIONS, MAX_TEXT, MAX_WORST, Answers, answers_of
from evertune.reports.chart import Axis, Chart, Line, Mark, polyline, spread, thin, ticks
from evertune.reports.listing import Listing
from evertune.reports.page import fill
from evertune.reports.stream import Bar
from evertune.reports.summary import percent
from evertune.reports.versions import (
    COLORS,
    MAX_SHOWN,
    MOMENT,
    PRODUCTION,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    WAITING,
    Survey,
    VersionView,
    accuracy_of,
    as_registry,
    details_of,
    facts,
    headline,
    held_slices,
    line_to,
    mean,
    name_of,
    origins_of,
    records_of,
    slices_of,
    timeline,
    version_views,
)
from evertune.utils.clock import PARTS
from evertune.utils.terminal import foreign

MAX_OPEN_PANELS = 9  # charts of slices that are shown without unfolding
MAX_OPEN_ENTRIES = 12  # entries of the timeline that are shown without unfolding

STAGES = ("plan", "train", "evaluate")
MARKS = (PROMOTED, ROLLED_BACK, REFUSED, WAITING)


def write_versions_report(
    registry: Registry | str | os.PathLike[str],
    out: str | os.PathLike[str] = "versions.html",
    title: str | None = None,
) -> Path:
    """Write the content of a registry as one self-contained HTML page, for phone and desktop: no network, no script.

    It shows what is in production, the accuracy on each held-out slice over the versions, the records each version
    learned, production's answers by class with the worst of them, and a timeline that says why versions were refused or
    rolled back. Texts of held-out records are on it. Needs the extra ``evertune[reports]``.

    Args:
        registry: A registry, its folder or its URL.
        out: File to write; its folders are created.
        title: Heading of the page; by default the registry's name.

    Returns:
        The path of the page.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    registry = as_registry(registry)
    page = _page(registry, title or f"Registry {name_of(registry)}")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def history_of(registry: Registry | str | os.PathLike[str]) -> History:
    """The line of versions that led to the one in production, as the history of a run.

    Row ``t`` of its accuracy matrix is the ``t``-th version of that line, and column ``k`` the ``k``-th slice on which
    the line was measured. Refused and rolled back versions are not part of it. Pass it to ``write_report``,
    ``save_plots`` or ``summary_table`` like any other history:
    ``save_plots({"production": history_of("registry")}, "plots")``.

    Args:
        registry: A registry, its folder or its URL.

    Raises:
        ValueError: If nothing is in production, or no version in that line was measured.
    """
    registry = as_registry(registry)
    line = line_to(registry.versions(), registry.production)
    if not line:
        raise ValueError(f"{name_of(registry)} has no version in production yet, so there is no history")
    slices = slices_of(line)
    if not slices:
        raise ValueError(f"no version that led to version {line[-1].number} was measured on a held-out slice")
    seconds = sum(version.manifest.seconds.get(stage, 0.0) for version in line for stage in STAGES)
    times = [version.manifest.seconds for version in line]
    breakdown = {part: sum(time[part] for time in times) for part in PARTS if all(part in time for time in times)}
    return History(
        slices,
        [[accuracy_of(version).get(name, math.nan) for name in slices] for version in line],
        seconds,
        examples=sum(records_of(version)["train"] for version in line),
        breakdown=breakdown,
    )


def versions_table(registry: Registry | str | os.PathLike[str]) -> Listing:
    """The versions of a registry, newest last, for the terminal: ``rich.print(versions_table("registry"))``.

    Accuracy is the average over the slices of a version, in percent; the change compares like with like: the slices
    that its parent was measured on, too.

    Args:
        registry: A registry, its folder or its URL.
    """
    from rich.text import Text

    styles = {PRODUCTION: "bold green", REFUSED: "red", ROLLED_BACK: "yellow"}
    rows = []
    for view in version_views(_survey(as_registry(registry))):
        words = foreign(view.status, styles.get(view.status, ""))
        if view.words:
            words = Text.assemble(words, foreign(f": {'; '.join(view.words.splitlines())}"))
        cells = (str(view.number), view.created, view.name, f"{view.records['train']:,}", percent(view.average))
        rows.append([*map(foreign, cells), Text(percent(view.change, signed=True)), words])
    columns = ["version", "created", "learned", "records", "accuracy", "change", "status"]
    return Listing(columns, rows, right=["version", "records", "accuracy", "change"])


@dataclass
class Column:
    """The records of one version as a stacked column.

    Args:
        label: Label below the column; empty if there is no room for it.
        tip: Tooltip.
        heights: Height of each kind of record, in percent of the tallest column.
        faint: Whether the column is drawn faintly, as the version did not serve.
    """

    label: str
    tip: str
    heights: dict[str, float]
    faint: bool


def _page(registry: Registry, title: str) -> str:
    survey = _survey(registry)
    views = version_views(survey)
    line = [view for view in views if view.served]
    production = line[-1] if line else None
    slices = slices_of([view.version for view in line])
    origins = origins_of(slices, [view.version for view in views])
    shown, drawn = views[-MAX_SHOWN:], {name: origins[name] for name in slices[-MAX_SHOWN:]}
    answers, no_answers = None, ""
    try:
        answers = answers_of(registry, production.version) if production else None
    except RegistryError as error:
        no_answers = str(error)
    low = floor_of([value for view in shown for value in [*view.accuracy.values(), view.average]])
    return fill(
        "versions.html",
        title=title,
        views=views,
        shown=shown,
        slices=drawn,
        n_slices=len(slices),
        production=production,
        headline=headline(line),
        facts=facts(registry, views, line),
        details=details_of(production) if production else [],
        held=held_slices(line, origins),
        answers=answers,
        no_answers=no_answers,
        worst=answers.wrong[:MAX_WORST] if answers else [],
        confusions=confusion_bars(answers) if answers else [],
        max_classes=MAX_CLASSES,
        max_text=MAX_TEXT,
        kinds=[(status, COLORS[status]) for status in MARKS if any(view.status == status for view in shown)],
        overview=overview_chart(shown, low),
        panels=[(number, name, _panel(name, shown, low)) for name, number in drawn.items()],
        max_panels=MAX_OPEN_PANELS,
        heat=Axis(low, 1),
        missing=math.nan,
        low=low,
        columns=_columns(shown),
        counts=_counts(shown),
        timeline=timeline(views, survey.events),
        max_entries=MAX_OPEN_ENTRIES,
        moment=MOMENT,
    )


def _survey(registry: Registry) -> Survey:
    """The versions. If the one in production cannot be read, that is an error here: the page would mislead."""
    return Survey(registry.versions(), registry.production, registry.aliases, registry.events)


def confusion_bars(answers: Answers) -> list[Bar]:
    """The most frequent confusions as bars."""
    most = answers.confusions[:MAX_CONFUSIONS]
    return [Bar(f"{label} → {said}", n, 100 * n / most[0][2]) for label, said, n in most]


def floor_of(values: Sequence[float]) -> float:
    """Where the scale of accuracies starts: the lowest, rounded down to a tenth, or 0 if that is below a half."""
    lowest = min((value for value in values if not math.isnan(value)), default=0.0)
    low = min(math.floor(10 * lowest) / 10, 0.9)
    return low if low >= 0.5 else 0.0


def overview_chart(views: Sequence[VersionView], low: float) -> Chart:
    """The average accuracy and that of the weakest slice, over versions.

    Args:
        views: The versions to draw, oldest first.
        low: Where the scale starts; see :func:`floor_of`.
    """
    chart, across, up = version_chart("Average accuracy of each version", views, low)
    served = [view for view in views if view.served]
    for name, color, values, points in (
        ("average", "var(--bar)", [view.average for view in served], _like_with_like(served)),
        (
            "weakest slice",
            "var(--reference)",
            [view.weakest for view in served],
            [(view.number, view.weakest) for view in served],
        ),
    ):
        line = polyline([across(number) for number, _ in points], [up(value) for _, value in points])
        chart.lines.append(Line(line, color, dashed=name != "average"))
        if served and not math.isnan(values[-1]):
            chart.ends.append(Mark(100, up(values[-1]), percent(values[-1]), color, name))
            chart.summary += f"; {name} of version {served[-1].number}: {percent(values[-1])} %"
    _mark(chart, views, {view.number: view.average for view in views}, across, up)
    for mark, y in zip(chart.ends, spread([mark.y for mark in chart.ends], 8), strict=True):
        mark.y = y
    return chart


def _like_with_like(line: Sequence[VersionView]) -> list[tuple[int, float]]:
    """The average accuracy over version numbers as points of a line, which breaks where a slice joins or leaves.

    Each piece compares versions on the slices that both were measured on: the average over more slices would look like
    a rise or a fall.
    """
    points = [(line[0].number, line[0].average)] if line else []
    for old, new in pairwise(line):
        both = old.accuracy.keys() & new.accuracy.keys()
        before, after = (mean([view.accuracy[name] for name in both]) for view in (old, new))
        if before != points[-1][1]:
            points += [(old.number, math.nan), (old.number, before)]
        points.append((new.number, after))
    return points


def _panel(name: str, views: Sequence[VersionView], low: float) -> Chart:
    chart, across, up = version_chart(f"Accuracy on {name} of each version", views, low)
    values = {view.number: view.accuracy.get(name, math.nan) for view in views}
    served = [view.number for view in views if view.served]
    ys = [up(values[number]) for number in served]
    chart.lines = [Line(polyline([across(number) for number in served], ys), "var(--bar)")]
    measured = [number for number in served if not math.isnan(values[number])]
    if measured:
        last = values[measured[-1]]
        chart.ends = [Mark(100, up(last), percent(last), "var(--bar)")]
        chart.summary += f"; version {measured[-1]}: {percent(last)} %"
    _mark(chart, views, values, across, up)
    chart.y_ticks = chart.y_ticks[::2]
    return chart


def version_chart(summary: str, views: Sequence[VersionView], low: float) -> tuple[Chart, Axis, Axis]:
    """A chart over version numbers with its ticks, and its horizontal and vertical axes."""
    first, last = (views[0].number, views[-1].number) if views else (0, 0)
    across, up = Axis(first, last, 4, 96), Axis(low, 1, 100, 0)
    chart = Chart(summary)
    step = 0.05 if low >= 0.8 else 0.1 if low else 0.25
    chart.y_ticks = [
        Mark(0, up(value), f"{100 * value:.0f}")
        for value in (low + i * step for i in range(round((1 - low) / step) + 1))
    ]
    chart.x_ticks = [Mark(across(first + i), 100, str(first + i)) for i in thin(last - first + 1, 10)]
    return chart, across, up


def _mark(chart: Chart, views: Sequence[VersionView], values: dict[int, float], across: Axis, up: Axis) -> None:
    """Add a dot for each version that was measured. Refused versions are marked like alarms."""
    for view in views:
        value = values[view.number]
        if not math.isnan(value):
            text = f"version {view.number}, {view.status}: {percent(value)} %"
            marks = chart.alarms if view.status == REFUSED else chart.dots
            marks.append(Mark(across(view.number), up(value), text, view.color))


def _tallest(views: Sequence[VersionView]) -> int:
    return max((sum(view.records.values()) for view in views), default=0) or 1


def _counts(views: Sequence[VersionView]) -> list[Mark]:
    """The axis of the columns: round numbers of records."""
    up = Axis(0, _tallest(views), 100, 0)
    return [Mark(0, up(value), f"{value:,.0f}") for value in ticks(_tallest(views)) if value == int(value)]


def _columns(views: Sequence[VersionView]) -> list[Column]:
    tallest = _tallest(views)
    labelled = {views[i].number for i in thin(len(views), 14)}
    columns = []
    for view in views:
        train, held_out, quarantined = view.records.values()
        tip = f"version {view.number}, {view.status}: {train:,} learned, {held_out:,} held out"
        if quarantined:
            tip += f", {quarantined:,} in quarantine"
        heights = {kind: round(100 * count / tallest, 2) for kind, count in view.records.items() if count}
        label = str(view.number) if view.number in labelled else ""
        columns.append(Column(label, tip, heights, faint=not view.served))
    return columns
