"""Reading every example of a dataset once, over all ranks, in batches that do not depend on their number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from evertune._lightning import pl


def batches_of(dataset: Any, size: int, n_read: int | None = None) -> list[list[int]]:
    """The indices of the examples of a dataset, in batches of similar length if it has ``lengths``.

    Args:
        dataset: Dataset with a length.
        size: Examples of a batch.
        n_read: Number of examples to read, spread evenly over the dataset. Default: all.

    Example:
        >>> batches_of("abcdef", 2), batches_of("abcdef", 2, n_read=3)
        ([[0, 1], [2, 3], [4, 5]], [[0, 2], [4]])
    """
    n_read = len(dataset) if n_read is None else n_read
    indices = np.arange(n_read) * len(dataset) // max(n_read, 1)
    lengths = getattr(dataset, "lengths", None)
    if lengths is not None:
        indices = indices[np.argsort(np.asarray(lengths)[indices], kind="stable")]
    return [indices[start : start + size].tolist() for start in range(0, n_read, size)]


def read_once(
    trainer: pl.Trainer, dataset: Any, batches: Sequence[list[int]], collate_fn: Any, num_workers: int = 0
) -> Iterator[tuple[list[int], Any]]:
    """This rank's batches of a dataset, with the indices of their examples.

    All ranks get the same number of batches, so that each can take part in every forward pass, as ZeRO-3 requires. The
    indices of a batch are empty if it belongs to another rank: it must not be counted.

    Args:
        trainer: Trainer in training.
        dataset: Map-style dataset.
        batches: Indices of the examples of each batch, the same on all ranks.
        collate_fn: Function that collates examples into a batch.
        num_workers: Number of processes that load batches. Default: 0.
    """
    own = list(batches[trainer.global_rank :: trainer.world_size])
    missing = math.ceil(len(batches) / trainer.world_size) - len(own)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=own + list(batches[:1]) * missing, collate_fn=collate_fn, num_workers=num_workers
    )
    for number, batch in enumerate(loader):
        yield own[number] if number < len(own) else [], batch
