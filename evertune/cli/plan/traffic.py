"""What training sends, by formula: bytes in an optimizer step, and at the end of an experience."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evertune.cli.plan.cuts import parts, pieces, rows_of
from evertune.cli.plan.shape import ModelShape
from evertune.cli.plan.training import Training


@dataclass(frozen=True)
class Collective:
    """One kind of collective communication in an optimizer step.

    Args:
        operation: Name of the collective.
        size: Bytes of the whole buffer, the parts of all ranks together. May be the sum over several calls.
        times: How often a buffer of this size is communicated in a step.
        what: What is communicated, as in ``"gradients"``.
    """

    operation: Literal["all_reduce", "all_gather", "reduce_scatter"]
    size: int
    times: int
    what: str

    def sent(self, world_size: int, *, gloo: bool = False) -> float:
        """Bytes that each rank sends by the ring algorithm (Patarasuk & Yuan 2009); it receives the same number.

        An all-gather or a reduce-scatter sends ``(n - 1) / n`` of the buffer; an all-reduce consists of both. gloo has
        no reduce-scatter: there it costs as much as an all-reduce.

        Args:
            world_size: Number of ranks.
            gloo: Whether the ranks communicate over gloo.

        >>> Collective("all_reduce", 1000, 1, "gradients").sent(4), Collective("all_gather", 1000, 2, "weights").sent(4)
        (1500.0, 1500.0)
        """
        rounds = 2 if self.operation == "all_reduce" or (gloo and self.operation == "reduce_scatter") else 1
        return self.times * rounds * self.size * (world_size - 1) / world_size


def collectives(model: ModelShape, training: Training) -> list[Collective]:
    """What a rank communicates in an optimizer step.

    - DDP all-reduces the gradients once, whatever the accumulation.
    - ZeRO-1 and 2 all-reduce the gradients (DeepSpeed's default ``use_multi_rank_bucket_allreduce``, where the paper
      has a reduce-scatter), at stage 2 in each micro-batch, and gather the weights after the step.
    - ZeRO-3 and FSDP2 gather the weights in each forward and each backward pass (ZeRO-3 frozen ones in the forward pass
      only, FSDP2 those outside of all blocks once for both), and reduce-scatter the gradients in each micro-batch.
    - OSFT all-reduces two matrices for each that it protects, where weights are divided.

    Methods communicate at the end of an experience instead: see :func:`consolidation`. Losses, norms and checks take a
    few bytes and are left out, except for what ``Preemption`` adds.
    """
    width, n = training.widths, training.world_size
    moves: list[Collective] = []
    if n > 1 and training.stage == 0:
        moves = [Collective("all_reduce", width.gradient * model.trainable, 1, "gradients")]
    elif n > 1 and training.stage < 3:
        padded = sum(n * part for part in parts(model.groups, n))
        times = training.accumulation if training.stage == 2 else 1
        moves = [
            Collective("all_reduce", width.gradient * model.trainable, times, "gradients"),
            Collective("all_gather", width.weight * padded, 1, "weights"),
        ]
    elif n > 1 and training.fsdp2:
        *groups, frozen = (n * rows_of(*group, n) for group in model.rows_by_group())
        trained = sum(groups)
        gathered = 2 * (trained + frozen) - model.root[0]
        moves = [
            Collective("all_gather", width.weight * gathered, training.accumulation, "weights"),
            Collective("reduce_scatter", width.gradient * trained, training.accumulation, "gradients"),
        ]
    elif n > 1:
        trained, frozen = n * pieces(model.trainable_sizes, n), n * pieces(model.frozen, n)
        moves = [
            Collective("all_gather", width.weight * (2 * trained + frozen), training.accumulation, "weights"),
            Collective("reduce_scatter", width.gradient * trained, training.accumulation, "gradients"),
        ]
    if n > 1 and training.stage > 0 and training.rank_ratio:
        sent = sum(2 * int(training.rank_ratio * min(rows, columns)) * columns for rows, columns in model.protected)
        moves.append(Collective("all_reduce", 4 * sent, 1, "protected directions"))
    if n > 1 and training.preemption:
        moves.append(Collective("all_reduce", 1, training.accumulation, "preemption"))
    return moves


def consolidation(model: ModelShape, training: Training, *, n_classes: int, n_examples: int = 500) -> list[Collective]:
    """What is communicated once, at the end of an experience, to estimate the importance of the weights.

    If the weights are sharded, each backward pass of the estimation all-reduces the squared gradient of each weight in
    fp32. There is one pass for each class but one (above 32 classes a single pass) for each batch of ``n_examples``.
    ZeRO-3 also gathers the weights for each pass, forward and backward. DDP all-reduces the sum once.

    Args:
        model: Sizes of the model.
        training: How the model is trained.
        n_classes: Number of classes of the head.
        n_examples: Number of examples that the importance is estimated on, over all ranks.
    """
    n = training.world_size
    if n == 1 or not training.estimation_batch_size:
        return []
    if training.stage == 0:
        return [Collective("all_reduce", 4 * model.trainable, 1, "importance")]
    passes = max(n_classes - 1, 1) if n_classes <= 32 else 1
    times = passes * -(-n_examples // (training.estimation_batch_size * n))
    moves = [Collective("all_reduce", 4 * model.trainable, times, "importance")]
    if training.stage == 3:
        held = sum(rows_of(*group, n) for group in model.rows_by_group()) if training.fsdp2 else pieces(model.sizes, n)
        moves.append(Collective("all_gather", 2 * training.widths.weight * n * held, times, "weights"))
    return moves
