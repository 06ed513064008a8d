"""A sample of the examples of the present experience, for methods that look at them once more at its end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from evertune.importance.fisher import IndexedBatch
from evertune.outputs import batch_size_of


class ExampleSampler:
    """Draws ``n_examples`` training examples of an experience, the same ones at any world size where it can.

    Where the training loader reads a map-style dataset the examples are drawn by index when they are asked for. Where
    it reads an iterable one, or where a callback splits the fit into experiences (``splits_fit``), examples cannot be
    asked for again: a uniform sample of the batches that were trained on is held instead.

    Args:
        n_examples: how many, over all ranks; fewer where the experience has fewer.
        batch_size: examples in a batch that is drawn by index.
        seed: which examples are drawn.
    """

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        self._n_examples = n_examples
        self._batch_size = batch_size
        self._seed = seed
        self.forget()

    def forget(self) -> None:
        """Let go of what was held: the next experience starts."""
        self._held: list[Any] = []
        self._seen = 0
        self._random = random.Random(self._seed)

    def see(self, trainer: pl.Trainer, batch: Any) -> None:
        """Take note of a batch that is about to be trained on (reservoir sampling; Vitter 1985)."""
        if _indexed_loader(trainer) is not None:
            return
        self._seen += 1
        room = max(1, round(self._n_examples / (batch_size_of(batch) * trainer.world_size)))
        if len(self._held) < room:
            self._held.append(batch)
        elif (slot := self._random.randrange(self._seen)) < len(self._held):
            self._held[slot] = batch

    def batches(self, trainer: pl.Trainer) -> Iterator[Any]:
        """The sample as batches on the module's device; every rank gets equally many."""
        loader = _indexed_loader(trainer)
        if loader is None:
            yield from self._held
            return
        generator = torch.Generator().manual_seed(self._seed)
        drawn = torch.randperm(len(loader.dataset), generator=generator)[: self._n_examples].tolist()  # type: ignore[arg-type]
        rank, world_size = trainer.global_rank, trainer.world_size
        collate = getattr(loader.collate_fn, "collate_fn", loader.collate_fn)  # without the replayed examples
        for start in range(0, len(drawn), self._batch_size * world_size):
            positions = range(start + rank, start + self._batch_size * world_size, world_size)
            indices = [position if position < len(drawn) else -1 for position in positions]
            indices = [i for i in indices if i >= 0] or indices[:1]
            batch = collate([loader.dataset[drawn[max(i, 0)]] for i in indices])
            yield IndexedBatch(to_device(trainer, batch), indices)


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """A collated batch as a training step gets it: through the module's transfer hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _indexed_loader(trainer: pl.Trainer) -> DataLoader[Any] | None:
    """The training loader, when the examples of this experience can be read from it again by index."""
    loader = trainer.train_dataloader
    by_index = (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
        and not any(getattr(callback, "splits_fit", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    )
    return loader if by_index else None
