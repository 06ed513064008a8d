"""Where new records come from: read from an offset, in bounded chunks, and committed when they are published."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Offset = dict[str, Any]
"""How far a source has been read: JSON values only, kept with the version that learnt what came before it."""


class SourceError(RuntimeError):
    """A source cannot be read on from its offset: it is gone, unreachable, or has dropped or changed what was read."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """One record as it arrived.

    Args:
        origin: where it is in its source, for people and for the quarantine: ``"tickets.jsonl:17"``.
        value: its fields, or None when they cannot be read.
        error: why they cannot be read.
        raw: what was read, as text, where ``value`` is None.
    """

    origin: str
    value: dict[str, Any] | None
    error: str | None = None
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of a source.

    Args:
        records: in the order in which they arrived; none when nothing has arrived.
        offset: where the next chunk starts. It may move on though there are no records.
    """

    records: Sequence[Incoming]
    offset: Offset


class Source(ABC):
    """Records that keep arriving.

    Reading is free of side effects: the same offset gives the same records again, for as long as the source keeps
    them. So an interrupted reader starts again where its last durable offset stands, and nothing is lost or doubled.
    """

    @abstractmethod
    def read(self, offset: Offset | None, limit: int) -> Chunk:
        """The next records, at most ``limit``, of what has arrived; it waits for nothing that has not.

        Args:
            offset: of the chunk before; None for the beginning of the source.
            limit: how many records at most.

        Raises:
            SourceError: when the source cannot be read on from there: what to do is in the message.
        """

    def commit(self, offset: Offset) -> None:  # noqa: B027
        """Tell the source that all before ``offset`` is published. Only its own monitoring depends on it."""

    def close(self) -> None:  # noqa: B027
        """Let go of connections."""
