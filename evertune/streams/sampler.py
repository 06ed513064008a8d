"""A sampler with one order of the examples for all ranks, which batches examples of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


class BucketSampler(DistributedSampler[Any]):
    """Deals the examples of every optimizer step to the ranks, in an order that does not depend on their number.

    An epoch is one flat sequence: a permutation by ``(seed, epoch)``, sorted by length within chunks of 50 steps, with
    the steps shuffled. Rank ``r`` of ``n`` takes ``sequence[r::n]``. For the same ``step_size``, the examples of a step
    are therefore the same on any number of ranks and at any accumulation, and all ranks get the same number of batches.

    With ``classes``, an epoch has as many examples as without, and equally many of each class: those of a small class
    are repeated, all equally often but for one time, and of a large one some are left for another epoch.

    It is a ``DistributedSampler``, so Lightning does not replace it and calls its ``set_epoch``.

    Args:
        dataset: Dataset to sample; only its length is used.
        step_size: Examples in one optimizer step: batch size x ranks x accumulated batches.
        lengths: Length of each example; None (default) only shuffles.
        classes: Class of each example, to draw all classes equally often. None (default) draws all examples.
        num_replicas: Number of ranks. Default: 1.
        rank: Rank of this process. Default: 0.
        seed: Seed of the order, the same on all ranks. Default: 0.
        drop_last: Whether to leave out the examples that do not fill a step. By default the last step is filled with
            others of the epoch, drawn at random, so that every step has the same size.

    Raises:
        ValueError: If the number of ranks does not divide the step size, or ``drop_last`` leaves nothing.

    Example:
        >>> from evertune.streams import BucketSampler
        >>> ranks = [BucketSampler(range(10), step_size=4, num_replicas=2, rank=rank) for rank in (0, 1)]
        >>> [len(rank) for rank in ranks]
        [6, 6]
        >>> one = list(BucketSampler(range(10), step_size=4))
        >>> one[0::2] == list(ranks[0]) and one[1::2] == list(ranks[1])
        True
    """

    chunk_steps = 50
    on_pass: Callable[[np.ndarray, int], None] | None = None
    """Called in the training process at the start of a pass, with :meth:`sequence` and the rank's first index in it."""

    def __init__(
        self,
        dataset: Any,
        step_size: int,
        lengths: Sequence[int] | None = None,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=drop_last)
        if step_size < 1 or step_size % num_replicas:
            raise ValueError(f"step_size must be a positive multiple of the {num_replicas} ranks, got {step_size}")
        self.step_size = step_size
        self.n_examples = len(dataset)
        self.lengths = None if lengths is None else np.asarray(lengths)
        self._class_of = (
            None if classes is None else np.unique(np.asarray(classes, dtype=object), return_inverse=True)[1]
        )
        steps = self.n_examples // step_size if drop_last else -(-self.n_examples // step_size)
        if steps == 0:
            raise ValueError(
                f"drop_last leaves nothing: {self.n_examples} examples do not fill one step of {step_size}; "
                "lower the batch size, or keep the last step"
            )
        self.total_size = steps * step_size
        self.num_samples = self.total_size // num_replicas
        self.start = 0

    def sequence(self) -> np.ndarray:
        """The examples of the epoch in order, for all ranks together."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = self._draws(generator)
        if self.lengths is None:
            return order
        chunk = self.chunk_steps * self.step_size
        chunks = [order[start : start + chunk] for start in range(0, len(order), chunk)]
        # Sorted within chunks only, not over the epoch, so that which examples form a step still changes with every
        # epoch.
        steps = [part[np.argsort(self.lengths[part], kind="stable")].reshape(-1, self.step_size) for part in chunks]
        return generator.permutation(np.concatenate(steps)).ravel()

    @property
    def weights(self) -> np.ndarray | None:
        """How often each example is drawn in relation to the others, float64 ``[examples]``; None if all alike."""
        if self._class_of is None:
            return None
        weights: np.ndarray = 1 / np.bincount(self._class_of)[self._class_of]
        return weights

    def _draws(self, generator: np.random.Generator) -> np.ndarray:
        """The examples of the epoch, in random order."""
        if self._class_of is None:
            return np.resize(generator.permutation(self.n_examples), self.total_size)  # repeats or truncates
        numbers = generator.permutation(self._class_of.max() + 1)  # which classes have one draw more is random
        drawn = [
            np.resize(generator.permutation(np.flatnonzero(self._class_of == number)), len(share))
            for number, share in zip(numbers, np.array_split(np.empty(self.total_size), len(numbers)), strict=True)
        ]
        return generator.permutation(np.concatenate(drawn))

    def __iter__(self) -> Iterator[int]:
        """The rank's examples, starting with the one at index ``start``."""
        sequence = self.sequence()
        if self.on_pass is not None:
            self.on_pass(sequence, self.start)
        return iter(sequence[self.rank :: self.num_replicas][self.start :].tolist())


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The indices of examples by descending length, so that a batch needs little padding.

    The longest come first: if they take more memory than there is, this shows at once.

    Example:
        >>> longest_first([3, 9, 3, 7])
        [1, 3, 0, 2]
    """
    indices: list[int] = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return indices


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` over a :class:`BucketSampler` that Lightning can save and resume in the middle of an epoch.

    Its state is the epoch and the number of batches yielded in it. Its iterator starts at the first batch, when the
    epoch is known, and draws nothing from the global random generator.

    Args:
        dataset: Map-style dataset.
        sampler: :class:`BucketSampler` that chooses and orders the examples.
        **kwargs: Arguments of ``DataLoader``.
    """

    def __init__(self, dataset: Dataset[Any], *, sampler: Any, **kwargs: Any) -> None:
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(dataset, sampler=sampler, **kwargs)
        self._position = (0, 0)
        self._resume_at = (0, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler, batch_size = self.sampler, self.batch_size
        if not isinstance(sampler, BucketSampler):  # `Trainer(overfit_batches=...)` replaces it
            yield from super().__iter__()
            return
        assert batch_size is not None and self.generator is not None
        epoch = sampler.epoch
        resumed_epoch, given = self._resume_at
        self._resume_at = (0, 0)
        if resumed_epoch != epoch:
            given = 0
        sampler.start = given * batch_size
        self.generator.manual_seed(sampler.seed + epoch)
        for batch in super().__iter__():
            given += 1
            self._position = (epoch, given)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch: its epoch and its index in the epoch."""
        epoch, batch = self._position
        if batch == len(self):
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass at this position, if it is over the same epoch."""
        self._position = self._resume_at = (state["epoch"], state["batch"])
        if isinstance(self.sampler, BucketSampler):
            self.sampler.set_epoch(state["epoch"])
