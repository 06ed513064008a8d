"""A plan as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from evertune.cli.plan.gpus import GIB, in_gib
from evertune.cli.plan.request import Request
from evertune.cli.plan.shape import ModelShape
from evertune.cli.plan.strategies import Row
from evertune.cli.plan.traffic import consolidation
from evertune.cli.plan.training import STRATEGIES
from evertune.utils.terminal import console

_PREFIX = "evertune_deepspeed_"


def as_json(
    shape: ModelShape, request: Request, rows: Sequence[Row], choice: Row | None, advice: Sequence[str]
) -> dict[str, Any]:
    """The content of the table for programs; all sizes are in bytes."""
    return {
        "model": request.model["model_name_or_path"],
        "parameters": shape.total,
        "trainable": shape.trainable,
        "nodes": request.nodes,
        "gpus": request.gpus,
        "gpu_memory": round(request.memory),
        "training": {
            name: value
            for name, value in asdict(request.training).items()
            if name not in ("stage", "fsdp2", "world_size")
        },
        "strategies": [
            {
                "strategy": row.strategy,
                **asdict(row.footprint),
                "sent_per_step": round(row.sent),
                "fits": row.fits,
            }
            for row in rows
        ],
        "choice": None if choice is None else choice.strategy,
        "would_fit": list(advice),
        "notes": list(request.notes),
    }


def print_plan(
    shape: ModelShape, request: Request, rows: Sequence[Row], choice: Row | None, advice: Sequence[str]
) -> None:
    """Print the table, and whether the model fits or what would."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    training, screen = request.training, console()
    screen = screen if screen.is_terminal else console(width=100)  # the table needs more than the 80 of a pipe
    trained = f", {shape.trainable / shape.total:.0%} of them trained" if shape.frozen else ""
    screen.print(
        f"{request.model['model_name_or_path']}: {shape.total / 1e6:,.1f} million parameters{trained}; "
        f"{request.nodes} x {request.gpus} GPUs of {in_gib(request.memory)}; {training.precision}; "
        f"{training.examples} examples of {training.seq_length} tokens on each GPU"
        + (f", {training.examples - training.batch_size} of them replayed" if training.replay_ratio else "")
        + (f"; accumulated {training.accumulation} times" if training.accumulation > 1 else ""),
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for column in ("weights", "grads", "optim.", "methods", "activ.", "buffers", "peak", "host", "sent"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        costs = row.footprint
        parts = (costs.weights, costs.gradients, costs.optimizer, costs.methods)
        sizes = (*parts, costs.activations, costs.buffers, costs.total, costs.host, row.sent)
        style = "bold" if row is choice else None
        gib = (f"{size / GIB:.{2 if size < 100 * GIB else 0}f}" for size in sizes)
        table.add_row(
            row.strategy.removeprefix(_PREFIX).removeprefix("evertune_"), *gib, "yes" if row.fits else "no", style=style
        )
    screen.print(table)
    screen.print(
        f"In GiB. stage_N: strategy={_PREFIX}stage_N. peak: the fullest moment of a GPU, not all parts at once; a "
        "tenth of the GPU must stay free. host: of each process. sent: by each GPU in an optimizer step, which gets as "
        "much.",
        soft_wrap=True,
    )
    # Without a choice, the last strategy stands in: the note should not disappear where nothing fits.
    if training.estimation_batch_size and request.world_size > 1:
        sharding = STRATEGIES[(choice or rows[-1]).strategy]
        own = replace(training, **sharding._asdict(), world_size=request.world_size)
        moves = consolidation(shape, own, n_classes=request.n_classes, n_examples=request.n_examples)
        once = sum(move.sent(request.world_size) for move in moves)
        screen.print(f"Estimating the importance sends {in_gib(once)} more at the end of each experience.")
    if training.memory_size:
        disk = f"{rows[0].footprint.disk / 2**20:,.1f} MiB"
        screen.print(f"The replay memory takes up to {disk} on the disk of each node, which its processes map.")
    for note in request.notes:
        screen.print(f"Note: {note}.", soft_wrap=True)
    if choice is not None:
        screen.print(f"It fits: {choice.strategy}.")
        return
    asked = f"{request.strategy} does not fit." if request.strategy else "Nothing fits."
    screen.print(asked + (" What would:" if advice else " Nor would more GPUs, smaller batches or frozen layers."))
    for line in advice:
        screen.print(f"- {line}", soft_wrap=True)
