"""The part of replay that runs in the loader processes: past examples are added to the present ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info

from evertune.callbacks.replay.lengths import StepLengths
from evertune.callbacks.replay.spool import Capture, Spool
from evertune.memory.codec import StorableCheck
from evertune.memory.draws import Draws
from evertune.memory.memory import working_file
from evertune.memory.view import MemoryView

_NEVER = 1 << 62
UNSTORABLE = "Replay cannot store example {} of batch {}"
"""The beginning of the message about an example that is refused; batches are numbered over the whole fit."""


class Schedule:
    """State that the training process shares with its loader processes, in shared memory.

    Batches are numbered over the whole fit. Each iterator over the loader and each update has a first batch. An update
    is announced before any loader process can reach its first batch, so that all of them switch at the same one.
    """

    def __init__(self) -> None:
        # iterator: count, first batch; then two updates: first batch, number, generation of the memory
        self._cells = torch.tensor([0, 0, _NEVER, 0, 0, _NEVER, 0, 0], dtype=torch.int64)
        self._cells.share_memory_()  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Clear the updates. No iterator may be running."""
        self._cells[2] = self._cells[5] = _NEVER

    def start_iterator(self, first_batch: int) -> None:
        """Announce a new iterator over the loader. No other may be running."""
        # The count is written last: a worker restarts its numbering at the first batch when the count changes.
        self._cells[1] = first_batch
        self._cells[0] += 1

    def start_update(self, first_batch: int, update: int, generation: int) -> None:
        """From ``first_batch`` on, draw from the memory of ``generation`` in the order of ``update``."""
        cells = self._cells.tolist()
        # Overwrite the older of the two updates: loader processes may still need the newer one.
        row = 2 if cells[2] == _NEVER or (cells[5] != _NEVER and cells[2] < cells[5]) else 5
        # Disable the row while it is changed: a worker must never see a first batch with another update's numbers.
        self._cells[row] = _NEVER
        self._cells[row + 1], self._cells[row + 2] = update, generation
        self._cells[row] = first_batch

    def iterator(self) -> tuple[int, int]:
        """The number of the current iterator, and its first batch."""
        count, first, *_ = self._cells.tolist()
        return count, first

    def update_at(self, batch: int) -> tuple[int, int, int] | None:
        """The first batch, number and generation of the update that a batch belongs to."""
        cells = self._cells.tolist()
        begun = [tuple(cells[row : row + 3]) for row in (2, 5) if cells[row] <= batch]
        return max(begun) if begun else None


def restarting(loader: DataLoader[Any], schedule: Schedule) -> None:
    """Count the batches of a loader that is combined with others, which may restart it in the middle of an epoch.

    The schedule announces the first iterator of an epoch. The batches of further ones continue the numbering of the
    previous iterator.
    """

    class Restarting(type(loader)):  # type: ignore[misc]
        announced, given = 0, 0  # the last iterator announced, and its number of batches

        def __iter__(self) -> Iterator[Any]:
            count, first = schedule.iterator()
            if count == self.announced:
                schedule.start_iterator(first + self.given)
            self.announced, self.given = schedule.iterator()[0], 0
            for batch in super().__iter__():
                self.given += 1
                yield batch

    # Python looks up __iter__ on the class, so it cannot be replaced on the instance.
    loader.__class__ = Restarting


class Joined(NamedTuple):
    """What a batch consists of, in this order.

    Args:
        n_new: Number of new examples.
        slots: Slots of the replayed examples.
        view: The memory that they are in.
        extra: Indices of the examples of the extra dataset.
    """

    n_new: int
    slots: list[int]
    view: MemoryView
    extra: list[int]

    @property
    def replayed(self) -> slice:
        """The rows of the replayed examples."""
        return slice(self.n_new, self.n_new + len(self.slots))


class Extra(NamedTuple):
    """Examples that are not new and not remembered, such as a part of the data of pretraining.

    Args:
        dataset: The examples, read by index.
        ratio: Number of them per new example.
        draws: The order in which they come.
    """

    dataset: Any
    ratio: float
    draws: Draws


class ReplayCollate:
    """A ``collate_fn`` that appends examples of the memory to the new ones and calls the original with all of them.

    Batch number ``m`` of an update, with ``b`` new examples on each rank, takes the rank's draws from
    ``floor(m * b * ratio)`` on. The rank's ``i``-th draw is draw ``i * world_size + rank`` of the update, so that the
    ranks' and the accumulated batches' draws together are those of one process with one large batch.

    If the lengths of the new examples are known in advance, the draws of an epoch are dealt so that examples of about
    the same length meet: within each pass through the memory, the shortest go to the steps with the shortest new ones.

    Args:
        collate_fn: The loader's own ``collate_fn``.
        schedule: Schedule shared with the training process.
        directory: Folder of the memory's working files.
        batch_size: The loader's batch size; None if it varies, in which case consecutive batches draw far apart.
        ratio: Replayed examples per new one.
        rank: Rank of this process.
        world_size: Number of ranks that share the draws.
        capture: How to keep candidates for the memory as they pass; None if the memory is filled from the dataset.
        lengths: The lengths of the new examples; None if they are not known.
        extra: Examples that join every batch after the replayed ones; None for none.
        candidates: Draws for each example to replay, one after the other; all of them join the batch.
    """

    def __init__(
        self,
        collate_fn: Callable[[list[Any]], Any],
        *,
        schedule: Schedule,
        directory: Path,
        batch_size: int | None,
        ratio: float,
        rank: int,
        world_size: int,
        capture: Capture | None,
        lengths: StepLengths | None = None,
        extra: Extra | None = None,
        candidates: int = 1,
    ) -> None:
        self.collate_fn = collate_fn
        self.schedule, self.directory, self.ratio = schedule, directory, ratio
        self.stride = batch_size or 1 << 20
        self.rank, self.world_size = rank, world_size
        self.capture = capture
        self.lengths = lengths
        self.extra = extra
        self.candidates = candidates
        self._iterator, self._calls = 0, 0
        self._spool: Spool | None = None
        self._view: tuple[int, MemoryView] = (0, MemoryView.empty())
        self._dealt: tuple[tuple[int, ...], int, NDArray[np.int64]] = ((), 0, np.empty(0, dtype=np.int64))
        self._check = StorableCheck()

    def __getstate__(self) -> dict[str, Any]:
        """The state for a loader process, without the files that this process has opened."""
        return self.__dict__ | {"_spool": None, "_view": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_view": (0, MemoryView.empty())})

    def __call__(self, examples: Any) -> Any:
        """Add replayed examples and collate."""
        if not isinstance(examples, list):
            raise TypeError(
                f"Replay cannot join examples to a {type(examples).__name__}: the dataset gave whole batches, "
                "not a list of examples; let it give one example at a time and build the batch in the collate_fn"
            )
        batch = self._next_batch()
        if self._spool is not None:
            start = batch * self.stride
            arrivals = ((start + place) * self.world_size + self.rank for place in range(len(examples)))
            self._spool.offer(batch, arrivals, examples)
        else:
            self._check_storable(examples, batch)
        slots, view = self._draw(batch, len(examples))
        more = self._extra(batch, len(examples))
        if not slots and not more:
            return self.collate_fn(examples)
        past = [view[slot] for slot in slots]
        others = [] if self.extra is None else [self.extra.dataset[index] for index in more]
        try:
            return self.collate_fn([*examples, *past, *others])
        except Exception as error:
            names = [f"an example of experience {view.experiences[slot]!r} (id {view.ids[slot]!r})" for slot in slots]
            names += [f"example {index} of extra=" for index in more]
            if difference := self._difference(examples, [*past, *others], names):
                raise ValueError(difference) from error
            error.add_note(
                f"Replay had joined {len(names)} examples of the past to {len(examples)} new ones; the collate_fn must "
                "take both: see whether they have the same keys, shapes and types"
            )
            raise

    def _check_storable(self, examples: list[Any], batch: int) -> None:
        for place, example in enumerate(examples):
            try:
                self._check(example)
            except TypeError as error:
                raise TypeError(f"{UNSTORABLE.format(place, batch)}: {error}") from None

    def _difference(self, examples: list[Any], past: list[Any], names: list[str]) -> str | None:
        """How an example of the past differs from the new ones, if that is why they cannot be collated together."""
        try:
            self.collate_fn(examples)
        except Exception:
            return None  # the new ones are at fault
        for name, one in zip(names, past, strict=True):
            for new in examples:
                if difference := difference_of(one, new):
                    return (
                        f"Replay cannot join {name} to the new ones: {difference}. Let the dataset or the collate_fn "
                        "bring both into one form (a default for what is missing, padding to one length), or start "
                        "with an empty memory"
                    )
        return None

    def _next_batch(self) -> int:
        """The number of the batch that this call makes."""
        worker = get_worker_info()
        iterator, first = self.schedule.iterator()
        if iterator != self._iterator:
            self._iterator, self._calls = iterator, 0
            if self.capture is not None:
                name = f"{self.rank}-{worker.id if worker else 0}.spool"
                self._spool = Spool(self.capture.directory / name, self.capture)
        # torch assigns batches to workers round-robin.
        batch = first + (worker.id + self._calls * worker.num_workers if worker else self._calls)
        self._calls += 1
        return batch

    def joined(self, batch: int, size: int) -> Joined:
        """What batch number ``batch``, with ``size`` examples, consists of.

        Raises:
            ValueError: If the ``collate_fn`` has changed the number of examples.
        """
        current = self.schedule.update_at(batch)
        if current is None:
            return Joined(size, [], MemoryView.empty(), [])
        totals = sizes = np.arange(size + 1)
        kinds = [(0.0 if self.extra is None else self.extra.ratio, 1)]
        if current[2] and len(self._open(current[2])):
            kinds.append((self.ratio, self.candidates))
        for ratio, times in kinds:
            bounds = _bounds(sizes + (batch - current[0]) * self.stride, ratio)
            totals = totals + (bounds - bounds[0]) * times
        n_new = int(np.searchsorted(totals, size))
        if totals[n_new] != size:
            raise ValueError(
                f"a batch has {size} examples, which Replay has not given to the collate_fn: it must make a row of each"
            )
        return Joined(n_new, *self._draw(batch, n_new), self._extra(batch, n_new))

    def reopen(self) -> None:
        """Read the file of the memory again, in this process: it was rewritten."""
        self._view = (0, MemoryView.empty())

    def _open(self, generation: int) -> MemoryView:
        if self._view[0] != generation:
            self._view = generation, MemoryView.open(working_file(self.directory, generation))
        return self._view[1]

    def _draw(self, batch: int, n_new: int) -> tuple[list[int], MemoryView]:
        """The slots of the examples to replay, and the memory that they are in."""
        current = self.schedule.update_at(batch)
        if current is None or current[2] == 0:
            return [], self._view[1]
        first, update, generation = current
        view = self._open(generation)
        replayed = self._positions(batch - first, n_new, self.ratio)
        positions = (replayed[:, None] * self.candidates + np.arange(self.candidates)).ravel()
        if self.lengths is None or view.lengths is None or not self.lengths.covers(batch):
            return view.draw(positions, update).tolist(), view
        passes = positions // len(view)
        slots = np.empty_like(positions)
        for number in np.unique(passes).tolist():
            here = passes == number
            opened, dealt = self._deal(view, current, number)
            slots[here] = dealt[positions[here] - opened]
        return slots.tolist(), view

    def _extra(self, batch: int, n_new: int) -> list[int]:
        """The indices of the extra examples."""
        current = self.schedule.update_at(batch)
        if current is None or self.extra is None:
            return []
        first, update, _ = current
        drawn: list[int] = self.extra.draws.at(self._positions(batch - first, n_new, self.extra.ratio), update).tolist()
        return drawn

    def _positions(self, batch: int, n_new: int, ratio: float) -> NDArray[np.int64]:
        """The draws of this rank for a batch of an update, by their positions among those of all ranks."""
        start, stop = _bounds(np.array([0, n_new]) + batch * self.stride, ratio)
        return np.arange(start, stop) * self.world_size + self.rank

    def _deal(self, view: MemoryView, current: tuple[int, int, int], number: int) -> tuple[int, NDArray[np.int64]]:
        """The draws of an epoch in one pass through the memory, of all ranks: the first position, and the slots."""
        assert self.lengths is not None
        first, update, generation = current
        key = (generation, update, first, self.lengths.first, number)
        if self._dealt[0] != key:
            batches, lengths = self.lengths.from_batch(first)
            bounds = _bounds(np.append(batches, batches[-1] + 1) * self.stride, self.ratio)
            bounds *= self.world_size * self.candidates
            start, stop = max(bounds[0], number * len(view)), min(bounds[-1], (number + 1) * len(view))
            wanted = lengths[np.searchsorted(bounds, np.arange(start, stop), side="right") - 1]
            self._dealt = key, int(start), view.draw_alike(int(start), wanted, update)
        return self._dealt[1:]


def _bounds(examples: NDArray[np.int64], ratio: float) -> NDArray[np.int64]:
    """A rank's number of draws before its new examples of an update reach the given numbers.

    Truncated: over the batches, fractional ratios add up exactly, without keeping any state.
    """
    return (examples * ratio).astype(np.int64)


def difference_of(past: Any, new: Any, where: str = "") -> str | None:
    """What makes two examples impossible to stack, in words; None if nothing is found.

    Example:
        >>> difference_of({"x": torch.zeros(3)}, {"x": torch.zeros(3), "length": 3})
        "it has no 'length', which they have"
        >>> difference_of((torch.zeros(3), 1), (torch.zeros(5), 1))
        'its item [0] has the shape [3], theirs [5]'
    """
    place = f"item {where}" if where else "value"
    if isinstance(past, Mapping) and isinstance(new, Mapping):
        for one, other, words in (
            (new, past, "has no {!r}, which they have"),
            (past, new, "has {!r}, which they lack"),
        ):
            if missing := [key for key in one if key not in other]:
                return f"its {place} " * bool(where) + "it " * (not where) + words.format(missing[0])
        pairs: list[tuple[Any, Any, Any]] = [(key, past[key], new[key]) for key in past]
    elif isinstance(past, list | tuple) and isinstance(new, list | tuple):
        if len(past) != len(new):
            return f"its {place} has {len(past)} parts, theirs {len(new)}"
        pairs = [(index, *both) for index, both in enumerate(zip(past, new, strict=True))]
    else:
        shapes = [list(value.shape) if hasattr(value, "shape") else None for value in (past, new)]
        if shapes[0] != shapes[1] and None not in shapes:
            return f"its {place} has the shape {shapes[0]}, theirs {shapes[1]}"
        if type(past) is not type(new):
            return f"its {place} is a {type(past).__name__}, theirs a {type(new).__name__}"
        return None
    return next(filter(None, (difference_of(a, b, f"{where}[{key!r}]") for key, a, b in pairs)), None)
