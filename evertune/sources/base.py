"""Where new records come from: read from an offset, in bounded chunks, and committed when they are published."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Offset = dict[str, Any]
"""How far a source has been read: JSON values only, stored with the version that was trained on what came before."""


Row = dict[str, Any]
"""A record of the journal: ``id``, ``origin`` and ``record``, its fields."""


class SourceError(RuntimeError):
    """A source cannot be read from its offset on: it is gone or unreachable, or has dropped or changed records."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """One record as it arrived.

    Args:
        origin: Where the record is in its source, for messages and the quarantine: ``"tickets.jsonl:17"``.
        value: The fields of the record, or None if they cannot be read.
        error: Why the fields cannot be read.
        raw: The text that was read, if ``value`` is None.
    """

    origin: str
    value: dict[str, Any] | None
    error: str | None = None
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of a source.

    Args:
        records: The records, in the order of their arrival; empty if nothing has arrived.
        offset: Where the next chunk starts. It may advance even if there are no records.
    """

    records: Sequence[Incoming]
    offset: Offset


class Source(ABC):
    """Records that keep arriving.

    Reading has no side effects: the same offset gives the same records again, for as long as the source keeps them.
    An interrupted reader therefore resumes from its last durable offset, and no record is lost or read twice.
    """

    @abstractmethod
    def read(self, offset: Offset | None, limit: int) -> Chunk:
        """The next records that have arrived, at most ``limit``. It never waits for new ones.

        Args:
            offset: Offset of the previous chunk; None for the beginning of the source.
            limit: Maximum number of records.

        Raises:
            SourceError: If the source cannot be read from this offset on. The message says what to do.
        """

    def commit(self, offset: Offset) -> None:  # noqa: B027
        """Report to the source that a version trained on all before ``offset`` is published, for monitoring only."""

    def close(self) -> None:  # noqa: B027
        """Close the connections."""
