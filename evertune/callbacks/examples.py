"""A sample of the current experience's examples, for methods that need them again at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from evertune._lightning import move_data_to_device, pl, rank_zero_warn
from evertune.importance.fisher import IndexedBatch
from evertune.memory.codec import decode, encode
from evertune.utils.batches import batch_size_of, to_device
from evertune.utils.collectives import gather_bytes


class ExampleSampler:
    """Draws ``n_examples`` training examples of an experience, where possible the same ones at any world size.

    If the training loader reads a map-style dataset, the examples are drawn by index when they are requested. If it
    reads an iterable dataset, or a callback splits the fit into experiences (``splits_fit``), examples cannot be read
    again: a uniform sample of the trained batches is held instead.

    Args:
        n_examples: Number of examples over all ranks; fewer if the experience has fewer.
        batch_size: Examples per batch and rank when drawing by index.
        seed: Seed of the draw.
    """

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        self._n_examples = n_examples
        self._batch_size = batch_size
        self._seed = seed
        self.forget()

    def forget(self) -> None:
        """Release the held batches: the next experience starts."""
        self._held: list[IndexedBatch] = []
        self._seen = 0

    def see(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Consider a batch that is about to be trained on (reservoir sampling; Vitter 1985)."""
        if _loader_by_index(trainer) is not None:
            return
        self._seen += 1
        size = batch_size_of(batch)
        n_new = count_new(trainer, size, batch_idx)
        room = max(1, round(self._n_examples / (n_new * trainer.world_size)))
        slot = len(self._held)
        if slot >= room:
            # Seeded by the count of batches alone, so that all ranks replace the same slot and hold equally many
            # batches.
            slot = int(np.random.default_rng((self._seed, self._seen)).integers(self._seen))
        if slot < room:
            first = self._seen * size * trainer.world_size + trainer.global_rank
            indices = [first + i * trainer.world_size if i < n_new else -1 for i in range(size)]
            self._held[slot : slot + 1] = [IndexedBatch(batch, indices)]

    def batches(self, trainer: pl.Trainer) -> Iterator[IndexedBatch]:
        """The sample as batches on the module's device, without replayed examples; equally many on all ranks."""
        loader = _loader_by_index(trainer)
        if loader is None:
            yield from self._held
            return
        generator = torch.Generator().manual_seed(self._seed)
        drawn = torch.randperm(len(loader.dataset), generator=generator)[: self._n_examples].tolist()  # type: ignore[arg-type]
        rank, world_size = trainer.global_rank, trainer.world_size
        collate = getattr(loader.collate_fn, "collate_fn", loader.collate_fn)  # without the replayed examples
        for start in range(0, len(drawn), self._batch_size * world_size):
            end = min(start + self._batch_size * world_size, len(drawn))
            # A rank without examples in the last round computes one that does not count (-1): under ZeRO-3, all ranks
            # must run the same forward and backward passes.
            indices = list(range(start + rank, end, world_size)) or [-1]
            batch = collate([loader.dataset[drawn[index]] for index in indices])
            yield IndexedBatch(to_device(trainer, batch), indices)

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The batches held by all ranks, as tensors; empty if examples are drawn by index. Call on every rank."""
        if not self._held:
            return {}
        try:
            own = encode({"seen": self._seen, "held": [(one.batch, list(one.indices)) for one in self._held]})
        except TypeError as error:
            rank_zero_warn(
                f"a checkpoint cannot hold the batches seen so far ({error}): if a fit resumes from it, the importance "
                "is estimated on the batches that come after it"
            )
            return {}
        parts = gather_bytes(own, trainer)
        ranks = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]
        return {"ranks": ranks, "accumulation": trainer.accumulate_grad_batches}

    def load_state_dict(self, state: Mapping[str, Any], trainer: pl.Trainer) -> None:
        """Resume from :meth:`state_dict`. At another world size, the batches are redistributed evenly."""
        ranks = [decode(part.numpy().tobytes()) for part in state["ranks"]]
        if len(ranks) == trainer.world_size:
            held = ranks[trainer.global_rank]["held"]
        else:
            everyones = [one for slot in zip(*(rank["held"] for rank in ranks), strict=False) for one in slot]
            share = len(everyones) // trainer.world_size
            held = everyones[trainer.global_rank * share : (trainer.global_rank + 1) * share]
        self._seen = ranks[0]["seen"] * trainer.accumulate_grad_batches // state["accumulation"]
        device = trainer.strategy.root_device
        self._held = [IndexedBatch(move_data_to_device(batch, device), indices) for batch, indices in held]


def reads_by_index(trainer: pl.Trainer, loader: Any) -> bool:
    """Whether the examples of this experience are exactly those of a dataset that can be read again by index.

    False if the dataset is iterable, if a custom sampler may leave examples out, or if a callback ends experiences in
    the middle of a fit (``splits_fit``).
    """
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.batch_sampler, BatchSampler)
        and (
            isinstance(loader.sampler, RandomSampler | SequentialSampler)
            or (isinstance(loader.sampler, DistributedSampler) and loader.sampler.dataset is loader.dataset)
        )
        and not any(getattr(callback, "splits_fit", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    )


def count_new(trainer: pl.Trainer, n_examples: int, batch_idx: int) -> int:
    """Number of new examples in a training batch: the size of the loader's own batch. Replayed ones come after."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return n_examples
    n_new = min(n_examples, loader.batch_size)
    if isinstance(loader.sampler, Sized):
        left = len(loader.sampler) - batch_idx * loader.batch_size  # fewer than a batch at the end of an epoch
        n_new = min(n_new, left) if left > 0 else n_new
    return n_new


def _loader_by_index(trainer: pl.Trainer) -> DataLoader[Any] | None:
    loader = trainer.train_dataloader
    return loader if reads_by_index(trainer, loader) else None
