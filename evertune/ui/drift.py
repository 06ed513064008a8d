"""What has come over time: how production answered new records before it learned them, and what labels they had."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from evertune.gate.predictions import names_of
from evertune.registry.registry import RegistryError
from evertune.reports.answers import predictions_of
from evertune.reports.chart import Chart, Line, Mark, polyline
from evertune.reports.registry import floor_of, version_chart
from evertune.reports.summary import percent
from evertune.reports.versions import VersionView, verdict_of

MAX_CLASSES = 12  # the rest is one column


@dataclass(frozen=True)
class Arrival:
    """The records of one update, as production met them.

    Args:
        view: The version that learned them.
        past: Average accuracy of the version in production before, on what it was measured on when it was made.
        before: Its accuracy on the new records, before it had learned them.
        after: Accuracy of the new version on them.
    """

    view: VersionView
    past: float
    before: float
    after: float

    @property
    def loss(self) -> float:
        """How much worse the new records were answered than the past ones."""
        return self.before - self.past


@dataclass(frozen=True)
class LabelShares:
    """The labels of the records held out of each update.

    Args:
        classes: Names of the most frequent classes.
        rows: Name of each slice, its number of records, the share of each class in it, and that of all others.
        moved: Half the sum of the changes of all shares since the slice before (total variation); NaN for the first.
        highest: The highest share, for the colours.
    """

    classes: list[str]
    rows: list[tuple[str, int, list[float]]]
    moved: list[float]
    highest: float


def arrivals(views: Sequence[VersionView], all_views: Sequence[VersionView]) -> list[Arrival]:
    """What the gate measured of the new records of each version, oldest first. Versions whose verdict was not kept, or
    cannot be read, are left out; so is the first, before which there was none.

    Args:
        views: The versions to look at.
        all_views: All versions, among which their parents are.
    """
    by_number = {view.number: view for view in all_views}
    found = []
    for view in views:
        parent = by_number.get(view.version.parent or 0)
        before, after = _on_new_records(view)
        if parent is not None and not math.isnan(before):
            found.append(Arrival(view, parent.average, before, after))
    return found


def _on_new_records(view: VersionView) -> tuple[float, float]:
    """The accuracy of production and of the new version on the new records; NaN if it is not known."""
    try:
        verdict = verdict_of(view.version)
    except (RegistryError, OSError, ValueError):
        verdict = None
    checks = [] if verdict is None else verdict.checks
    check = next((one for one in checks if one.name == "new records"), None)
    if check is None or check.champion is None or check.challenger is None:
        return math.nan, math.nan
    return check.champion, check.challenger


def loss_chart(found: Sequence[Arrival], views: Sequence[VersionView]) -> Chart:
    """Accuracy of production on the records that came, beside that on the past ones, over versions."""
    low = floor_of([value for one in found for value in (one.past, one.before, one.after)])
    chart, across, up = version_chart("Accuracy on new records before they were learned", views, low)
    xs = [across(one.view.number) for one in found]
    for name, color in (("past", "var(--reference)"), ("before", "var(--run-0)"), ("after", "var(--bar)")):
        values = [getattr(one, name) for one in found]
        chart.lines.append(Line(polyline(xs, [up(value) for value in values]), color, dashed=name == "past"))
        chart.dots += [
            Mark(x, up(value), f"version {one.view.number}, {name}: {percent(value)} %", color)
            for x, one, value in zip(xs, found, values, strict=True)
            if not math.isnan(value)
        ]
    return chart


def shares_of_labels(views: Sequence[VersionView]) -> LabelShares | None:
    """The shares of the labels in each slice, as the newest version that can be read knows them; None without any."""
    for view in reversed(views):
        try:
            said = predictions_of(view.version)
        except (RegistryError, OSError):
            continue
        slices = {name: one for name, one in (said or {}).items() if one.has_classes and len(one)}
        if slices:
            order = [name for name in view.accuracy if name in slices]
            counts = {
                name: Counter(label for labels in slices[name].labels for label in names_of(labels)) for name in order
            }
            return _shares(counts)
    return None


def _shares(counts: dict[str, Counter[str]]) -> LabelShares:
    total = Counter[str]()
    for one in counts.values():
        total.update(one)
    classes = [name for name, _ in total.most_common(MAX_CLASSES)]
    rows, moved, before = [], [], dict[str, float]()
    for name, one in counts.items():
        n = one.total() or 1
        shares = {label: one[label] / n for label in total}
        moved.append(sum(abs(shares[label] - before[label]) for label in total) / 2 if before else math.nan)
        kept = [shares[label] for label in classes]
        rows.append((name, one.total(), [*kept, *([1 - sum(kept)] if len(total) > len(classes) else [])]))
        before = shares
    return LabelShares(classes, rows, moved, max((share for _, _, row in rows for share in row), default=1.0) or 1.0)
