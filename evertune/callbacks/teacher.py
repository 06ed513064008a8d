"""What a model says about many examples, computed once by all ranks together and then stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.step_logits import counted_rows
from evertune.memory.logits import LOGITS, StoredLogits, from_bytes, to_bytes
from evertune.shards.opened import shards_of
from evertune.shards.support import is_deepspeed
from evertune.streams.sampler import longest_first
from evertune.tasks.base import Outputs, task_of
from evertune.utils.collectives import gather_bytes
from evertune.utils.evaluation import evaluation_mode, trial

Lengths = Sequence[int] | NDArray[np.int64]

_ADVICE = "give the module a task, a Task whose outputs() returns them"


def batch_size(trainer: pl.Trainer) -> int:
    """Examples in a batch of which no gradients are needed: twice those of a training batch, in the same memory."""
    return 2 * (getattr(trainer.train_dataloader, "batch_size", None) or 32)


def by_length(indices: Sequence[int], lengths: Lengths | None) -> list[int]:
    """The same examples, the longest first, so that a batch needs little padding; as they are without ``lengths``.

    Example:
        >>> by_length([2, 0, 3], [4, 9, 5, 7])
        [3, 2, 0]
    """
    if lengths is None:
        return list(indices)
    return [indices[place] for place in longest_first([lengths[index] for index in indices])]


def rounds(indices: Sequence[int], trainer: pl.Trainer, size: int | None = None) -> Iterator[tuple[list[int], bool]]:
    """Batches of this rank, equally many on all ranks; False with one that is too many.

    Whole batches go to the ranks in turn, so that an example is padded as on one process. They have ``size`` examples,
    by default :func:`batch_size`.
    """
    size = size or batch_size(trainer)
    batches = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
    for start in range(0, len(batches), trainer.world_size):
        mine = start + trainer.global_rank
        yield (batches[mine], True) if mine < len(batches) else (batches[0][:1], False)


def logits_of_examples(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    indices: Sequence[int],
    batch_of: Callable[[list[int]], Any],
    who: str,
    *,
    lengths: Lengths | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    rows: Callable[[pl.LightningModule, Any], tuple[Tensor, Tensor]] | None = None,
) -> pa.StructArray:
    """The logits of examples in evaluation mode, in their order, the same on all ranks. Call on every rank.

    Args:
        indices: Numbers of the examples.
        batch_of: The batch of some of them, on the device.
        who: Name of the callback, for the error message.
        lengths: Length of every example by its number, if known.
        top_k: Number of logits to keep of each row; None for all.
        temperature: At which the others are summed up.
        rows: Function ``(module, batch) -> rows [R, classes], number of rows of each example``. By default those of
            the module's task.
    """
    parts, rows, ordered = [pa.array([], LOGITS)], rows or logit_rows, by_length(indices, lengths)
    what = f"{who} cannot compute the logits of {type(module).__name__}"
    with trial(what, _ADVICE), evaluation_mode(module), trainer.precision_plugin.val_step_context():
        for chosen, counts in rounds(ordered, trainer):
            stored = StoredLogits.of(*rows(module, batch_of(chosen)), top_k, temperature)
            if counts:
                parts.append(stored.to_arrow())
    if is_deepspeed(trainer):
        shards_of(trainer).release()
    everyones = [from_bytes(part) for part in gather_bytes(to_bytes(pa.concat_arrays(parts)), trainer)]
    # Batch b is on rank b % world_size, as number b // world_size there.
    size, world = batch_size(trainer), trainer.world_size
    n_batches = -(-len(indices) // size)
    answers = [
        everyones[number % world].slice(number // world * size, size if number < n_batches - 1 else None)
        for number in range(n_batches)
    ]
    places = {index: place for place, index in enumerate(ordered)}
    together = pa.concat_arrays(answers or [pa.array([], LOGITS)])
    return together.take(pa.array([places[index] for index in indices], pa.int64()))


def outputs_of(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, who: str) -> Outputs:
    """The logits and targets of a batch in evaluation mode, as the module's task finds them. Call on every rank."""
    with (
        trial(f"{who} cannot compute the logits of {type(module).__name__}", _ADVICE),
        evaluation_mode(module),
        trainer.precision_plugin.val_step_context(),
    ):
        outputs = task_of(module).outputs(module, batch)
    if is_deepspeed(trainer):
        shards_of(trainer).release()
    return outputs


def logit_rows(module: pl.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """The logits that the module's task finds, a row for each position that counts."""
    return counted_rows(task_of(module).outputs(module, batch))


def sum_over_examples(per_row: Tensor, n_rows: Tensor) -> Tensor:
    """The sum over examples of the mean over each one's rows: a scalar.

    Example:
        >>> sum_over_examples(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 1]))
        tensor(7.)
    """
    weights = torch.repeat_interleave(1.0 / n_rows, n_rows).to(per_row)
    return (per_row * weights).sum()
