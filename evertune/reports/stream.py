"""The report of one or more runs: one self-contained HTML page without scripts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evertune.metrics.history import History
from evertune.reports.chart import Axis, Chart, Line, Mark, keep_peaks, polyline, spread, thin, ticks
from evertune.reports.page import fill
from evertune.reports.summary import Runs, as_runs, average_over_updates, is_baseline, is_joint, percent, running_steps
from evertune.utils.clock import PARTS

N_COLORS = 6  # --run-0 to --run-5 of the template
NBSP = "\N{NO-BREAK SPACE}"
MAX_BARS = 24  # of the memory's content; the rest of a longer list is one bar
MAX_NAMED_UPDATES = 6  # up to which ticks are the names of experiences, which need more room than numbers
MAX_NAMED_ALARMS = 8  # whose steps are listed


def write_report(
    runs: Runs | str | os.PathLike[str],
    out: str | os.PathLike[str] = "report.html",
    title: str = "What was learned, and what was kept",
) -> Path:
    """Write the runs as one self-contained HTML page: no network, no script, light and dark, phone and desktop.

    It shows the summary, where the time went, the accuracy over time, each accuracy matrix as a heat map and, where a
    run has them, the drift score with its alarms and what the memory holds. Needs the extra ``evertune[reports]``.

    Args:
        runs: Histories by the name of their run, or the path of a ``history.json``.
        out: File to write; its folders are created.
        title: Heading of the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: If there are no runs, or the file is not a history.
        ImportError: If jinja2 is not installed.
    """
    page = render(as_runs(runs), title)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def render(runs: Runs, title: str) -> str:
    """The page as text. Names in it are escaped.

    Args:
        runs: Histories by the name of their run.
        title: Heading of the page.
    """
    views = [RunView(name, run, color) for (name, run), color in zip(runs.items(), _colors(runs), strict=True)]
    return fill(
        "template.html",
        title=title,
        runs=views,
        experiences=_experiences(views),
        ceiling=any(view.joint for view in views),
        counted=any(view.history.examples is not None for view in views),
        timed=[view for view in views if view.history.breakdown],
        parts=PARTS,
        drifting=[view for view in views if view.drift],
        remembering=[view for view in views if view.history.memory],
        headline=headline(views),
        overview=_overview(views),
        panels=[(name, _panel(name, views)) for name in _experiences(views)],
    )


@dataclass
class RunView:
    """One run as the page shows it.

    Args:
        name: Name of the run.
        history: What the run recorded.
        color: CSS colour of the run in all charts.
    """

    name: str
    history: History
    color: str
    joint: bool = field(init=False)
    several: bool = field(init=False)
    rows: list[tuple[str, list[float]]] = field(init=False)
    drift: Chart | None = field(init=False)
    bars: list[tuple[str, list[Bar]]] = field(init=False)

    def __post_init__(self) -> None:
        history = self.history
        self.joint = is_joint(history)
        self.several = len(history.accuracy_matrix) > 1
        names = ["all at once"] if self.joint else history.experiences
        self.rows = [
            (names[t] if t < len(names) else f"update {t + 1}", row) for t, row in enumerate(history.accuracy_matrix)
        ]
        self.drift = _drift(self.name, history) if history.drift else None
        kinds = {"By experience": "per_experience", "By class": "per_class"}
        self.bars = [(title, _bars(history.memory[key])) for title, key in kinds.items() if history.memory.get(key)]

    @property
    def level(self) -> float:
        """The average accuracy in percent, 0 if it is unknown."""
        average = self.history.average_accuracy
        return 0.0 if math.isnan(average) else round(100 * average, 1)

    @property
    def alarm_text(self) -> str:
        """The steps at which drift was detected, in words."""
        tests = zip(running_steps(self.history), self.history.drift, strict=True)
        steps = [f"{step:,}" for step, point in tests if point["alarm"]]
        if not steps:
            return "no alarm"
        named = ", ".join(steps[:MAX_NAMED_ALARMS]) + (", …" if len(steps) > MAX_NAMED_ALARMS else "")
        plural = "s" * (len(steps) > 1)
        return f"{len(steps)} alarm{plural}, at step{plural} {named}"


@dataclass
class Bar:
    """One bar of the memory's content.

    Args:
        name: Name of the experience or class.
        count: Number of examples.
        width: Width in percent of the longest bar.
    """

    name: str
    count: int
    width: float


def headline(views: Sequence[RunView]) -> list[tuple[RunView | None, str]]:
    """The outcome in one or two sentences.

    Args:
        views: The runs of the page.

    Returns:
        The pieces of the sentences in order. A piece that is the name of a run comes with the run, so that the page can
        show it in the run's colour.
    """
    scored = [view for view in views if not math.isnan(view.history.average_accuracy)]
    if not scored:
        return [(None, "No experience was evaluated after the last update.")]
    learners = sorted(
        (view for view in scored if not view.joint and not is_baseline(view.name)),
        key=lambda view: -view.history.average_accuracy,
    )
    without = next((view for view in scored if is_baseline(view.name)), None)
    ceiling = next((view for view in scored if view.joint), None)
    best, worst = (learners[0], learners[-1]) if learners else (scored[0], scored[0])
    top = best.history.average_accuracy
    pieces: list[tuple[RunView | None, str]] = [
        (best, best.name),
        (None, f" ends at {percent(top)}{NBSP}% average accuracy"),
    ]
    if ceiling is not None and ceiling is not best:
        gap = ceiling.history.average_accuracy - top
        pieces += [
            (None, f", {percent(abs(gap))}{NBSP}points {'below' if gap >= 0 else 'above'} "),
            (ceiling, ceiling.name),
            (None, " training on all data at once"),
        ]
    if without is not None and without is not best:
        gain = top - without.history.average_accuracy
        pieces += [
            (None, f", {percent(abs(gain))}{NBSP}points {'above' if gain >= 0 else 'below'} "),
            (without, without.name),
        ]
    if worst is not best:
        pieces += [
            (None, ". "),
            (worst, worst.name),
            (None, f" forgets {percent(worst.history.forgetting)}{NBSP}points and ends "),
            (None, f"{percent(top - worst.history.average_accuracy)}{NBSP}points lower"),
        ]
    elif best.several and best.history.forgetting > 0:
        pieces.append((None, f" and forgets {percent(best.history.forgetting)}{NBSP}points"))
    return [*pieces, (None, ".")]


def _colors(runs: Runs) -> list[str]:
    """A colour for each run. Joint runs and baselines are neutral references; the others take the colours in order."""
    colors, used = [], 0
    for name, run in runs.items():
        neutral = is_joint(run) or is_baseline(name)
        colors.append("var(--reference)" if neutral else f"var(--run-{used % N_COLORS})")
        used += not neutral
    return colors


def _experiences(views: Sequence[RunView]) -> list[str]:
    return list(dict.fromkeys(name for view in views for name in view.history.experiences))


def _overview(views: Sequence[RunView]) -> Chart:
    series = [(view, average_over_updates(view.history)) for view in views]
    chart = _accuracy_chart(series, "Average accuracy after each update")
    longest = max(views, key=lambda view: (not view.joint, len(view.rows)))
    if len(longest.rows) <= MAX_NAMED_UPDATES:
        for tick in chart.x_ticks:
            tick.name = longest.rows[int(tick.text) - 1][0]  # a phone shows the number, which the stream above explains
    return chart


def _panel(experience: str, views: Sequence[RunView]) -> Chart:
    series = [
        (view, [row[view.history.experiences.index(experience)] for row in view.history.accuracy_matrix])
        for view in views
        if experience in view.history.experiences
    ]
    chart = _accuracy_chart(series, f"Accuracy on {experience} after each update", end_gap=13)
    chart.y_ticks = chart.y_ticks[::2]
    return chart


def _accuracy_chart(series: Sequence[tuple[RunView, list[float]]], summary: str, end_gap: float = 8) -> Chart:
    """A line for each run over its updates. A joint run has a single update and becomes a dashed level."""
    updates = max((len(values) for _, values in series), default=1)
    across, up = Axis(0, updates - 1, 4, 96), Axis(0, 1, 100, 0)
    chart = Chart(summary)
    chart.y_ticks = [Mark(0, up(value), f"{100 * value:.0f}") for value in (0, 0.25, 0.5, 0.75, 1)]
    chart.x_ticks = [Mark(across(t), 100, str(t + 1)) for t in thin(updates, 10)]
    for view, values in series:
        xs, ys = [across(t) for t in range(len(values))], [up(value) for value in values]
        if view.joint:  # from edge to edge, at the height of its one value
            xs, ys = [0, 100], ys * 2
        chart.lines.append(Line(polyline(xs, ys), view.color, dashed=view.joint))
        last = next((i for i in reversed(range(len(values))) if not math.isnan(values[i])), None)
        if last is None:
            continue
        chart.ends.append(Mark(100, ys[last], percent(values[last]), view.color, view.name))
        chart.summary += f"; {view.name} ends at {percent(values[last])} %"
        if not view.joint:
            chart.dots += [
                Mark(x, y, f"{view.name}, update {t + 1}: {percent(value)} %", view.color)
                for t, (x, y, value) in enumerate(zip(xs, ys, values, strict=True))
                if not math.isnan(value)
            ]
    for mark, y in zip(chart.ends, spread([mark.y for mark in chart.ends], end_gap), strict=True):
        mark.y = y
    return chart


def _drift(name: str, history: History) -> Chart:
    points = history.drift
    scores = [point["score"] for point in points]
    thresholds = [point["threshold"] for point in points]
    steps = running_steps(history)
    low = min(0.0, *scores, *thresholds)
    across, up = Axis(steps[0], steps[-1], 1, 99), Axis(low, 1.08 * max(0.0, *scores, *thresholds) or 1.0, 100, 0)
    kept = keep_peaks(scores)
    alarms = [i for i, point in enumerate(points) if point["alarm"]]
    chart = Chart(f"Drift score of {name} over {len(points)} tests; {len(alarms)} alarms")
    chart.lines = [
        Line(
            polyline([across(steps[i]) for i in kept], [up(thresholds[i]) for i in kept]), "var(--muted)", dashed=True
        ),
        Line(polyline([across(steps[i]) for i in kept], [up(scores[i]) for i in kept]), "var(--score)"),
    ]
    chart.alarms = [Mark(across(steps[i]), up(scores[i]), f"step {steps[i]:,}: score {scores[i]:.3g}") for i in alarms]
    chart.y_ticks = [Mark(0, up(value), f"{value:g}") for value in ticks(up.high)]
    chart.x_ticks = [Mark(across(step), 100, f"{step:g}") for step in ticks(steps[-1], 5) if step >= steps[0]]
    return chart


def _bars(counts: dict[str, int]) -> list[Bar]:
    """The bars in the order of the counts. A long list is sorted, and its smallest counts are added up in one bar."""
    ranked = sorted(counts.items(), key=lambda item: -item[1]) if len(counts) > MAX_BARS else list(counts.items())
    shown, rest = ranked[:MAX_BARS], ranked[MAX_BARS:]
    longest = max((count for _, count in shown), default=0) or 1
    bars = [Bar(name, count, 100 * count / longest) for name, count in shown]
    if rest:
        bars.append(Bar(f"{len(rest)} more", sum(count for _, count in rest), 0))
    return bars
