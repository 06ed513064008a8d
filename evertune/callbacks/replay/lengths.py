"""How long the new examples of each step are, so that examples of about the same length are replayed beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from evertune.streams.sampler import BucketSampler


class StepLengths:
    """The length of the longest new example of each step of an epoch, over all ranks.

    A :class:`~evertune.streams.BucketSampler` reports its order to the training process when a pass begins; loader
    processes read the lengths from shared memory.

    Args:
        sampler: Sampler of the training loader, which knows the lengths of its examples.
        batch_size: Batch size of the loader.
        n_batches: Number of batches in an epoch.
        first_batch: Function that returns the number of the current iterator's first batch, counted over the fit.
    """

    def __init__(self, sampler: BucketSampler, batch_size: int, n_batches: int, first_batch: Callable[[], int]) -> None:
        n_steps, lengths = sampler.total_size // sampler.step_size, sampler.lengths
        assert lengths is not None
        self._per_step = sampler.step_size // (sampler.num_replicas * batch_size)
        self._n_batches = n_batches
        self._first = torch.zeros(1, dtype=torch.int64)
        self._lengths = torch.zeros(n_steps, dtype=torch.int64)
        self._first.share_memory_()  # type: ignore[no-untyped-call]
        self._lengths.share_memory_()  # type: ignore[no-untyped-call]

        def note(sequence: NDArray[np.int64], start: int) -> None:
            self._lengths.copy_(torch.from_numpy(lengths[sequence].reshape(n_steps, -1).max(axis=1)))
            self._first[0] = first_batch() - start // batch_size

        self._sampler = sampler
        sampler.on_pass = note

    @classmethod
    def of(
        cls, loader: DataLoader[Any], batch_size: int | None, limit: float, first_batch: Callable[[], int]
    ) -> StepLengths | None:
        """Those of a training loader; None if its sampler does not know them.

        Args:
            loader: The loader.
            batch_size: Its batch size; None if it varies.
            limit: Number of batches in an epoch at most, or the share of them as a float.
            first_batch: As for the class.
        """
        sampler = loader.sampler
        if not isinstance(sampler, BucketSampler) or sampler.lengths is None or batch_size is None:
            return None
        if sampler.step_size % (sampler.num_replicas * batch_size):
            return None
        n_batches = len(loader)
        n_batches = min(n_batches, limit) if isinstance(limit, int) else int(n_batches * limit)
        return cls(sampler, batch_size, n_batches, first_batch)

    def release(self) -> None:
        """Let the sampler go."""
        self._sampler.on_pass = None

    @property
    def first(self) -> int:
        """The number of the epoch's first batch."""
        return int(self._first)

    def covers(self, batch: int) -> bool:
        """Whether a batch is trained on in this epoch; loader processes may load others ahead."""
        return 0 <= batch - self.first < self._n_batches

    def from_batch(self, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The batches of this epoch from ``batch`` on: their numbers, counted from it, and their lengths."""
        begin = max(batch - self.first, 0)
        numbers = np.arange(begin, self._n_batches)
        return numbers + self.first - batch, self._lengths.numpy()[numbers // self._per_step]
