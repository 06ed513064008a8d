"""What a model takes under each strategy, which one to choose, and what would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evertune.cli.plan.gpus import in_gib
from evertune.cli.plan.memory import Footprint, footprint
from evertune.cli.plan.request import Request
from evertune.cli.plan.shape import GENERATION, ModelShape
from evertune.cli.plan.traffic import Collective, collectives
from evertune.cli.plan.training import STRATEGIES

RESERVE = 0.1
"""Share of a GPU's memory that is left for CUDA, NCCL and fragmentation."""

_MOST_GPUS = 4096  # in all, up to which more nodes are tried


@dataclass(frozen=True)
class Row:
    """One strategy of the plan.

    Args:
        strategy: Name of the strategy.
        footprint: Memory of the rank that holds most.
        moves: Collectives of an optimizer step.
        sent: Bytes that each rank sends in an optimizer step.
        fits: Whether the peak leaves :data:`RESERVE` of the GPU's memory free.
    """

    strategy: str
    footprint: Footprint
    moves: list[Collective]
    sent: float
    fits: bool


def rows_of(shape: ModelShape, request: Request) -> list[Row]:
    """The cost of each strategy, in the order of :data:`STRATEGIES`."""
    rows = []
    for name, sharding in STRATEGIES.items():
        training = replace(request.training, **sharding._asdict(), world_size=request.world_size)
        costs, moves = footprint(shape, training), collectives(shape, training)
        sent = sum(move.sent(request.world_size) for move in moves)
        rows.append(Row(name, costs, moves, sent, costs.total <= request.memory * (1 - RESERVE)))
    return rows


def choose(rows: Sequence[Row], strategy: str | None = None) -> Row | None:
    """The fastest strategy that fits, or the one that is asked for if it fits; None if there is none."""
    return next((row for row in rows if row.fits and strategy in (None, row.strategy)), None)


def what_would_fit(shape: ModelShape, request: Request) -> list[str]:
    """Changes that make the model fit, each on its own, as lines of text."""
    found = []
    others = choose(rows_of(shape, request))
    if others is not None:  # so the configuration names a strategy that does not fit
        found.append(f"strategy {others.strategy}: {in_gib(others.footprint.total)}")
    nodes = request.nodes
    while (nodes := 2 * nodes) * request.gpus <= _MOST_GPUS:
        more = choose(rows_of(shape, replace(request, nodes=nodes)), request.strategy)
        if more is not None:
            found.append(f"{nodes} nodes of {request.gpus}, {more.strategy}: {in_gib(more.footprint.total)}")
            break
    batch = request.training.batch_size
    while batch > 1:
        batch //= 2
        # More accumulation, so that a step still has as many examples and the result stays comparable.
        times = request.training.accumulation * request.training.batch_size // batch
        smaller = replace(request.training, batch_size=batch, accumulation=times)
        row = choose(rows_of(shape, replace(request, training=smaller)), request.strategy)
        if row is not None:
            words = f"batch size {batch} with accumulate_grad_batches={times}"
            found.append(f"{words}, {row.strategy}: {in_gib(row.footprint.total)}")
            break
    if request.training.estimation_batch_size > 1:
        one = replace(request, training=replace(request.training, estimation_batch_size=1))
        row = choose(rows_of(shape, one), request.strategy)
        if row is not None:
            found.append(
                f"batch_size 1 when the importance is estimated, {row.strategy}: {in_gib(row.footprint.total)}"
            )
    frozen_parts = [("half of the layers frozen", shape.layers // 2)]
    if request.module not in GENERATION:  # which have no head
        frozen_parts.append(("only the head trained", -1))
    for name, frozen in frozen_parts:
        if frozen and not request.model.get("freeze_layers") and not shape.adapted:
            fewer = request.shape(freeze_layers=frozen)
            row = choose(rows_of(fewer, request), request.strategy)
            if row is not None:
                found.append(f"{name} (--freeze_layers {frozen}), {row.strategy}: {in_gib(row.footprint.total)}")
                break
    return found
