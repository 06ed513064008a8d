"""The description of a segment of the journal, and the names of its files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from evertune.registry.offsets import Position
from evertune.registry.rows import FORMAT, REPAIR
from evertune.registry.store import Store
from evertune.utils.typed_json import check_seal, decode, from_json, sealed

FOLDER = "pending"
QUARANTINE = "quarantine"
WAITING = ".waiting.jsonl"
_DESCRIPTION = re.compile(r"(\d{6,})\.json")


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


def described(segment: Segment) -> bytes:
    """The content of the file that describes a segment."""
    values = asdict(segment)
    return json.dumps({"format": FORMAT, **sealed(values, without=["number"])}).encode()


def read_segment(store: Store, number: int) -> Segment:
    """The description of a segment.

    Raises:
        ValueError: If it is damaged.
    """
    name = description_name(number)
    try:
        meta = decode(store.read(name))
        if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
            raise ValueError("it is not a description, or another version of evertune wrote it")
        check_seal(meta, {entry.name for entry in fields(Segment)}, without=["number"])
        segment = from_json(Segment, meta)
        # Not part of the digest, as the name of the file says it.
        if segment.number != number:
            raise ValueError(f"it is of segment {segment.number}, not {number}")
    except ValueError as error:
        raise ValueError(f"{store.address(name)} is damaged: {error}; {REPAIR}") from None
    return segment


def segment_numbers(store: Store) -> list[int]:
    """The numbers of all segments, in order."""
    found = (_DESCRIPTION.fullmatch(name) for name in store.list(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def description_name(number: int) -> str:
    """Name of the file that describes a segment, and makes it exist."""
    return f"{FOLDER}/{number:06d}.json"


def offset_name(number: int) -> str:
    """Name of the file that holds the offset that this segment and later ones are the difference from."""
    return f"{FOLDER}/{number:06d}.offset.json"


def records_name(number: int) -> str:
    """Name of the file that holds the records of a segment."""
    return f"{FOLDER}/{number:06d}.jsonl"


def waiting_name(number: int) -> str:
    """Name of the file that holds the halves that wait after a segment."""
    return f"{FOLDER}/{number:06d}{WAITING}"


def quarantine_name(number: int) -> str:
    """Name of the file that holds the records that went to quarantine with a segment."""
    return f"{QUARANTINE}/{number:06d}.jsonl"
