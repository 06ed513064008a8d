"""The figures of a run that the terminal, the page and the plots have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evertune.metrics import functional
from evertune.metrics.history import History, load_history
from evertune.utils.clock import PARTS
from evertune.utils.terminal import foreign

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

WITHOUT_TRAINING = "no training"

Runs = Mapping[str, History]
"""Histories by the name of their run."""


def as_runs(runs: Runs | str | os.PathLike[str]) -> Runs:
    """The runs themselves, or those in a ``history.json``, and what no training would give beside them.

    Args:
        runs: Histories by the name of their run, or the path of a ``history.json``.

    Raises:
        ValueError: If there are no runs, or the file is not a history.
    """
    if isinstance(runs, str | os.PathLike):
        runs = load_history(runs)
    if not runs:
        raise ValueError("there are no runs to report")
    return {**runs, **_baselines(runs)}


def _baselines(runs: Runs) -> Runs:
    """What no training would give, as runs: one for all runs over the same data and the same pretrained model."""
    found: dict[str, History] = {}
    measured = [run for run in runs.values() if run.baseline is not None]
    for run in [run for run in measured if not is_joint(run)] or measured:
        baseline = run.baseline
        known = [one.to_dict()["accuracy_matrix"] for one in found.values()]
        if baseline is not None and baseline.to_dict()["accuracy_matrix"] not in known:
            name = f"{WITHOUT_TRAINING} ({run.untrained['method']})"
            found[name if name not in found else f"{name} {len(found) + 1}"] = baseline
    return {name: run for name, run in found.items() if name not in runs}


def is_baseline(name: str) -> bool:
    """Whether a run is not one, but what no training would give."""
    return name.startswith(WITHOUT_TRAINING)


def is_joint(run: History) -> bool:
    """Whether a run learned several experiences in one update: all data at once, as an upper bound for the others."""
    return len(run.accuracy_matrix) == 1 and len(run.experiences) > 1


def average_over_updates(run: History) -> list[float]:
    """The average accuracy after each update, over the experiences seen by then (all of them for a joint run)."""
    if is_joint(run):
        return [run.average_accuracy]
    width = len(run.experiences)
    rows = range(1, len(run.accuracy_matrix) + 1)
    return [functional.average_accuracy(run.accuracy_matrix[:t], seen=min(t, width)) for t in rows]


def running_steps(run: History) -> list[int]:
    """The steps of the drift tests, numbered consecutively: each update counts its own steps from zero.

    Example:
        >>> points = [{"step": step, "score": 0.0, "alarm": False, "threshold": 1.0} for step in (10, 20, 5, 15)]
        >>> running_steps(History(["a"], [[1.0]], 1.0, drift=points))
        [10, 20, 25, 35]
    """
    steps, done, last = [], 0, 0
    for point in run.drift:
        if point["step"] < last:
            done += last
        last = point["step"]
        steps.append(done + last)
    return steps


def percent(value: float, signed: bool = False) -> str:
    """A share as a percentage with one decimal and without its sign; an en dash for NaN.

    Example:
        >>> percent(0.956), percent(-0.021, signed=True), percent(float("nan"))
        ('95.6', '−2.1', '–')
    """
    if math.isnan(value):
        return UNKNOWN
    value = round(100 * value, 1) + 0.0  # -0.0 becomes 0.0
    return f"{value:{'+' if signed and value else ''}.1f}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """A duration in readable units.

    Example:
        >>> duration(0.44), duration(42.4), duration(192), duration(7_260)
        ('0.4 s', '42 s', '3 min 12 s', '2 h 01 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def spent(seconds: Mapping[str, float]) -> str:
    """What a time was spent on, the parts that took any of it.

    Example:
        >>> spent({"training": 61.0, "replay": 0.01, "importance": 4.2, "evaluation": 9.0, "other": 0.5})
        'training 1 min 01 s, importance 4.2 s, evaluation 9.0 s, other 0.5 s'
    """
    return ", ".join(f"{part} {duration(seconds[part])}" for part in PARTS if seconds.get(part, 0.0) >= 0.05)


def summary_table(runs: Runs | str | os.PathLike[str]) -> Table:
    """The runs side by side, for the terminal: ``rich.print(summary_table(runs))``. Below it, where the time went.

    Args:
        runs: Histories by the name of their run, or the path of a ``history.json``.

    Raises:
        ValueError: If there are no runs, or the file is not a history.

    Example:
        >>> table = summary_table({"naive": History(["a", "b"], [[1.0], [0.5, 1.0]], seconds=3.0)})
        >>> [column.header for column in table.columns]
        ['run', 'average accuracy', 'forgetting', 'backward transfer', 'time']
    """
    from rich.table import Table

    runs = as_runs(runs)
    table = Table("run", box=None, header_style="bold", pad_edge=False, caption_justify="left", caption_style="dim")
    for header in ("average accuracy", "forgetting", "backward transfer", "time"):
        table.add_column(header, justify="right")
    for name, run in runs.items():
        several = len(run.accuracy_matrix) > 1
        table.add_row(
            foreign(name),
            f"{percent(run.average_accuracy)} %",
            percent(run.forgetting) if several else UNKNOWN,
            percent(run.backward_transfer, signed=True) if several else UNKNOWN,
            duration(run.seconds),
        )
    timed = {name: spent(run.breakdown) for name, run in runs.items() if run.breakdown}
    if timed:
        words = [words if len(runs) == 1 else f"{name}: {words}" for name, words in timed.items()]
        table.caption = foreign("\n".join(words))
    return table
