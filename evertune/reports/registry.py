"""The page of a registry: what is in production, how accurate each version was, and why some were refused."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from evertune.metrics.history import History
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.version import Version
from evertune.reports.answers import MAX_CLASSES, MAX_CONFUSIONS, MAX_TEXT, MAX_WORST, Answers, answers_of
from evertune.reports.chart import Axis, Chart, Line, Mark, polyline, spread, thin, ticks
from evertune.reports.listing import Listing, brief
from evertune.reports.page import fill
from evertune.reports.stream import NBSP, Bar
from evertune.reports.summary import UNKNOWN, percent
from evertune.utils.clock import PARTS
from evertune.utils.terminal import foreign

MAX_SHOWN = 40
"""Number of versions and of slices drawn, the newest of a longer list. The timeline names all versions."""
MAX_OPEN_PANELS = 9  # charts of slices that are shown without unfolding
MAX_OPEN_ENTRIES = 12  # entries of the timeline that are shown without unfolding

PRODUCTION, PROMOTED, ROLLED_BACK, REFUSED, WAITING = (
    "in production",
    "promoted",
    "rolled back",
    "refused",
    "not promoted",
)
COLORS = {
    PRODUCTION: "var(--bar)",
    PROMOTED: "var(--bar)",
    ROLLED_BACK: "var(--run-0)",
    REFUSED: "var(--alarm)",
    WAITING: "var(--reference)",
}
MOMENT = "%Y-%m-%d %H:%M"
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
    registry = _as_registry(registry)
    page = _page(registry, title or f"Registry {_name(registry)}")
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
    registry = _as_registry(registry)
    line = _line(registry.versions(), registry.production)
    if not line:
        raise ValueError(f"{_name(registry)} has no version in production yet, so there is no history")
    slices = _slices(line)
    if not slices:
        raise ValueError(f"no version that led to version {line[-1].number} was measured on a held-out slice")
    seconds = sum(version.manifest.seconds.get(stage, 0.0) for version in line for stage in STAGES)
    times = [version.manifest.seconds for version in line]
    breakdown = {part: sum(time[part] for time in times) for part in PARTS if all(part in time for time in times)}
    return History(
        slices,
        [[_accuracy(version).get(name, math.nan) for name in slices] for version in line],
        seconds,
        examples=sum(_records(version)["train"] for version in line),
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
    for view in _views(_as_registry(registry)):
        words = foreign(view.status, styles.get(view.status, ""))
        if view.words:
            words = Text.assemble(words, foreign(f": {'; '.join(view.words.splitlines())}"))
        cells = (str(view.number), view.created, view.name, f"{view.records['train']:,}", percent(view.average))
        rows.append([*map(foreign, cells), Text(percent(view.change, signed=True)), words])
    columns = ["version", "created", "learned", "records", "accuracy", "change", "status"]
    return Listing(columns, rows, right=["version", "records", "accuracy", "change"])


@dataclass
class VersionView:
    """One version as the page shows it.

    Args:
        version: The version.
        status: What became of it, one of the keys of :data:`COLORS`.
        aliases: Its aliases that ``status`` does not already name.
        change: Mean difference of its accuracies to those of its parent, over the slices of both; NaN without any.
    """

    version: Version
    status: str
    aliases: list[str]
    number: int = field(init=False)
    name: str = field(init=False)
    created: str = field(init=False)
    kind: str = field(init=False)
    cause: str = field(init=False)
    words: str = field(init=False)
    accuracy: dict[str, float] = field(init=False)
    average: float = field(init=False)
    records: dict[str, int] = field(init=False)
    color: str = field(init=False)
    change: float = math.nan

    def __post_init__(self) -> None:
        manifest = self.version.manifest
        self.number, self.name = self.version.number, self.version.experience
        self.created, self.kind = f"{self.version.created:{MOMENT}}", manifest.kind or "update"
        self.cause = manifest.reason
        self.words = manifest.summary.removeprefix("refused: ").replace("; ", "\n") if self.status == REFUSED else ""
        self.accuracy, self.records = _accuracy(self.version), _records(self.version)
        self.average = _mean(list(self.accuracy.values()))
        self.color = COLORS[self.status]

    @property
    def served(self) -> bool:
        """Whether it is in production, or led to the version that is."""
        return self.status in (PRODUCTION, PROMOTED)

    @property
    def weakest(self) -> float:
        """The accuracy on its worst slice."""
        return min(self.accuracy.values(), default=math.nan)


@dataclass
class Entry:
    """One entry of the timeline: a version, or a change of production by hand.

    Args:
        at: When it happened.
        color: CSS colour of the entry.
        text: What happened; empty for a version.
        reason: Why, in lines of text.
        view: The version; None for a change by hand.
    """

    at: datetime
    color: str
    text: str = ""
    reason: str = ""
    view: VersionView | None = None


@dataclass
class SliceView:
    """One held-out slice and production's accuracy on it.

    Args:
        name: Name of the slice.
        number: Version with which the slice came; None if it is unknown.
        examples: Number of examples.
        accuracy: Accuracy of production.
        change: Difference to the best version before production; NaN if there is none.
    """

    name: str
    number: int | None
    examples: int
    accuracy: float
    change: float


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
    views = _views(registry)
    line = [view for view in views if view.served]
    production = line[-1] if line else None
    slices = _slices([view.version for view in line])
    origins = _origins(slices, [view.version for view in views])
    shown, drawn = views[-MAX_SHOWN:], {name: origins[name] for name in slices[-MAX_SHOWN:]}
    answers, no_answers = None, ""
    try:
        answers = answers_of(registry, production.version) if production else None
    except RegistryError as error:
        no_answers = str(error)
    low = _floor([value for view in shown for value in [*view.accuracy.values(), view.average]])
    return fill(
        "versions.html",
        title=title,
        views=views,
        shown=shown,
        slices=drawn,
        n_slices=len(slices),
        production=production,
        headline=_headline(line),
        facts=_facts(registry, views, line),
        details=_details(production) if production else [],
        held=_held(line, origins),
        answers=answers,
        no_answers=no_answers,
        worst=answers.wrong[:MAX_WORST] if answers else [],
        confusions=_confusions(answers) if answers else [],
        max_classes=MAX_CLASSES,
        max_text=MAX_TEXT,
        kinds=[(status, COLORS[status]) for status in MARKS if any(view.status == status for view in shown)],
        overview=_overview(shown, low),
        panels=[(number, name, _panel(name, shown, low)) for name, number in drawn.items()],
        max_panels=MAX_OPEN_PANELS,
        heat=Axis(low, 1),
        missing=math.nan,
        low=low,
        columns=_columns(shown),
        counts=_counts(shown),
        timeline=_timeline(views, registry),
        max_entries=MAX_OPEN_ENTRIES,
        moment=MOMENT,
    )


# --- what the registry says


def _as_registry(registry: Registry | str | os.PathLike[str]) -> Registry:
    return registry if isinstance(registry, Registry) else Registry(os.fspath(registry))


def _name(registry: Registry) -> str:
    return str(registry.store.root).rstrip("/").rsplit("/", 1)[-1]


def _views(registry: Registry) -> list[VersionView]:
    """All versions, oldest first, each with its status."""
    versions, production, aliases = registry.versions(), registry.production, registry.aliases
    line = {version.number for version in _line(versions, production)}
    # Versions that have left production. Those of them that did not lead to the current one were rolled back.
    left = {event["from"] for event in registry.events if event["action"] in ("promote", "rollback")}
    views = []
    for version in versions:
        if version.number in line:
            status = PRODUCTION if version == production else PROMOTED
        elif version.number in left:
            status = ROLLED_BACK
        else:
            status = WAITING if version.passed else REFUSED
        names = [name for name, number in aliases.items() if number == version.number and name not in status]
        views.append(VersionView(version, status, names))
    by_number = {view.number: view for view in views}
    for view in views:
        if (parent := by_number.get(view.version.parent or 0)) is not None:
            change = view.version.manifest.metrics.change_from(parent.version.manifest.metrics)
            view.change = math.nan if change is None else change
    return views


def _line(versions: Sequence[Version], last: Version | None) -> list[Version]:
    """A version and its parents as far back as they are kept, oldest first."""
    by_number = {version.number: version for version in versions}
    line = []
    while last is not None:
        line.append(last)
        # `pop`, so that parents that form a circle in damaged manifests end the loop.
        last = by_number.pop(last.parent, None) if last.parent is not None else None
    return line[::-1]


def _slices(line: Sequence[Version]) -> list[str]:
    """The slices that versions were measured on, oldest first."""
    return list(dict.fromkeys(name for version in line for name in _accuracy(version)))


def _origins(slices: Sequence[str], versions: Sequence[Version]) -> dict[str, int | None]:
    """The version that each slice came with; None if it is unknown.

    That of a deleted version is in the name that updates give to their experiences: ``update-7``.
    """
    kept = {version.experience: version.number for version in reversed(versions)}
    named = {name: re.fullmatch(r"update-(\d+)", name) for name in slices}
    return {name: kept.get(name) or (int(match[1]) if (match := named[name]) else None) for name in slices}


def _accuracy(version: Version) -> dict[str, float]:
    return {name: value for name, value in version.manifest.metrics.accuracy.items() if value is not None}


def _records(version: Version) -> dict[str, int]:
    return {kind: version.manifest.records.get(kind, 0) for kind in ("train", "held_out", "quarantined")}


# --- what the page says


def _headline(line: Sequence[VersionView]) -> str:
    if not line:
        return "No version is in production yet."
    production = line[-1]
    text = f"Version {production.number} is in production"
    if math.isnan(production.average):
        return f"{text}."
    count = len(production.accuracy)
    text += f": {percent(production.average)}{NBSP}% right on average over {count} held-out slice{'s' * (count > 1)}"
    before = next((view for view in line if view.number == production.version.parent), None)
    if before is None or math.isnan(production.change):
        return f"{text}."
    common = len(production.accuracy.keys() & before.accuracy.keys())
    on = "it" if common == count == 1 else f"the {common} that both were measured on" if common < count else "them"
    how = f"{percent(abs(production.change))}{NBSP}points {'below' if production.change < 0 else 'above'}"
    return f"{text}, {how} version {before.number} on {on}."


def _change(name: str, line: Sequence[VersionView]) -> float:
    """Production's accuracy on a slice, less that of the best version before it; NaN if no other was measured on it."""
    before = [view.accuracy[name] for view in line[:-1] if name in view.accuracy]
    return line[-1].accuracy[name] - max(before) if before else math.nan


def _facts(registry: Registry, views: Sequence[VersionView], line: Sequence[VersionView]) -> list[tuple[str, str, str]]:
    """The figures at the head of the page, each as its name, its value and the details below it."""
    counts = {status: sum(view.status == status for view in views) for status in (REFUSED, ROLLED_BACK)}
    promoted = sum(view.served for view in views)
    parts = [f"{promoted} promoted", *(f"{count} {status}" for status, count in counts.items() if count)]
    total = {kind: sum(view.records[kind] for view in line) for kind in ("train", "held_out", "quarantined")}
    kept = f"{total['held_out']:,} held out, {total['quarantined']:,} in quarantine"
    facts = [("Versions", f"{len(views):,}", ", ".join(parts)), ("Records learned", f"{total['train']:,}", kept)]
    return [*facts, *_pending(registry, line[-1].version.manifest.consumed if line else 0)]


def _pending(registry: Registry, consumed: int) -> list[tuple[str, str, str]]:
    """The number of records in the journal that production has not learned, as a figure; empty without a journal."""
    from evertune.registry.journal import Journal

    journal = Journal(registry.store)
    try:
        if journal.last is None:
            return []
        count = sum(segment.records for segment in journal.segments(after=consumed))
    except ValueError as error:
        return [("Records pending", "?", str(error))]
    return [("Records pending", f"{count:,}", "wait for the next update")]


def _details(view: VersionView) -> list[tuple[str, str]]:
    manifest = view.version.manifest
    digest = next((value for name, value in manifest.files.items() if name.endswith(".safetensors")), "")
    offset = manifest.offset
    details = [
        ("Created", view.created),
        ("Learned", view.name),
        ("Because", view.cause),
        ("From", f"version {view.version.parent}" if view.version.parent is not None else "a pretrained model"),
        ("Module", manifest.module or UNKNOWN),
        ("Classes", _listed(manifest.classes)),
        ("Source offset", brief(offset) if offset else ""),
        ("Written by", manifest.code or UNKNOWN),
        ("Weights, sha256", digest[:16]),
    ]
    return [(name, value) for name, value in details if value]


def _listed(names: Sequence[str]) -> str:
    """The number of names and the names themselves; empty if there are none.

    Example:
        >>> _listed(["sport", "tech"])
        '2: sport, tech'
    """
    return f"{len(names)}: {', '.join(names[:MAX_SHOWN])}{', …' * (len(names) > MAX_SHOWN)}" if names else ""


def _held(line: Sequence[VersionView], slices: dict[str, int | None]) -> list[SliceView]:
    """The slices that production was measured on, oldest first; of more than fit, those that lost the most."""
    if not line:
        return []
    production = line[-1]
    examples = {entry.name: entry.examples for entry in production.version.slices()}
    held = [
        SliceView(name, number, examples.get(name, 0), production.accuracy[name], _change(name, line))
        for name, number in slices.items()
        if name in production.accuracy
    ]
    lost = sorted(held, key=lambda slice_: (math.isnan(slice_.change), slice_.change))
    return held if len(held) <= MAX_SHOWN else lost[:MAX_SHOWN]


def _confusions(answers: Answers) -> list[Bar]:
    most = answers.confusions[:MAX_CONFUSIONS]
    return [Bar(f"{label} → {said}", n, 100 * n / most[0][2]) for label, said, n in most]


def _floor(values: Sequence[float]) -> float:
    """Where the scale of accuracies starts: the lowest, rounded down to a tenth, or 0 if that is below a half."""
    lowest = min((value for value in values if not math.isnan(value)), default=0.0)
    low = min(math.floor(10 * lowest) / 10, 0.9)
    return low if low >= 0.5 else 0.0


def _overview(views: Sequence[VersionView], low: float) -> Chart:
    chart, across, up = _empty_chart("Average accuracy of each version", views, low)
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
        before, after = (_mean([view.accuracy[name] for name in both]) for view in (old, new))
        if before != points[-1][1]:
            points += [(old.number, math.nan), (old.number, before)]
        points.append((new.number, after))
    return points


def _panel(name: str, views: Sequence[VersionView], low: float) -> Chart:
    chart, across, up = _empty_chart(f"Accuracy on {name} of each version", views, low)
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


def _empty_chart(summary: str, views: Sequence[VersionView], low: float) -> tuple[Chart, Axis, Axis]:
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


def _timeline(views: Sequence[VersionView], registry: Registry) -> list[Entry]:
    """The versions and the changes of production by hand, newest first."""
    entries = [Entry(view.version.created, view.color, reason=view.words, view=view) for view in views]
    versions = {view.number: view.version for view in views}
    been: set[int] = set()  # versions that were in production before
    for event in registry.events:
        old, new, rolled_back = event["from"], event["to"], event["action"] == "rollback"
        version = versions.get(new)
        # The gate promotes a version that passes once, in the place of its parent. Any other promotion is the decision
        # of a person.
        passed = version is None or (version.passed and version.parent == old)
        by_hand = event["action"] == "promote" and (new in been or not passed or (old is not None and new < old))
        if event["action"] in ("promote", "rollback"):
            been |= {new} if old is None else {old, new}
        if rolled_back or by_hand:
            text = f"Rolled back from version {old} to {new}" if rolled_back else f"Version {new} promoted by hand"
            reason = "\n".join(str(event[name]) for name in ("reason", "by") if event.get(name))
            color = COLORS[ROLLED_BACK if rolled_back else PROMOTED]
            entries.append(Entry(datetime.fromisoformat(event["time"]), color, text, reason))
    return sorted(entries, key=lambda entry: entry.at)[::-1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
