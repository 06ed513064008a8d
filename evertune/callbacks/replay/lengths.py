"""How long the new examples of each step are, so that examples of about the same length are replayed beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

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

        sampler.on_pass = note

    @classmethod
    def known(cls, sampler: object, batch_size: int | None) -> bool:
        """Whether a loader with this sampler and batch size has steps of known lengths."""
        return (
            isinstance(sampler, BucketSampler)
            and sampler.lengths is not None
            and batch_size is not None
            and sampler.step_size % (sampler.num_replicas * batch_size) == 0
        )

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
