"""Damage in the journal: finding it, and setting it aside together with what can still be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from evertune.registry.journal import Journal
from evertune.registry.offsets import Position
from evertune.registry.quarantine import RELEASED, WITHDRAWN
from evertune.registry.rows import encode_rows, read_rows, read_sealed, sha256, write_sealed
from evertune.registry.segments import (
    QUARANTINE,
    Segment,
    description_name,
    offset_name,
    quarantine_name,
    read_segment,
    records_name,
    segment_numbers,
    waiting_name,
)
from evertune.sources.base import Row
from evertune.utils.typed_json import decode

_ASIDE = "damaged"


@dataclass(frozen=True)
class Damage:
    """A file of the journal that is damaged or missing.

    Args:
        file: Name of the file in the registry.
        words: What is wrong with it.
        segment: Number of its segment; None if it belongs to none.
    """

    file: str
    words: str
    segment: int | None = None


def damage(journal: Journal) -> list[Damage]:
    """The damaged files of a journal."""
    return list(_damage(journal))


def repair(journal: Journal) -> list[str]:
    """Set damaged files aside, so that updates go on. Requires the registry's lease.

    A damaged file is copied to the folder ``damaged``. What can be read of its records goes to quarantine, because any
    of them may be wrong; nothing is deleted. If the description of the newest segment is damaged, the source is read
    again from the offset before it.

    Returns:
        What was done, as messages; empty if nothing is damaged.
    """
    done: list[str] = []
    # A file that is set aside may show another one to be incomplete, which is then mended in the next round.
    while found := next(_damage(journal), None):
        with journal.writing():
            words = _mend(journal, found)
        if words in done:
            raise ValueError(f"{journal.store.address(found.file)} cannot be repaired: {found.words}")
        done.append(words)
    return done


def _damage(journal: Journal) -> Iterator[Damage]:
    numbers = segment_numbers(journal.store)
    bases = set[int | None]()
    for number in numbers:
        try:
            segment = read_segment(journal.store, number)
        except ValueError as error:
            yield Damage(description_name(number), str(error), number)
            continue
        files = [(records_name(number), segment.sha256, segment.records)]
        if segment.sha256_waiting is not None and number == numbers[-1]:
            files.append((waiting_name(number), segment.sha256_waiting, segment.waiting))
        # Files in quarantine may be deleted once somebody has dealt with them.
        if segment.sha256_quarantined is not None and journal.store.exists(quarantine_name(number)):
            files.append((quarantine_name(number), segment.sha256_quarantined, segment.quarantined))
        for name, digest, expected in files:
            yield from _unreadable(journal, name, digest, expected, number)
        if segment.position.base not in bases:
            bases.add(segment.position.base)
            try:
                journal.offset(segment)
            except ValueError as error:
                assert segment.position.base is not None
                yield Damage(offset_name(segment.position.base), str(error), segment.position.base)
    for name in (WITHDRAWN, RELEASED):
        try:
            read_sealed(journal.store, name)
        except ValueError as error:
            yield Damage(name, str(error))
    for file in journal.store.list(QUARANTINE):
        name = file.removesuffix(".jsonl")
        if not name.isdecimal() or int(name) not in numbers:
            yield from _unreadable(journal, f"{QUARANTINE}/{file}")


def _unreadable(
    journal: Journal, name: str, digest: str | None = None, expected: int = 0, segment: int | None = None
) -> Iterator[Damage]:
    try:
        read_rows(journal.store, name, digest, expected)
    except ValueError as error:
        yield Damage(name, str(error), segment)


def _mend(journal: Journal, found: Damage) -> str:
    number, files = found.segment, [found.file]
    if found.file.startswith(f"{QUARANTINE}/"):
        rows = _readable(journal, found.file)
        _set_aside(journal, files)
        _replace_quarantine(journal, found.file, rows, number)
        return f"{found.file} is set aside; {len(rows)} of its lines can be read and stay in quarantine"
    if found.file in (WITHDRAWN, RELEASED):
        needed = {"reference"} if found.file == RELEASED else {"segment", "id", "kind"}
        lines = _objects(journal, found.file)
        rows = [row for row in lines if needed <= row.keys()]
        _set_aside(journal, files)
        write_sealed(journal.store, found.file, rows)
        return f"{found.file} is set aside; {len(rows)} of its lines can be read and count"
    assert number is not None
    if found.file == offset_name(number):
        _set_aside(journal, files)
        again = _replace_base(journal, number)
        return f"{found.file} is set aside; {again}, so that records may be pending twice, those with an id only once"
    if found.file == description_name(number):
        files += [name for name in (records_name(number), waiting_name(number)) if journal.store.exists(name)]
    rows = [row for name in files if name != description_name(number) for row in _readable(journal, name)]
    _set_aside(journal, files)
    # The rows first: if the process dies before the segment is replaced, the next repair puts the same ones there.
    reason = f"{found.file} was damaged, so that this record may be wrong"
    journal.quarantine(reason, rows, f"damaged-{found.file.partition('/')[2].removesuffix('.jsonl')}", kind="damaged")
    again = _replace_segment(journal, number, found.file)
    return f"{found.file} is set aside; {len(rows)} records can be read and are in quarantine{again}"


def _replace_segment(journal: Journal, number: int, file: str) -> str:
    """Describe a segment without the damaged file. Returns what follows from it, for the message."""
    numbers = segment_numbers(journal.store)
    empty: dict[str, Any] = {"records": 0, "sha256": sha256(b"")}
    if file == waiting_name(number):
        journal.describe(replace(read_segment(journal.store, number), waiting=0, sha256_waiting=None))
    elif file == records_name(number):
        journal.describe(replace(read_segment(journal.store, number), **empty))
        journal.store.write(records_name(number), b"")
    elif number == numbers[-1]:
        for name in (records_name(number), waiting_name(number), description_name(number)):
            journal.store.delete(name)
        return "; the source is read again from before it"
    else:
        before = [segment.position for segment in _segments(journal) if segment.number < number]
        journal.describe(
            Segment(
                number=number,
                position=before[-1] if before else Position(),
                read=0,
                quarantined=0,
                bad=0,
                waiting=0,
                clock=None,
                sha256_quarantined=None,
                sha256_waiting=None,
                **empty,
            )
        )
        journal.store.write(records_name(number), b"")
    return ""


def _replace_base(journal: Journal, base: int) -> str:
    """Give the segments whose offset is lost the one before them. Returns what follows from it, for the message."""
    position, number = Position(), 0
    for segment in _segments(journal):
        if segment.position.base == base:
            journal.describe(replace(segment, position=position))
        else:
            position, number = segment.position, segment.number
    journal.store.delete(offset_name(base))
    return f"the source is read again from after segment {number}" if number else "the source is read again"


def _replace_quarantine(journal: Journal, file: str, rows: list[Row], number: int | None) -> None:
    content = encode_rows(rows)
    if number is not None:
        digest = sha256(content) if rows else None
        journal.describe(replace(read_segment(journal.store, number), quarantined=len(rows), sha256_quarantined=digest))
    if rows:
        journal.store.write(file, content)
    else:
        journal.store.delete(file)


def _segments(journal: Journal) -> Iterator[Segment]:
    """The segments whose descriptions can be read."""
    for number in segment_numbers(journal.store):
        try:
            yield read_segment(journal.store, number)
        except ValueError:
            continue


def _readable(journal: Journal, file: str) -> list[Row]:
    """The lines of a file as rows of the quarantine; those that are not records of the journal as the text read."""
    rows: list[Row] = []
    content = journal.store.read_all([file]).get(file, b"")
    for place, line in enumerate(content.split(b"\n"), start=1):
        try:
            row = decode(line, surrogates=True) if line else {}
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("value"), dict):  # a half that waits for the other
            row = {**row, "record": row["value"]}
        known = ({"id", "origin", "record"}, {"origin", "reason", "kind"})  # pending, and in quarantine
        if isinstance(row, dict) and any(names <= row.keys() for names in known):
            rows.append(row)
        elif line:
            unreadable = {"reason": f"{file} was damaged", "kind": "damaged", "raw": line.decode(errors="replace")}
            rows.append({"origin": f"{file}:{place}", **unreadable})
    return rows


def _objects(journal: Journal, file: str) -> list[Row]:
    """The lines of a file that are objects."""
    rows = []
    for line in journal.store.read(file).split(b"\n"):
        with suppress(ValueError):
            row = decode(line, surrogates=True)
            rows += [row] if isinstance(row, dict) else []
    return rows


def _set_aside(journal: Journal, files: list[str]) -> None:
    for name, content in journal.store.read_all(files).items():
        stem, _, ending = name.replace("/", "-").partition(".")
        journal.store.write(f"{_ASIDE}/{stem}-{sha256(content)[:8]}.{ending}", content)
