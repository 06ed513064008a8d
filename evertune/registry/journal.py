"""The journal: records taken from the source, in numbered segments that exist as a whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from evertune.registry import offsets
from evertune.registry.lease import LeaseLost
from evertune.registry.offsets import Position
from evertune.registry.quarantine import BAD, Quarantine
from evertune.registry.rows import REPAIR, encode_rows, read_rows, sha256
from evertune.registry.segments import (
    FOLDER,
    WAITING,
    Segment,
    described,
    description_name,
    offset_name,
    quarantine_name,
    read_segment,
    records_name,
    segment_numbers,
    waiting_name,
)
from evertune.registry.store import Store
from evertune.sources.base import Offset, Row
from evertune.utils.typed_json import decode, foreign

_SCHEMA = f"{FOLDER}/schema.json"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many records some segments hold now.

    Args:
        read: Number of records that were read.
        pending: Number of good records that were not withdrawn.
        bad: Number of records in quarantine that were unreadable, refused or could not be learned.
    """

    read: int
    pending: int
    bad: int


class Journal:
    """The records that have been taken from a source, in the folders ``pending`` and ``quarantine`` of a store.

    A segment exists once its ``pending/<number>.json`` does, which is written last: files that a killed process wrote
    before it are not part of the journal, and the next :meth:`append` overwrites them. Reading again from the offset of
    the :attr:`last` segment therefore neither loses nor duplicates a record. Every file is checked against its SHA-256
    when it is read.

    Only one process at a time may write, which the registry's lease ensures; any number may read. A process that has
    lost the lease while it was stopped cannot write: it checks the lease under the store's lock, and in a bucket, which
    has no lock, it creates the files of a segment exclusively.

    Args:
        store: Store that holds the files.
        check_lease: Raises if this process has lost the right to write, as
            :meth:`Registry.check_lease <evertune.registry.registry.Registry.check_lease>` does. None checks nothing.

    Example:
        >>> journal = Journal(Store("memory://doc/journal"))
        >>> row = {"id": "a", "origin": "tickets.jsonl:1", "record": {"text": "Charged twice", "label": "billing"}}
        >>> segment = journal.append([row], bad=[], waiting=[], offset={"line": 1})
        >>> segment.number, journal.offset(journal.last), journal.records(journal.segments(after=0)) == [row]
        (1, {'line': 1}, True)
    """

    def __init__(self, store: Store, check_lease: Callable[[], None] | None = None) -> None:
        self.store = store
        self.check_lease = check_lease or (lambda: None)
        self._quarantine = Quarantine(store)
        self._is_writing = False
        self._base: tuple[str | None, bytes] = None, b""
        """SHA-256 and content of the base of offsets that was read last."""

    def segments(self, after: int = 0) -> list[Segment]:
        """The segments with a number above ``after``, oldest first.

        Raises:
            ValueError: If the description of a segment is damaged.
        """
        return [read_segment(self.store, number) for number in segment_numbers(self.store) if number > after]

    @property
    def last(self) -> Segment | None:
        """The newest segment; None if there is none."""
        numbers = segment_numbers(self.store)
        return read_segment(self.store, numbers[-1]) if numbers else None

    def offset(self, segment: Segment | None) -> Offset | None:
        """Offset of the source after a segment; None before the first.

        Raises:
            ValueError: If the file with the offset is damaged or missing.
        """
        if segment is None:
            return None
        base = self._base_of(segment.position)
        with foreign(self.store.address(description_name(segment.number))):
            return segment.position.offset(base)

    def append(
        self,
        records: Sequence[Row],
        bad: Sequence[Row],
        waiting: Sequence[Mapping[str, Any]],
        offset: Offset | None,
        read: int | None = None,
        clock: dict[str, Any] | None = None,
        released: Sequence[str] = (),
    ) -> Segment:
        """Write the next segment. It is on disk when this returns; if this fails, it does not exist.

        An empty segment replaces an empty one before it, so that a source whose offset advances without any records
        does not fill the disk.

        Args:
            records: The good records, each with ``id``, ``origin`` and ``record``.
            bad: The records for the quarantine, each with ``origin``, ``reason``, ``kind`` (``"unreadable"``,
                ``"refused"``, ``"superseded"`` or ``"expired"``), optionally ``id``, and either the ``record`` or the
                text that was read, ``raw``.
            waiting: All halves that wait for their other half.
            offset: Offset of the source after the segment.
            read: Number of records that were read; by default those in ``records`` and ``bad``.
            clock: State of the label join's clock.
            released: References (:meth:`references`) of the quarantined records that are pending again in the segment,
                and leave the quarantine in the same instant.

        Raises:
            LeaseLost: If another process has taken over; nothing of it is overwritten.
            OSError: If the segment cannot be written.
        """
        with self.writing():
            return self._append(records, bad, waiting, offset, read, clock, released)

    def _append(
        self,
        records: Sequence[Row],
        bad: Sequence[Row],
        waiting: Sequence[Mapping[str, Any]],
        offset: Offset | None,
        read: int | None,
        clock: dict[str, Any] | None,
        released: Sequence[str],
    ) -> Segment:
        last = self.last
        if last is not None and last.released:  # its description is deleted once it is learned and not the last
            self._quarantine.release((), last)
        if last is not None and last.empty and not (records or bad or read or released):
            number = last.number
        else:
            number = last.number + 1 if last is not None else 1
        position, base = self._positioned(offset, number, last)
        kept, refused, halves = (
            encode_rows(records),
            encode_rows({**row, "segment": number} for row in bad),
            encode_rows(waiting),
        )
        segment = Segment(
            number=number,
            position=position,
            read=len(records) + len(bad) if read is None else read,
            records=len(records),
            quarantined=len(bad),
            bad=sum(row["kind"] in BAD for row in bad),
            waiting=len(waiting),
            clock=clock,
            sha256=sha256(kept),
            sha256_quarantined=sha256(refused) if bad else None,
            sha256_waiting=sha256(halves) if waiting else None,
            released=list(released),
        )
        # The order matters for crash safety: the description is written last and makes the segment valid. The halves
        # that waited before are deleted only afterwards, because the previous segment needs them until then.
        if bad:
            self._create(quarantine_name(number), refused)
        else:  # a killed process may have left the file
            self.store.delete(quarantine_name(number))
        if waiting:
            self._create(waiting_name(number), halves)
        if base:
            self._create(offset_name(number), base)
        self._create(records_name(number), kept)
        self.check_lease()  # where the store has no lock, this is what a process that wakes up too late meets
        if self.store.is_local or (last is not None and last.number == number):
            self.describe(segment)
        else:
            try:
                self.store.create(description_name(number), described(segment))
            except FileExistsError:
                address = self.store.address(description_name(number))
                raise LeaseLost(f"another process has written {address} meanwhile: run it again") from None
        for name in self.store.list(FOLDER):  # files of earlier segments, and leftovers of killed processes
            if name.endswith(WAITING) and not (waiting and f"{FOLDER}/{name}" == waiting_name(number)):
                self.store.delete(f"{FOLDER}/{name}")
        return segment

    def last_withdrawal(self, segments: Iterable[Segment]) -> datetime | None:
        """When records were last withdrawn from these segments; None if never."""
        numbers = {segment.number for segment in segments}
        moments = (row["withdrawn"] for row in self._quarantine.withdrawn() if row["segment"] in numbers)
        return max(map(datetime.fromisoformat, moments), default=None)

    def records(self, segments: Iterable[Segment], numbered: bool = False) -> list[Row]:
        """The records of these segments that were not withdrawn, in the order in which they arrived.

        Args:
            segments: Segments of the journal.
            numbered: Add the number of its ``segment`` to each row, as :meth:`withdraw` needs it.

        Raises:
            ValueError: If a file is damaged or missing.
        """
        withdrawn = {(row["segment"], row["id"]) for row in self._quarantine.withdrawn()}
        return [
            {**row, "segment": segment.number} if numbered else row
            for segment in segments
            for row in read_rows(self.store, records_name(segment.number), segment.sha256, segment.records)
            if (segment.number, row["id"]) not in withdrawn
        ]

    def sizes(self, segments: Iterable[Segment]) -> list[int]:
        """The number of good records of each of these segments that were not withdrawn.

        Raises:
            ValueError: If the list of the withdrawn records is damaged.
        """
        gone = Counter(row["segment"] for row in self._quarantine.withdrawn())
        # A repair may have left fewer records in a segment than were withdrawn from it.
        return [max(segment.records - gone[segment.number], 0) for segment in segments]

    def counts(self, segments: Iterable[Segment]) -> Counts:
        """How many records these segments hold now.

        Raises:
            ValueError: If a file is damaged.
        """
        segments = list(segments)
        numbers, released = {segment.number for segment in segments}, self._quarantine.released(self.last)
        still = self._quarantine.of_withdrawn(released)
        bad = sum(row["kind"] in BAD and row["segment"] in numbers for _, row in still)
        changed = {int(name) for name in (reference.partition(":")[0] for reference in released) if name.isdecimal()}
        for segment in segments:
            if segment.number in changed:
                bad += sum(row["kind"] in BAD for _, row in self._quarantine.of_segment(segment, released))
            else:
                bad += segment.bad
        return Counts(
            read=sum(segment.read for segment in segments),
            pending=sum(self.sizes(segments)),
            bad=bad,
        )

    def withdraw(self, records: Sequence[Row]) -> None:
        """Move pending records into quarantine: all of them or, if the process dies, none.

        Args:
            records: Rows of :meth:`records` with the number of their ``segment``, a ``reason`` and a ``kind``:
                ``"refused"`` by another schema, ``"unlearnable"``, ``"batch"`` (refused twice by the gate),
                ``"withdrawn"`` (given up by a rollback) or ``"dropped"`` by hand.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the list of the records withdrawn before is damaged.
        """
        if records:
            with self.writing():
                self._quarantine.withdraw(records)

    def waiting(self) -> list[dict[str, Any]]:
        """The halves that wait for their other half after the last segment.

        Raises:
            ValueError: If the file is damaged or missing.
        """
        last = self.last
        if last is None or last.sha256_waiting is None:
            return []
        return read_rows(self.store, waiting_name(last.number), last.sha256_waiting, last.waiting)

    @property
    def schema(self) -> str | None:
        """Digest of the schema that the pending records were last checked by; None if that is not known."""
        try:
            return str(decode(self.store.read(_SCHEMA))["digest"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # they are then checked again
            return None

    @schema.setter
    def schema(self, digest: str) -> None:
        with self.writing():
            self.store.write(_SCHEMA, json.dumps({"digest": digest}).encode())

    def quarantine(self, reason: str, records: Sequence[Row], name: str, kind: str = "withdrawn") -> None:
        """Put records into quarantine that were good when they arrived. A second call with the same name replaces them.

        Args:
            reason: The reason, as a message. A row that has a ``reason`` already, as from :func:`latest`, keeps it.
            records: Rows of the journal.
            name: Name of the file in ``quarantine``, starting with a letter.
            kind: Kind of the quarantined records as in :meth:`append`, for statistics.

        Raises:
            ValueError: If the name cannot be the name of a file, or could be that of a segment.
            OSError: If the file cannot be written.
        """
        with self.writing():
            self._quarantine.put([{"reason": reason, "kind": kind, **row, "segment": name} for row in records], name)

    def quarantined(self, segments: Iterable[Segment] | None = None) -> list[Row]:
        """The records in quarantine with their reasons: first those of the segments, then those that were put there
        later.

        Args:
            segments: Return only the records that went to quarantine with these segments. None returns all.

        Files may be deleted once somebody has dealt with them; they are simply left out.

        Raises:
            ValueError: If a file is damaged.
        """
        if segments is None:
            return list(self.references().values())
        released, numbers = self._quarantine.released(self.last), set[int]()
        found: list[Row] = []
        for segment in segments:
            numbers.add(segment.number)
            found += (row for _, row in self._quarantine.of_segment(segment, released))
        return found + [row for _, row in self._quarantine.of_withdrawn(released) if row["segment"] in numbers]

    def references(self) -> dict[str, Row]:
        """The records in quarantine by their references: the name of a file and the hash of a line.

        Raises:
            ValueError: If a file is damaged.
        """
        released = self._quarantine.released(self.last)
        return self._quarantine.references({segment.number: segment for segment in self.segments()}, released)

    def drop(self, references: Iterable[str]) -> None:
        """Delete records from the quarantine for good. They no longer count as bad.

        The content of a withdrawn record is deleted at once, that of the others with the last record of their file.

        Raises:
            OSError: If a file cannot be written.
        """
        dropped = set(references)
        with self.writing():
            self._quarantine.release(dropped, self.last)
            self._quarantine.forget(dropped, self.references())

    def discard(self, upto: int) -> None:
        """Delete the segments up to number ``upto``, but never the last: it holds the offset to continue from.

        Their records in quarantine are kept.
        """
        with self.writing():
            for name in self.files(upto):
                self.store.delete(name)

    def files(self, upto: int) -> list[str]:
        """The names of the files that only the segments up to number ``upto`` need, but never those of the last.

        The file with the offset that later segments are the difference from stays.
        """
        numbers = segment_numbers(self.store)
        kept = [number for number in numbers if number > upto] or numbers[-1:]
        first = kept[0] if kept else 0
        try:
            base = {read_segment(self.store, first).position.base} if kept else set()
        except ValueError:  # it cannot be known which one it needs
            base = set(numbers)
        needed = {offset_name(number) for number in base if number is not None}
        names = [name for name in self.store.list(FOLDER) if name.partition(".")[0].isdecimal()]
        old = [f"{FOLDER}/{name}" for name in names if int(name.partition(".")[0]) <= min(upto, first - 1)]
        return [name for name in old if name not in needed]

    def _positioned(self, offset: Offset | None, number: int, last: Segment | None) -> tuple[Position, bytes]:
        """How to write an offset, and the content of the file to write with it, if there is to be one."""
        before = last.position if last is not None else Position()
        position = offsets.position(offset, number, before, self._base_of(before))
        if position is not None:
            return position, b""
        if last is not None and number == last.number:  # its description is replaced, which may need the file there is
            return Position(whole=offset), b""
        base = offsets.encoded(offset)
        return Position(base=number, sha256=sha256(base)), base

    def _base_of(self, position: Position) -> bytes:
        """Content of the file that an offset is the difference from; empty if there is none."""
        if position.base is None:
            return b""
        if position.sha256 != self._base[0]:
            name = offset_name(position.base)
            address, content = self.store.address(name), self.store.read_all([name]).get(name)
            if content is None:
                raise ValueError(f"{address} is missing, with the offset of the source; {REPAIR}")
            if sha256(content) != position.sha256:
                raise ValueError(f"{address} is damaged or cut short: it does not match its sha256; {REPAIR}")
            self._base = position.sha256, content
        return self._base[1]

    def _create(self, name: str, content: bytes) -> None:
        """Write a file of a segment that does not exist yet. If the file does, a killed process has left it."""
        if self.store.is_local:  # nobody else can write meanwhile: this process has the lock
            self.store.write(name, content)
            return
        try:
            self.store.create(name, content)
        except FileExistsError:
            self.check_lease()  # or another process has taken over, and it belongs to that one's segment
            self.store.write(name, content)

    def describe(self, segment: Segment) -> None:
        """Replace the description of a segment."""
        self.store.write(description_name(segment.number), described(segment))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The right to write, which nobody can take over until the end: a process that is stopped in here keeps the
        lock, without which no other process can take the lease. May be nested."""
        if self._is_writing:
            yield
            return
        with self.store.locked():
            self.check_lease()
            self._is_writing = True
            try:
                yield
            finally:
                self._is_writing = False
