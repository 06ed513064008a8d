"""A sample of the current experience's examples, for methods that need them again at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from evertune._lightning import move_data_to_device, pl, rank_zero_warn, return_method
from evertune.callbacks.trained import record_batches, recorded_batches
from evertune.importance.fisher import IndexedBatch
from evertune.memory.codec import decode, encode
from evertune.utils.batches import batch_size_of, take, to_device
from evertune.utils.collectives import gather_bytes


class ExampleSampler:
    """Draws ``n_examples`` training examples of an experience, where possible the same ones at any world size.

    If the training loader reads a map-style dataset, the examples are drawn by index when they are requested, among
    those that have been trained on. If it reads an iterable dataset, or a callback splits the fit into experiences
    (``splits_fit``), examples cannot be read again: a uniform sample of the trained batches is held instead.

    Args:
        n_examples: Maximum number of examples over all ranks; fewer if the experience has fewer.
        batch_size: Examples per batch and rank when drawing by index.
        seed: Seed of the draw.
    """

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        self._n_examples = n_examples
        self._batch_size = batch_size
        self._seed = seed
        self.forget()

    def setup(self, trainer: pl.Trainer) -> None:
        """Start a fit: forget the one before, which may have failed."""
        self.forget()
        self._ended = False  # whether the record of what was trained on belongs to an experience that has ended
        self._resumed: Mapping[str, Any] | None = None
        record_batches(trainer)

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Resume the record of what has been trained on."""
        batches = recorded_batches(trainer.train_dataloader)
        if batches is None:
            return
        batches.start_here()
        if self._resumed is not None:
            batches.load_state_dict(self._resumed)

    def teardown(self, trainer: pl.Trainer) -> None:
        """Restore the strategy."""
        return_method(trainer.strategy, "process_dataloader")

    def forget(self) -> None:
        """Release the held batches: the next experience starts."""
        self._held: list[IndexedBatch] = []
        self._seen = 0
        self._ended = True

    def see(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Consider a batch that has been trained on (reservoir sampling; Vitter 1985)."""
        if recorded_batches(trainer.train_dataloader) is not None:
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

    def counts(self, trainer: pl.Trainer) -> tuple[int, int]:
        """The number of examples in the sample, and of all examples trained on in this experience, over all ranks.

        An example that was trained on twice counts twice in the second. Both are the same at any world size. Call on
        every rank.
        """
        batches = recorded_batches(trainer.train_dataloader)
        if batches is not None:
            return min(len(batches.trained()), self._n_examples), batches.n_trained()
        n_held = self._n_held(trainer)
        return n_held, round(self._seen * n_held / max(len(self._held), 1))

    def batches(self, trainer: pl.Trainer, n_examples: int) -> Iterator[IndexedBatch]:
        """The sample as batches on the module's device, without replayed examples; equally many on all ranks.

        Args:
            trainer: Trainer of the experience that ends.
            n_examples: Number of examples to draw from the sample, over all ranks; at least one on each rank if batches
                are held.
        """
        loader: Any = trainer.train_dataloader
        batches = recorded_batches(loader)
        if batches is None:
            yield from self._some_held(trainer, n_examples)
            return
        order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(self._seed)).numpy()
        drawn = order[np.isin(order, batches.trained())][:n_examples].tolist()
        rank, world_size = trainer.global_rank, trainer.world_size
        collate = getattr(loader.collate_fn, "collate_fn", loader.collate_fn)  # without the replayed examples
        for start in range(0, len(drawn), self._batch_size * world_size):
            end = min(start + self._batch_size * world_size, len(drawn))
            # A rank without examples in the last round computes one that does not count (-1): under ZeRO-3, all ranks
            # must run the same forward and backward passes.
            indices = list(range(start + rank, end, world_size)) or [-1]
            batch = collate([loader.dataset[drawn[index]] for index in indices])
            yield IndexedBatch(to_device(trainer, batch), indices)

    def _n_held(self, trainer: pl.Trainer) -> int:
        """The number of examples held by all ranks. Call on every rank."""
        own = sum(index >= 0 for batch in self._held for index in batch.indices)
        return sum(int(part) for part in gather_bytes(str(own).encode(), trainer))

    def _some_held(self, trainer: pl.Trainer, n_examples: int) -> Iterator[IndexedBatch]:
        """Held batches, drawn at random, with about as many examples over all ranks; equally many on all ranks."""
        n_held = self._n_held(trainer)
        if n_examples >= n_held:
            yield from self._held
            return
        n_batches = max(1, len(self._held) * n_examples // n_held)
        room = max(1, n_examples // (n_batches * trainer.world_size))
        # Seeded by the count of batches alone, so that all ranks draw the same slots.
        for slot in np.random.default_rng((self._seed, self._seen)).permutation(len(self._held))[:n_batches]:
            indices = self._held[slot].indices
            rows = [row for row, index in enumerate(indices) if index >= 0][:room] or [0]
            yield IndexedBatch(take(self._held[slot].batch, rows, len(indices)), [indices[row] for row in rows])

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The batches held by all ranks, or the indices that they have trained on, as tensors. Call on every rank."""
        batches = recorded_batches(trainer.train_dataloader)
        if batches is not None:
            return {} if self._ended else {"trained": batches.state_dict()}
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
        if "trained" in state:
            self._resumed = state["trained"]  # until the loader is there
            return
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
