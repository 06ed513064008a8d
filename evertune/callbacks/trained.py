"""Which examples of a map-style dataset have been trained on, by index."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from evertune._lightning import n_started, pl, rank_zero_warn, replace_method
from evertune.utils.collectives import gather_bytes


class RecordedBatches(BatchSampler):
    """A batch sampler that notes the indices of every batch, in order to know those that were trained on.

    Worker processes load ahead: of a pass over the loader, only the first batches are counted, as many as the trainer
    has trained on since the pass began.

    Args:
        batches: Batch sampler to read from.
        n_examples: Length of the dataset.
        trainer: Trainer that counts the batches.
    """

    def __init__(self, batches: BatchSampler, n_examples: int, trainer: pl.Trainer) -> None:
        self._batches, self._trainer = batches, trainer
        self._trained = np.zeros(n_examples, dtype=bool)
        self._given: deque[list[int]] = deque()  # batches of this pass that are not counted yet
        self._first = 0  # number of the first of them in the pass
        self._counted = n_started(trainer)
        self._n_trained = 0  # examples of the counted batches
        self._n_before = 0  # examples that all ranks had trained on before this fit resumed
        self._last: list[int] = []  # the last batch counted

    def __getattr__(self, name: str) -> Any:
        if name == "_batches":
            raise AttributeError(name)
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        self._count()
        given: deque[list[int]] = deque()
        self._given, self._first = given, 0
        self.start_here()
        for indices in self._batches:
            given.append(indices)
            if given is self._given:
                self._count()
            yield indices

    def start_here(self) -> None:
        """The first batch of this pass is the next one to be trained on. Call it when a fit has resumed."""
        self._counted = n_started(self._trainer)

    def _count(self) -> None:
        while self._given and self._counted < n_started(self._trainer):
            self._last = indices = self._given.popleft()
            self._trained[indices] = True
            self._n_trained += len(indices)
            self._counted += 1
            self._first += 1

    def current(self) -> list[int]:
        """The indices of the batch that is being trained on, in its order. Call it from ``training_step`` on."""
        self._count()
        return self._last

    def index_of(self, batch: int, place: int) -> int | None:
        """The index of an example of a batch of this pass, None if the batch has been trained on."""
        batches = list(self._given)[batch - self._first :] if batch >= self._first else []
        return int(batches[0][place]) if batches and place < len(batches[0]) else None

    def trained(self) -> NDArray[np.int64]:
        """The indices that any rank has trained on, ascending. Call on every rank."""
        return np.flatnonzero(_mask(self._everyones(), len(self._trained)))

    def n_trained(self) -> int:
        """The number of examples trained on over all ranks; one that was trained on twice counts twice."""
        self._count()
        return self._n_before + self._n_trained * self._trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """The trained indices of all ranks, as bits, and how many examples were trained on. Call on every rank."""
        bits = torch.from_numpy(self._everyones())
        about = {"experience": experience_name(self._trainer), "examples": len(self._trained)}
        return {**about, "bits": bits, "n_trained": self.n_trained()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`. Call it in ``on_train_start``."""
        self.start_here()
        here, n_examples = experience_name(self._trainer), len(self._trained)
        if state["examples"] == n_examples and state["experience"] == here:
            self._trained |= _mask(state["bits"].numpy(), n_examples)
            self._n_before = state["n_trained"]  # also if two callbacks load it
            return
        was, now = state["experience"] or "its data", here or "this fit"
        rank_zero_warn(
            f"{self._trainer.ckpt_path} was written in the middle of a fit, on other data than this one: {was} had "
            f"{state['examples']} examples, {now} has {n_examples}. What it had learned of them is neither remembered "
            "nor protected; to learn new data, resume from a checkpoint of the end of a fit, or start a new fit with "
            "the weights and with what each callback wrote with save()"
        )

    def _everyones(self) -> NDArray[np.uint8]:
        self._count()
        parts = gather_bytes(np.packbits(self._trained).tobytes(), self._trainer)
        together: NDArray[np.uint8] = np.bitwise_or.reduce([np.frombuffer(part, dtype=np.uint8) for part in parts])
        return together


def _mask(bits: NDArray[np.uint8], n_examples: int) -> NDArray[np.bool_]:
    return np.unpackbits(bits, count=n_examples).astype(bool)


def reads_by_index(trainer: pl.Trainer, loader: DataLoader[Any]) -> bool:
    """Whether the examples of this experience can be read again by index.

    False if the dataset is iterable or changes within the fit (``reload_dataloaders_every_n_epochs``), if the sampler
    is a custom one, or if a callback ends experiences in the middle of a fit (``splits_fit``).
    """
    return (
        not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.batch_sampler, BatchSampler)
        and (
            isinstance(loader.sampler, RandomSampler | SequentialSampler)
            or (isinstance(loader.sampler, DistributedSampler) and loader.sampler.dataset is loader.dataset)
        )
        and not trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        and not any(getattr(callback, "splits_fit", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    )


def record_batches(trainer: pl.Trainer) -> None:
    """Have a training loader that is read by index note its batches. Call it in ``setup``."""
    strategy = trainer.strategy
    process = strategy.process_dataloader

    def process_and_record(dataloader: object) -> object:
        processed = process(dataloader)
        return recorded(processed, trainer) if trainer.training and isinstance(processed, DataLoader) else processed

    replace_method(strategy, "process_dataloader", process_and_record)


def recorded(loader: DataLoader[Any], trainer: pl.Trainer) -> DataLoader[Any]:
    """A copy of a loader that notes its batches; the loader itself if it does already, or is not read by index."""
    if not reads_by_index(trainer, loader) or isinstance(loader.batch_sampler, RecordedBatches):
        return loader
    copied = copy.copy(loader)
    # The shallow copy shares the persistent workers of the original, which read its batch sampler.
    copied._iterator = None
    dataset: Any = loader.dataset
    batches = RecordedBatches(loader.batch_sampler, len(dataset), trainer)  # type: ignore[arg-type]
    vars(copied)["batch_sampler"] = batches  # a DataLoader refuses to set it
    return copied


def recorded_batches(loader: Any) -> RecordedBatches | None:
    """The record of a training loader, or None if its examples are not read by index."""
    batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
    return batches if isinstance(batches, RecordedBatches) else None


def experience_name(trainer: pl.Trainer) -> str:
    """The name of the experience that a fit learns, or an empty string."""
    return str(getattr(getattr(trainer.datamodule, "experience", None), "name", ""))  # type: ignore[attr-defined]
