"""What happens in the processes that load batches: examples of the past join those of the present."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from evertune.memory.codec import encode
from evertune.memory.memory import MemoryView, content_id, working_file
from evertune.memory.policies import Policy

_NEVER = 1 << 62
_HEADER = struct.Struct("<qqdIiI")


class Schedule:
    """What the training process tells its loader processes, in shared memory.

    Batches are numbered over the whole fit. An iterator over the loader starts at a number, and so does an update. An
    update is announced before any loader process can reach its first batch, so that all of them switch at the same one.
    """

    def __init__(self) -> None:
        # the iterator's count and first batch; then twice: an update's first batch, its number, its memory's generation
        self._cells = torch.tensor([0, 0, _NEVER, 0, 0, _NEVER, 0, 0], dtype=torch.int64)
        self._cells.share_memory_()  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Forget the updates. There must be no iterator at work."""
        self._cells[2] = self._cells[5] = _NEVER

    def start_iterator(self, first_batch: int) -> None:
        """From now on the loader's iterator is a new one. There must be no other at work."""
        self._cells[1] = first_batch
        self._cells[0] += 1

    def start_update(self, first_batch: int, update: int, generation: int) -> None:
        """From this batch on examples come from this memory, by the draws of this update."""
        cells = self._cells.tolist()
        row = 2 if cells[2] == _NEVER or (cells[5] != _NEVER and cells[2] < cells[5]) else 5
        self._cells[row] = _NEVER
        self._cells[row + 1], self._cells[row + 2] = update, generation
        self._cells[row] = first_batch

    def iterator(self) -> tuple[int, int]:
        """Which iterator this is, and its first batch."""
        count, first, *_ = self._cells.tolist()
        return count, first

    def update_at(self, batch: int) -> tuple[int, int, int] | None:
        """The first batch, the number and the generation of the update that a batch belongs to."""
        cells = self._cells.tolist()
        begun = [tuple(cells[row : row + 3]) for row in (2, 5) if cells[row] <= batch]
        return max(begun) if begun else None


class Record(NamedTuple):
    """An example that has been in a batch: a candidate for the memory."""

    batch: int
    arrival: int
    priority: float
    id: str
    label: str | None
    data: bytes

    def to_bytes(self) -> bytes:
        """The record, as it is in a spool file."""
        id, label = self.id.encode(), None if self.label is None else self.label.encode()
        size = -1 if label is None else len(label)
        header = _HEADER.pack(self.batch, self.arrival, self.priority, len(id), size, len(self.data))
        return header + id + (label or b"") + self.data


def parse_records(content: bytes) -> Iterator[Record]:
    """The records in ``content``; one that is still being written at its end is left out."""
    position = 0
    while position + _HEADER.size <= len(content):
        batch, arrival, priority, id_size, label_size, data_size = _HEADER.unpack_from(content, position)
        id_at = position + _HEADER.size
        label_at = id_at + id_size
        data_at = label_at + max(label_size, 0)
        position = data_at + data_size
        if position > len(content):
            return
        label = None if label_size < 0 else content[label_at:data_at].decode()
        yield Record(batch, arrival, priority, content[id_at:label_at].decode(), label, content[data_at:position])


def read_records(paths: Iterable[Path], first_batch: int, end_batch: int) -> list[Record]:
    """The records of the batches from ``first_batch`` to before ``end_batch``."""
    return [
        record
        for path in paths
        for record in parse_records(path.read_bytes())
        if first_batch <= record.batch < end_batch
    ]


def prune_records(path: Path, end_batch: int) -> None:
    """Leave only the records of the batches before ``end_batch``. There must be no process at work on the file."""
    _replace(path, read_records([path], 0, end_batch))


def _replace(path: Path, records: Iterable[Record]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(b"".join(record.to_bytes() for record in records))
    temporary.replace(path)


@dataclass(frozen=True)
class Capture:
    """How passing examples are kept as candidates for the memory.

    Args:
        directory: of the spool files.
        policy: of the memory.
        seed: of the memory.
        limit: how many candidates to keep of each group of the policy: the size of the memory, and room for the
            batches that are loaded but not yet trained on.
        label: the class of an example.
        id: the id of an example; None for a hash of its content.
    """

    directory: Path
    policy: Policy
    seed: int
    limit: int
    label: Callable[[Any], str | None]
    id: Callable[[Any], str] | None


class Spool:
    """The candidates among the examples that one process has put into batches, in a file.

    Args:
        path: of the file; what is in it is taken up.
        capture: which to keep.
    """

    def __init__(self, path: Path, capture: Capture) -> None:
        self.path, self.capture = path, capture
        self._groups: dict[str, list[tuple[float, str]]] = {}
        self._kept: dict[str, tuple[float, str]] = {}
        self._written = 0
        if path.exists():
            records = list(parse_records(path.read_bytes()))
            _replace(path, [record for record in records if self._admit(record.id, record.label, record.priority)])

    def offer(self, batch: int, arrivals: Iterable[int], examples: list[Any]) -> None:
        """Keep those examples of a batch that may end up in the memory."""
        capture, records = self.capture, []
        for arrival, example in zip(arrivals, examples, strict=True):
            data = None if capture.id else encode(example)
            id = capture.id(example) if capture.id else content_id(data or b"")
            label, priority = capture.label(example), capture.policy.priority(id, arrival, capture.seed)
            if self._admit(id, label, priority):
                records.append(Record(batch, arrival, priority, id, label, encode(example) if data is None else data))
        if records:
            with self.path.open("ab") as file:
                file.write(b"".join(record.to_bytes() for record in records))
        if self._written > 3 * (len(self._kept) + capture.limit):
            self._compact()

    def _admit(self, id: str, label: str | None, priority: float) -> bool:
        group = self._groups.setdefault(self.capture.policy.group(label), [])
        entry = (-priority, id)  # the worst is on top of the heap
        known = self._kept.get(id)
        if known is not None:
            if known != entry:
                group[group.index(known)] = entry
                heapq.heapify(group)
        elif len(group) < self.capture.limit:
            heapq.heappush(group, entry)
        elif entry > group[0]:
            del self._kept[heapq.heapreplace(group, entry)[1]]
        else:
            return False
        self._kept[id] = entry
        self._written += 1
        return True

    def _compact(self) -> None:
        """Leave the last two records of each candidate: the very last may be of a batch that is never trained on."""
        records: dict[str, list[Record]] = {}
        for record in parse_records(self.path.read_bytes()):
            if record.id in self._kept:
                records[record.id] = [*records.get(record.id, [])[-1:], record]
        left = [record for both in records.values() for record in both]
        _replace(self.path, left)
        self._written = len(left)


class ReplayCollate:
    """A ``collate_fn`` that appends examples of the memory to the new ones and calls the original with all of them.

    Batch number ``m`` of an update, with ``b`` new examples on each rank, takes the rank's draws from
    ``floor(m * b * ratio)`` on. The rank's ``i``-th draw is draw ``i * world_size + rank`` of the update, so that the
    ranks' and the accumulated batches' draws together are those of one process with one large batch.

    Args:
        collate_fn: the loader's own.
        schedule: shared with the training process.
        directory: of the memory's working files.
        batch_size: the loader's; None if it varies, each batch then draws far from the others.
        ratio: examples of the memory per new one.
        rank: of this process.
        world_size: how many ranks share the draws.
        capture: keeps candidates for the memory as they pass; None when it is filled from the dataset.
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
    ) -> None:
        self.collate_fn = collate_fn
        self.schedule, self.directory, self.ratio = schedule, directory, ratio
        self.stride = batch_size or 1 << 20
        self.rank, self.world_size = rank, world_size
        self.capture = capture
        self._iterator, self._calls = 0, 0
        self._spool: Spool | None = None
        self._view: tuple[int, MemoryView] = (0, MemoryView.empty())

    def __getstate__(self) -> dict[str, Any]:
        """What a loader process gets: not what this one has opened."""
        return self.__dict__ | {"_spool": None, "_view": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_view": (0, MemoryView.empty())})

    def __call__(self, examples: Any) -> Any:
        """Join and collate."""
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
        past = self._draw(batch, len(examples))
        if not past:
            return self.collate_fn(examples)
        try:
            return self.collate_fn([*examples, *past])
        except Exception as error:
            error.add_note(
                f"Replay had joined {len(past)} examples of the past to {len(examples)} new ones; the collate_fn must "
                "take both: see whether they have the same keys, shapes and types"
            )
            raise

    def _next_batch(self) -> int:
        """The number of the batch that this call makes."""
        worker = get_worker_info()
        iterator, first = self.schedule.iterator()
        if iterator != self._iterator:
            self._iterator, self._calls = iterator, 0
            if self.capture is not None:
                name = f"{self.rank}-{worker.id if worker else 0}.spool"
                self._spool = Spool(self.capture.directory / name, self.capture)
        batch = first + (worker.id + self._calls * worker.num_workers if worker else self._calls)
        self._calls += 1
        return batch

    def _draw(self, batch: int, n_new: int) -> list[Any]:
        current = self.schedule.update_at(batch)
        if current is None or current[2] == 0:
            return []
        first, update, generation = current
        if self._view[0] != generation:
            self._view = generation, MemoryView.open(working_file(self.directory, generation))
        start = (batch - first) * self.stride
        own = np.arange(int(start * self.ratio), int((start + n_new) * self.ratio), dtype=np.int64)
        view = self._view[1]
        return [view[slot] for slot in view.draw(own * self.world_size + self.rank, update).tolist()]
