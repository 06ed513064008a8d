"""Candidates for the memory among the examples that a loader process has put into batches, in a file.

The file is an Arrow IPC stream without its end marker: a schema, then one record batch per batch of examples. A process
can therefore append without reading, and a reader gets every complete record batch even if the process died while
writing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from evertune.memory.codec import encode
from evertune.memory.memory import content_id
from evertune.memory.policies import Policy

_SCHEMA = pa.schema(
    [
        pa.field("batch", pa.int64(), nullable=False),
        pa.field("arrival", pa.int64(), nullable=False),
        pa.field("priority", pa.float64(), nullable=False),
        pa.field("id", pa.large_string(), nullable=False),
        ("label", pa.large_string()),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)


class Record(NamedTuple):
    """An example that was in a batch: a candidate for the memory."""

    batch: int
    arrival: int
    priority: float
    id: str
    label: str | None
    data: bytes


def serialize_records(records: Sequence[Record]) -> bytes:
    """Records as an Arrow IPC stream; empty bytes for no records."""
    return _SCHEMA.serialize().to_pybytes() + _message(records) if records else b""


def parse_records(content: bytes) -> Iterator[Record]:
    """The records of an Arrow IPC stream; an incomplete last record batch is left out."""
    try:
        stream = pa.ipc.open_stream(pa.py_buffer(content))
        if stream.schema != _SCHEMA:
            raise ValueError(f"not the records of a spool: their schema is {stream.schema.to_string()}")
        for batch in stream:
            batch.validate(full=True)
            yield from map(Record, *batch.to_pydict().values())
    except (pa.ArrowInvalid, OSError):  # a record batch cut off while it was written
        return


def _message(records: Sequence[Record]) -> bytes:
    """Records as one record batch of a stream."""
    columns = zip(*records, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=_SCHEMA).serialize().to_pybytes()  # type: ignore[no-any-return]


def read_records(paths: Iterable[Path], first_batch: int, end_batch: int) -> list[Record]:
    """The records of batches ``first_batch <= batch < end_batch``."""
    return [
        record
        for path in paths
        for record in parse_records(path.read_bytes())
        if first_batch <= record.batch < end_batch
    ]


def best_records(records: Iterable[Record], policy: Policy, memory_size: int) -> list[Record]:
    """The candidates among the records of all ranks, in the order in which they last arrived.

    At most as many of each group as the memory has room for: how many more a spool holds depends on the number of
    processes.
    """
    arrived = sorted(records, key=lambda record: (record.arrival, record.id))
    last = {record.id: record for record in arrived}
    best: dict[str, list[Record]] = {}
    for record in sorted(last.values(), key=lambda record: (record.priority, record.id)):
        group = best.setdefault(policy.group(record.label), [])
        if len(group) < memory_size:
            group.append(record)
    return sorted((record for group in best.values() for record in group), key=lambda r: (r.arrival, r.id))


def prune_records(path: Path, end_batch: int) -> None:
    """Keep only the records of the batches before ``end_batch``. No process may be writing to the file."""
    _replace(path, read_records([path], 0, end_batch))


def _replace(path: Path, records: Sequence[Record]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(serialize_records(records))
    temporary.replace(path)


@dataclass(frozen=True)
class Capture:
    """How passing examples are kept as candidates for the memory.

    Args:
        directory: Folder of the spool files.
        policy: Policy of the memory.
        seed: Seed of the memory.
        limit: Candidates kept per group of the policy: the size of the memory plus room for batches that are loaded but
            not yet trained on.
        label: Function that returns the class of an example.
        id: Function that returns the id of an example; None for a hash of its content.
        part: Function that returns the part of an example that is kept; None for all of it.
    """

    directory: Path
    policy: Policy
    seed: int
    limit: int
    label: Callable[[Any], str | None]
    id: Callable[[Any], str] | None
    part: Callable[[Any], Any] | None = None


class Spool:
    """The candidates among the examples that one process has put into batches, in a file.

    Args:
        path: Spool file. Records of an existing file are kept as candidates.
        capture: Which examples to keep.
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
        """Keep the examples of a batch that may end up in the memory."""
        capture, records = self.capture, []
        parts = examples if capture.part is None else [capture.part(example) for example in examples]
        for arrival, example in zip(arrivals, parts, strict=True):
            data = None if capture.id else encode(example)
            id = capture.id(example) if capture.id else content_id(data or b"")
            label, priority = capture.label(example), capture.policy.priority(id, arrival, capture.seed)
            if self._admit(id, label, priority):
                records.append(Record(batch, arrival, priority, id, label, encode(example) if data is None else data))
        if records:
            with self.path.open("ab") as file:
                file.write(_message(records) if file.tell() else serialize_records(records))
        if self._written > 3 * (len(self._kept) + capture.limit):
            self._compact()

    def _admit(self, id: str, label: str | None, priority: float) -> bool:
        group = self._groups.setdefault(self.capture.policy.group(label), [])
        entry = (-priority, id)  # negated: the worst candidate is on top of the heap
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
        """Keep the last two records per candidate: the last one may be of a batch that is never trained on."""
        records: dict[str, list[Record]] = {}
        for record in parse_records(self.path.read_bytes()):
            if record.id in self._kept:
                records[record.id] = [*records.get(record.id, [])[-1:], record]
        left = [record for both in records.values() for record in both]
        _replace(self.path, left)
        self._written = len(left)
