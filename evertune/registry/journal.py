"""The journal: records taken from the source, in numbered segments that exist as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from evertune.registry import offsets
from evertune.registry.lease import LeaseLost
from evertune.registry.offsets import Position
from evertune.registry.store import Store
from evertune.sources.base import Offset, Row
from evertune.utils.typed_json import check_seal, decode, foreign, from_json, sealed

_FOLDER = "pending"
_QUARANTINE = "quarantine"
_WAITING = ".waiting.jsonl"
_WITHDRAWN = f"{_FOLDER}/withdrawn.jsonl"
_RELEASED = f"{_FOLDER}/released.jsonl"
_SCHEMA = f"{_FOLDER}/schema.json"
_META = re.compile(r"(\d{6,})\.json")
_NAME = re.compile(r"[A-Za-z][\w.-]*")
_FORMAT = 1
_BAD = ("unreadable", "refused", "unlearnable")
_REPAIR = "`evertune registry repair` sets it aside"
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The result of one read of the source.

    Args:
        number: Number of the segment, counted from 1 in the order in which the segments were read.
        position: Offset of the source after the segment, as it is written; see :meth:`Journal.offset`.
        read: Number of records that were read.
        records: Number of records in the segment, including those that had been waiting for their other half.
        quarantined: Number of records that went to quarantine with the segment, for whatever reason.
        bad: Number of the quarantined records that were unreadable or refused; the rest were superseded, or their other
            half never arrived.
        waiting: Number of halves that wait for their other half after the segment.
        clock: State of the label join's clock after the segment; None without a label join.
        sha256: SHA-256 of the file with the records, in hexadecimal.
        sha256_quarantined: SHA-256 of the file in quarantine; None if nothing was quarantined.
        sha256_waiting: SHA-256 of the file with the waiting halves; None if none wait.
        released: References of the quarantined records that are pending again in this segment.
    """

    number: int
    position: Position
    read: int
    records: int
    quarantined: int
    bad: int
    waiting: int
    clock: dict[str, Any] | None
    sha256: str
    sha256_quarantined: str | None
    sha256_waiting: str | None
    released: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nothing but the offset has changed."""
        return not (self.read or self.records or self.quarantined or self.released)


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
        self._is_writing = False
        self._base: tuple[str | None, bytes] = None, b""
        """SHA-256 and content of the base of offsets that was read last."""

    def segments(self, after: int = 0) -> list[Segment]:
        """The segments with a number above ``after``, oldest first.

        Raises:
            ValueError: If the description of a segment is damaged.
        """
        return [self._segment(number) for number in self._numbers() if number > after]

    @property
    def last(self) -> Segment | None:
        """The newest segment; None if there is none."""
        numbers = self._numbers()
        return self._segment(numbers[-1]) if numbers else None

    def offset(self, segment: Segment | None) -> Offset | None:
        """Offset of the source after a segment; None before the first.

        Raises:
            ValueError: If the file with the offset is damaged or missing.
        """
        if segment is None:
            return None
        base = self._base_of(segment.position)
        with foreign(self.store.address(_meta_name(segment.number))):
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
        with self._writing():
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
            self._release(())
        if last is not None and last.empty and not (records or bad or read or released):
            number = last.number
        else:
            number = last.number + 1 if last is not None else 1
        position, base = self._positioned(offset, number, last)
        kept, refused, halves = _lines(records), _lines({**row, "segment": number} for row in bad), _lines(waiting)
        segment = Segment(
            number=number,
            position=position,
            read=len(records) + len(bad) if read is None else read,
            records=len(records),
            quarantined=len(bad),
            bad=sum(row["kind"] in _BAD for row in bad),
            waiting=len(waiting),
            clock=clock,
            sha256=_sha256(kept),
            sha256_quarantined=_sha256(refused) if bad else None,
            sha256_waiting=_sha256(halves) if waiting else None,
            released=list(released),
        )
        # The order matters for crash safety: the description is written last and makes the segment valid. The halves
        # that waited before are deleted only afterwards, because the previous segment needs them until then.
        if bad:
            self._create(_quarantine_name(number), refused)
        else:  # a killed process may have left the file
            self.store.delete(_quarantine_name(number))
        if waiting:
            self._create(_waiting_name(number), halves)
        if base:
            self._create(_offset_name(number), base)
        self._create(_records_name(number), kept)
        self.check_lease()  # where the store has no lock, this is what a process that wakes up too late meets
        if self.store.is_local or (last is not None and last.number == number):
            self._describe(segment)
        else:
            try:
                self.store.create(_meta_name(number), described(segment))
            except FileExistsError:
                address = self.store.address(_meta_name(number))
                raise LeaseLost(f"another process has written {address} meanwhile: run it again") from None
        for name in self.store.list(_FOLDER):  # files of earlier segments, and leftovers of killed processes
            if name.endswith(_WAITING) and not (waiting and f"{_FOLDER}/{name}" == _waiting_name(number)):
                self.store.delete(f"{_FOLDER}/{name}")
        return segment

    def last_withdrawal(self, segments: Iterable[Segment]) -> datetime | None:
        """When records were last withdrawn from these segments, to the second; None if never."""
        numbers = {segment.number for segment in segments}
        moments = (row["withdrawn"] for row in self._withdrawn() if row["segment"] in numbers)
        return max(map(datetime.fromisoformat, moments), default=None)

    def records(self, segments: Iterable[Segment], numbered: bool = False) -> list[Row]:
        """The records of these segments that were not withdrawn, in the order in which they arrived.

        Args:
            segments: Segments of the journal.
            numbered: Add the number of its ``segment`` to each row, as :meth:`withdraw` needs it.

        Raises:
            ValueError: If a file is damaged or missing.
        """
        withdrawn = {(row["segment"], row["id"]) for row in self._withdrawn()}
        return [
            {**row, "segment": segment.number} if numbered else row
            for segment in segments
            for row in self._rows(_records_name(segment.number), segment.sha256, segment.records)
            if (segment.number, row["id"]) not in withdrawn
        ]

    def counts(self, segments: Iterable[Segment]) -> Counts:
        """How many records these segments hold now.

        Raises:
            ValueError: If a file is damaged.
        """
        segments = list(segments)
        numbers, released = {segment.number for segment in segments}, self._released()
        withdrawn = [row for row in self._withdrawn() if row["segment"] in numbers]
        gone = Counter(row["segment"] for row in withdrawn)
        bad = sum(row["kind"] in _BAD and _withdrawn_reference(row) not in released for row in withdrawn)
        changed = {int(name) for name in (reference.partition(":")[0] for reference in released) if name.isdecimal()}
        for segment in segments:
            if segment.number in changed:
                bad += sum(row["kind"] in _BAD for _, row in self._of_segment(segment, released))
            else:
                bad += segment.bad
        return Counts(
            read=sum(segment.read for segment in segments),
            # A repair may have left fewer records in a segment than were withdrawn from it.
            pending=sum(max(segment.records - gone[segment.number], 0) for segment in segments),
            bad=bad,
        )

    def withdraw(self, records: Sequence[Row]) -> None:
        """Move pending records into quarantine: all of them or, if the process dies, none.

        Args:
            records: Rows of :meth:`records` with the number of their ``segment``, a ``reason`` and a ``kind``:
                ``"refused"`` by another schema, ``"unlearnable"``, ``"batch"`` (refused twice by the gate) or
                ``"dropped"`` by hand.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the list of the records withdrawn before is damaged.
        """
        if not records:
            return
        with self._writing():
            before = self._withdrawn()
            known = {(row["segment"], row["id"]) for row in before}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            new = [{**row, "withdrawn": now} for row in records if (row["segment"], row["id"]) not in known]
            self._write_sealed(_WITHDRAWN, [*before, *new])

    def waiting(self) -> list[dict[str, Any]]:
        """The halves that wait for their other half after the last segment.

        Raises:
            ValueError: If the file is damaged or missing.
        """
        last = self.last
        if last is None or last.sha256_waiting is None:
            return []
        return self._rows(_waiting_name(last.number), last.sha256_waiting, last.waiting)

    @property
    def schema(self) -> str | None:
        """Digest of the schema that the pending records were last checked by; None if that is not known."""
        try:
            return str(decode(self.store.read(_SCHEMA))["digest"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # they are then checked again
            return None

    @schema.setter
    def schema(self, digest: str) -> None:
        with self._writing():
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
        if not _NAME.fullmatch(name):
            raise ValueError(f"name must start with a letter and have letters, digits, ., - and _ only, got {name!r}")
        rows = [{"reason": reason, "kind": kind, **row, "segment": name} for row in records]
        with self._writing():
            if rows:
                self.store.write(f"{_QUARANTINE}/{name}.jsonl", _lines(rows))
            else:
                self.store.delete(f"{_QUARANTINE}/{name}.jsonl")

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
        released, numbers = self._released(), set[int]()
        rows: list[Row] = []
        for segment in segments:
            numbers.add(segment.number)
            rows += (row for _, row in self._of_segment(segment, released))
        return rows + [
            row for row in self._withdrawn() if row["segment"] in numbers and _withdrawn_reference(row) not in released
        ]

    def references(self) -> dict[str, Row]:
        """The records in quarantine by their references: the name of a file and the hash of a line.

        Raises:
            ValueError: If a file is damaged.
        """
        released, described = self._released(), {segment.number: segment for segment in self.segments()}
        newest = max(described, default=0)
        found: list[tuple[str, Row]] = []
        for file in self.store.list(_QUARANTINE):
            name = file.removesuffix(".jsonl")
            if not name.isdecimal() or (int(name) not in described and int(name) < newest):
                found += ((_reference(name, row), row) for row in self._rows(f"{_QUARANTINE}/{file}"))
            elif int(name) in described:
                found += self._of_segment(described[int(name)], released)
        found += ((_withdrawn_reference(row), row) for row in self._withdrawn())
        return {reference: row for reference, row in found if reference not in released}

    def drop(self, references: Iterable[str]) -> None:
        """Delete records from the quarantine for good. They no longer count as bad.

        The content of a withdrawn record is deleted at once, that of the others with the last record of their file.

        Raises:
            OSError: If a file cannot be written.
        """
        dropped = set(references)
        with self._writing():
            self._release(dropped)
            if any(reference.startswith("withdrawn:") for reference in dropped):
                rows = [
                    {key: value for key, value in row.items() if key != "record"}
                    if _withdrawn_reference(row) in dropped
                    else row
                    for row in self._withdrawn()
                ]
                self._write_sealed(_WITHDRAWN, rows)
            left = {reference.partition(":")[0] for reference in self.references()}
            for name in {reference.partition(":")[0] for reference in dropped} - left - {"withdrawn"}:
                self.store.delete(f"{_QUARANTINE}/{name}.jsonl")

    def _release(self, references: Iterable[str]) -> None:
        """Note that these records, and those that the last segment has released, have left the quarantine."""
        released = sorted(self._released().union(references))
        self._write_sealed(_RELEASED, [{"reference": reference} for reference in released])

    def discard(self, upto: int) -> None:
        """Delete the segments up to number ``upto``, but never the last: it holds the offset to continue from.

        Their records in quarantine are kept.
        """
        with self._writing():
            for name in self.files(upto):
                self.store.delete(name)

    def files(self, upto: int) -> list[str]:
        """The names of the files that only the segments up to number ``upto`` need, but never those of the last.

        The file with the offset that later segments are the difference from stays.
        """
        numbers = self._numbers()
        kept = [number for number in numbers if number > upto] or numbers[-1:]
        first = kept[0] if kept else 0
        try:
            base = {self._segment(first).position.base} if kept else set()
        except ValueError:  # it cannot be known which one it needs
            base = set(numbers)
        needed = {_offset_name(number) for number in base if number is not None}
        names = [name for name in self.store.list(_FOLDER) if name.partition(".")[0].isdecimal()]
        old = [f"{_FOLDER}/{name}" for name in names if int(name.partition(".")[0]) <= min(upto, first - 1)]
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
        return Position(base=number, sha256=_sha256(base)), base

    def _base_of(self, position: Position) -> bytes:
        """Content of the file that an offset is the difference from; empty if there is none."""
        if position.base is None:
            return b""
        if position.sha256 != self._base[0]:
            name = _offset_name(position.base)
            address, content = self.store.address(name), self.store.read_all([name]).get(name)
            if content is None:
                raise ValueError(f"{address} is missing, with the offset of the source; {_REPAIR}")
            if _sha256(content) != position.sha256:
                raise ValueError(f"{address} is damaged or cut short: it does not match its sha256; {_REPAIR}")
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

    def _describe(self, segment: Segment) -> None:
        self.store.write(_meta_name(segment.number), described(segment))

    @contextmanager
    def _writing(self) -> Iterator[None]:
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

    def _numbers(self) -> list[int]:
        found = (_META.fullmatch(name) for name in self.store.list(_FOLDER))
        return sorted(int(match[1]) for match in found if match)

    def _segment(self, number: int) -> Segment:
        name = _meta_name(number)
        try:
            meta = decode(self.store.read(name))
            if not isinstance(meta, dict) or meta.pop("format", None) != _FORMAT:
                raise ValueError("it is not a description, or another version of evertune wrote it")
            check_seal(meta, {entry.name for entry in fields(Segment)}, without=["number"])
            segment = from_json(Segment, meta)
            # Not part of the digest, as the name of the file says it.
            if segment.number != number:
                raise ValueError(f"it is of segment {segment.number}, not {number}")
        except ValueError as error:
            raise ValueError(f"{self.store.address(name)} is damaged: {error}; {_REPAIR}") from None
        return segment

    def _of_segment(self, segment: Segment, released: set[str]) -> Iterator[tuple[str, Row]]:
        """The records that went to quarantine with a segment and are still there, by their references."""
        if segment.sha256_quarantined is None or not self.store.exists(_quarantine_name(segment.number)):
            return
        for row in self._rows(_quarantine_name(segment.number), segment.sha256_quarantined, segment.quarantined):
            reference = _reference(f"{segment.number:06d}", row)
            if reference not in released:
                yield reference, row

    def _released(self) -> set[str]:
        """References of the records that have left the quarantine."""
        dropped = {row["reference"] for row in self._read_sealed(_RELEASED)}
        last = self.last
        return dropped.union(last.released if last is not None else ())

    def _withdrawn(self) -> list[Row]:
        return self._read_sealed(_WITHDRAWN)

    def _write_sealed(self, name: str, rows: Sequence[Row]) -> None:
        """Replace a file of rows that no segment describes. Its first line holds its SHA-256."""
        content = _lines(rows)
        self.store.write(name, _lines([{"format": _FORMAT, "sha256": _sha256(content)}]) + content)

    def _read_sealed(self, name: str) -> list[Row]:
        if not self.store.exists(name):
            return []
        head, _, content = self.store.read(name).partition(b"\n")
        if head + b"\n" != _lines([{"format": _FORMAT, "sha256": _sha256(content)}]):
            address = self.store.address(name)
            raise ValueError(f"{address} is damaged or cut short: it does not match its sha256; {_REPAIR}")
        return [decode(line, surrogates=True) for line in content.split(b"\n") if line]

    def _rows(self, name: str, sha256: str | None = None, expected: int = 0) -> list[Row]:
        address = self.store.address(name)
        try:
            content = self.store.read(name)
        except FileNotFoundError:
            raise ValueError(f"{address} is missing, with {expected} lines of the journal; {_REPAIR}") from None
        if sha256 is not None and _sha256(content) != sha256:
            raise ValueError(
                f"{address} is damaged or cut short: it does not match the sha256 of its segment; {_REPAIR}"
            )
        try:
            rows = [decode(line, surrogates=True) for line in content.split(b"\n") if line]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is not an object")
        except ValueError as error:
            raise ValueError(f"{address} is damaged: {error}; {_REPAIR}") from None
        return rows


def latest(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Keep only the newest of the records with the same id.

    Args:
        rows: Rows in the order in which they arrived.

    Returns:
        The rows to keep, in the order in which they arrived, and the superseded ones, each with a ``reason``.

    Example:
        >>> old, new = {"id": "a", "origin": "f:1", "record": {}}, {"id": "a", "origin": "f:2", "record": {}}
        >>> kept, superseded = latest([old, new])
        >>> kept == [new], superseded[0]["reason"]
        (True, 'superseded by f:2')
    """
    rows = list(rows)
    newest = {row["id"]: place for place, row in enumerate(rows)}
    if len(newest) == len(rows):
        return rows, []
    kept, superseded = [], []
    for place, row in enumerate(rows):
        if newest[row["id"]] == place:
            kept.append(row)
        else:
            superseded.append({**row, "reason": f"superseded by {rows[newest[row['id']]]['origin']}"})
    return kept, superseded


def described(segment: Segment) -> bytes:
    """The content of the file that describes a segment."""
    values = asdict(segment)
    return json.dumps({"format": _FORMAT, **sealed(values, without=["number"])}).encode()


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines. A lone surrogate, which UTF-8 cannot encode, becomes its JSON escape."""
    return "".join([_encode(row) + "\n" for row in rows]).encode(errors="backslashreplace")


def _reference(name: str, row: Row) -> str:
    """The reference of a row in quarantine. It does not depend on its place, as other rows may be erased."""
    return f"{name}:{_sha256(_lines([row]))[:12]}"


def _withdrawn_reference(row: Row) -> str:
    return _reference("withdrawn", {"segment": row["segment"], "id": row["id"]})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _meta_name(number: int) -> str:
    return f"{_FOLDER}/{number:06d}.json"


def _offset_name(number: int) -> str:
    return f"{_FOLDER}/{number:06d}.offset.json"


def _records_name(number: int) -> str:
    return f"{_FOLDER}/{number:06d}.jsonl"


def _waiting_name(number: int) -> str:
    return f"{_FOLDER}/{number:06d}{_WAITING}"


def _quarantine_name(number: int) -> str:
    return f"{_QUARANTINE}/{number:06d}.jsonl"
