"""The quarantine: the records of the journal that are not to be learned, and which of them have left it again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from evertune.registry.rows import encode_rows, read_rows, read_sealed, sha256, write_sealed
from evertune.registry.segments import FOLDER, QUARANTINE, Segment, quarantine_name
from evertune.registry.store import Store
from evertune.sources.base import Row

WITHDRAWN = f"{FOLDER}/withdrawn.jsonl"
RELEASED = f"{FOLDER}/released.jsonl"
BAD = ("unreadable", "refused", "unlearnable")
"""Kinds of records that count as bad."""

_NAME = re.compile(r"[A-Za-z][\w.-]*")


class Quarantine:
    """The records in quarantine, each known by its reference: the name of its file and a hash of its line.

    They are in one of three places: in a file that was written with a segment, in a named file, or, if they were good
    at first, in the list of those that were withdrawn. A record that leaves the quarantine stays where it is, and its
    reference is listed as released.

    A part of :class:`~evertune.registry.journal.Journal`, which holds the store's lock while it writes here.

    Args:
        store: Store of the registry.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def withdrawn(self) -> list[Row]:
        """The pending records that were withdrawn, each with the number of its ``segment``."""
        return read_sealed(self._store, WITHDRAWN)

    def withdraw(self, records: Iterable[Row]) -> None:
        """Add pending records to those that were withdrawn."""
        before = self.withdrawn()
        known = {(row["segment"], row["id"]) for row in before}
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        new = [{**row, "withdrawn": now} for row in records if (row["segment"], row["id"]) not in known]
        write_sealed(self._store, WITHDRAWN, [*before, *new])

    def released(self, last: Segment | None) -> set[str]:
        """References of the records that have left the quarantine, those that the last segment released included."""
        listed = {row["reference"] for row in read_sealed(self._store, RELEASED)}
        return listed.union(last.released if last is not None else ())

    def release(self, references: Iterable[str], last: Segment | None) -> None:
        """Note that these records, and those that the last segment has released, have left the quarantine."""
        released = sorted(self.released(last).union(references))
        write_sealed(self._store, RELEASED, [{"reference": reference} for reference in released])

    def put(self, records: Sequence[Row], name: str) -> None:
        """Make records the content of a named file; without any, the file is deleted.

        Raises:
            ValueError: If the name cannot be the name of a file, or could be that of a segment.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"name must start with a letter and have letters, digits, ., - and _ only, got {name!r}")
        if records:
            self._store.write(f"{QUARANTINE}/{name}.jsonl", encode_rows(records))
        else:
            self._store.delete(f"{QUARANTINE}/{name}.jsonl")

    def of_segment(self, segment: Segment, released: set[str]) -> Iterator[tuple[str, Row]]:
        """The records that went to quarantine with a segment and are still there, by their references."""
        name = quarantine_name(segment.number)
        if segment.sha256_quarantined is None or not self._store.exists(name):
            return
        for row in read_rows(self._store, name, segment.sha256_quarantined, segment.quarantined):
            reference = _reference(f"{segment.number:06d}", row)
            if reference not in released:
                yield reference, row

    def of_withdrawn(self, released: set[str]) -> Iterator[tuple[str, Row]]:
        """The records that were withdrawn and are still in quarantine, by their references."""
        named = ((_withdrawn_reference(row), row) for row in self.withdrawn())
        return ((reference, row) for reference, row in named if reference not in released)

    def references(self, segments: Mapping[int, Segment], released: set[str]) -> dict[str, Row]:
        """All records in quarantine by their references.

        Args:
            segments: All segments of the journal by number.
            released: References of the records that have left the quarantine.
        """
        newest = max(segments, default=0)
        found: list[tuple[str, Row]] = []
        for file in self._store.list(QUARANTINE):
            name = file.removesuffix(".jsonl")
            # A file with the number of a later segment was left by a process that was killed.
            if not name.isdecimal() or (int(name) not in segments and int(name) < newest):
                found += ((_reference(name, row), row) for row in read_rows(self._store, f"{QUARANTINE}/{file}"))
            elif int(name) in segments:
                found += self.of_segment(segments[int(name)], released)
        found += self.of_withdrawn(released)
        return {reference: row for reference, row in found if reference not in released}

    def forget(self, references: set[str], left: Iterable[str]) -> None:
        """Delete the content of records that have left the quarantine, where nothing else is in their file.

        Args:
            references: References of the records.
            left: References of those that stay.
        """
        if any(reference.startswith("withdrawn:") for reference in references):
            kept = [
                {key: value for key, value in row.items() if key != "record"}
                if _withdrawn_reference(row) in references
                else row
                for row in self.withdrawn()
            ]
            write_sealed(self._store, WITHDRAWN, kept)
        needed = {reference.partition(":")[0] for reference in left}
        for name in {reference.partition(":")[0] for reference in references} - needed - {"withdrawn"}:
            self._store.delete(f"{QUARANTINE}/{name}.jsonl")


def _reference(name: str, row: Row) -> str:
    """The reference of a row in quarantine. It does not depend on its place, as other rows may be erased."""
    return f"{name}:{sha256(encode_rows([row]))[:12]}"


def _withdrawn_reference(row: Row) -> str:
    return _reference("withdrawn", {"segment": row["segment"], "id": row["id"]})
