"""Candidates for the memory among the examples that a loader process has put into batches, in a file."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evertune.memory.codec import encode
from evertune.memory.memory import content_id
from evertune.memory.policies import Policy

_HEADER = struct.Struct("<qqdIiI")


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
