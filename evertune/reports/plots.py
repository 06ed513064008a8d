"""PNG plots of histories, for papers and slides."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from evertune.reports.summary import Runs, as_runs, average_over_updates, is_baseline, is_joint, running_steps

COLORS = ("#c75a11", "#2a5fd0", "#8145c9", "#a8276b", "#6b7311", "#10748c")
REFERENCE = "#5d6470"
ALARM = "#c8202f"
HEAT = ("#edf3f1", "#06524a")


def save_plots(runs: Runs | str | os.PathLike[str], directory: str | os.PathLike[str], dpi: int = 150) -> list[Path]:
    """Plot the runs as PNG files. Needs the extra ``evertune[reports]``.

    Args:
        runs: Histories by the name of their run, or the path of a ``history.json``.
        directory: Folder to write to; it is created.
        dpi: Dots per inch. The default makes plots about 1,500 pixels wide.

    Returns:
        The paths of the files: ``accuracy_over_time.png`` and ``accuracy_matrices.png``, then ``drift.png`` and
        ``memory.png`` if a run has something to show there.

    Raises:
        ValueError: If there are no runs, or the file is not a history.
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.text import Text
    except ImportError as error:
        raise ImportError("the plots need matplotlib: pip install 'evertune[reports]'") from error

    runs = as_runs(runs)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, tuple[Callable[[Any, Runs], None], Runs]] = {
        "accuracy_over_time": (_accuracy_over_time, runs),
        "accuracy_matrices": (_accuracy_matrices, runs),
        "drift": (_drift, {name: run for name, run in runs.items() if run.drift}),
        "memory": (_memory, {name: run for name, run in runs.items() if run.memory}),
    }
    paths = []
    for kind, (plot, shown) in plots.items():
        if not shown:
            continue
        figure = Figure(layout="constrained")  # without pyplot, which would change the backend of the process
        FigureCanvasAgg(figure)
        plot(figure, shown)
        for text in figure.findobj(Text):
            text.set_parse_math(False)  # a name may hold a dollar sign
        paths.append(folder / f"{kind}.png")
        figure.savefig(paths[-1], dpi=dpi, bbox_inches="tight")  # grows with names that need more room
    return paths


def _accuracy_over_time(figure: Any, runs: Runs) -> None:
    figure.set_size_inches(8, 4.5)
    axes = figure.subplots()
    learners = [name for name, run in runs.items() if not is_joint(run) and not is_baseline(name)]
    for name, run in runs.items():
        average = [100 * value for value in average_over_updates(run)]
        if is_joint(run):
            axes.axhline(average[0], color=REFERENCE, linestyle="--", label=_wrapped(f"{name} (all data at once)"))
        else:
            color = REFERENCE if is_baseline(name) else COLORS[learners.index(name) % len(COLORS)]
            axes.plot(range(1, len(average) + 1), average, marker="o", color=color, label=_wrapped(name))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="update", ylabel="average accuracy, %", ylim=(0, 102))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _accuracy_matrices(figure: Any, runs: Runs) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("accuracy", HEAT)
    size = max(max(len(run.experiences), len(run.accuracy_matrix)) for run in runs.values())
    figure.set_size_inches(min(40, len(runs) * (2 + 0.7 * size)), min(40, 2.2 + 0.6 * size))
    for axes, (name, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        matrix = 100 * np.array(run.accuracy_matrix)
        axes.imshow(matrix, cmap=colors, vmin=0, vmax=100)
        for (t, k), score in np.ndenumerate(matrix):
            if not math.isnan(score):
                # White text where the cell is dark enough for it to be the more readable one.
                axes.text(k, t, f"{score:.0f}", ha="center", va="center", color="white" if score >= 65.5 else "black")
        axes.set_xticks(range(matrix.shape[1]), map(_wrapped, run.experiences), rotation=35, ha="right")
        rows = ["all at once"] if is_joint(run) else [str(t + 1) for t in range(len(matrix))]
        axes.set_yticks(range(len(matrix)), rows)
        axes.set(title=_wrapped(name), ylabel="after update")
        axes.spines[:].set_visible(False)


def _drift(figure: Any, runs: Runs) -> None:
    figure.set_size_inches(8, 2.6 * len(runs))
    for axes, (name, run) in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs.items(), strict=True):
        steps = running_steps(run)
        axes.plot(steps, [point["score"] for point in run.drift], color=COLORS[1], linewidth=1.2, label="score")
        axes.plot(
            steps, [point["threshold"] for point in run.drift], color=REFERENCE, linestyle="--", label="threshold"
        )
        alarms = [(step, point["score"]) for step, point in zip(steps, run.drift, strict=True) if point["alarm"]]
        axes.plot([step for step, _ in alarms], [score for _, score in alarms], "o", color=ALARM, label="alarm")
        axes.set(title=_wrapped(name, 80), xlabel="training step", ylabel="drift score")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=3)


def _memory(figure: Any, runs: Runs) -> None:
    kinds = ("per_experience", "per_class")
    longest = max(len(run.memory.get(kind, {})) for run in runs.values() for kind in kinds)
    figure.set_size_inches(10, min(40, len(runs) * (1.2 + 0.28 * longest)))
    grid = figure.subplots(len(runs), 2, squeeze=False)
    for (name, run), row in zip(runs.items(), grid, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            counts = run.memory.get(kind, {})
            bars = axes.barh(range(len(counts)), list(counts.values()), color=HEAT[1])
            axes.bar_label(bars, padding=3)
            axes.set_yticks(range(len(counts)), [_wrapped(count) for count in counts])
            axes.invert_yaxis()
            size, capacity = run.memory["size"], run.memory["capacity"]
            axes.set_title(f"{_wrapped(name, 40)}: {size:,} of {capacity:,}\n{kind.replace('_', ' ')}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)


def _wrapped(name: str, width: int = 28) -> str:
    """A name in lines of limited width, broken at spaces, hyphens and underscores where possible."""
    return (
        "\n".join(line.replace("_ ", "_") for line in wrap(name.replace("_", "_ "), width))
        if len(name) > width
        else name
    )
