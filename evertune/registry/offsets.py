"""Offsets of a source in the journal: one of thousands of files is written once, and then what changes in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evertune.sources.base import Offset

_SMALL = 4096
"""Size in bytes up to which an offset is written whole: what most sources need, and less than a block of a disk."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """The offset of a source after a segment: whole, or as what differs from a file that several segments share.

    Args:
        whole: The offset, if there is no base.
        base: Number of the segment that the file with the whole offset was written with; None for no base.
        sha256: SHA-256 of that file, in hexadecimal.
        changes: What to change in it: ``[path, value]`` sets a value, ``[path]`` removes one.
    """

    whole: Offset | None = None
    base: int | None = None
    sha256: str | None = None
    changes: list[Any] = field(default_factory=list)

    def offset(self, base: bytes) -> Offset | None:
        """The whole offset.

        Args:
            base: Content of the base's file; ignored without a base.
        """
        return self.whole if self.base is None else patched(json.loads(base), self.changes)


def position(offset: Offset | None, number: int, last: Position, base: bytes) -> Position | None:
    """The shortest way to write an offset, given the position before it.

    A new base is due once the differences from the old one are together as large as a whole offset. With n bytes for
    the whole and c bytes of changes in each segment, a segment then takes about sqrt(2 n c) bytes.

    Args:
        offset: The offset.
        number: Number of its segment.
        last: Position of the segment before.
        base: Content of the file of that one's base, if it has one.

    Returns:
        The position; None if the whole offset is to be the base of this and later segments.
    """
    size = len(encoded(offset))
    if offset is None or size <= _SMALL:
        return Position(whole=offset)
    if last.base is None:
        return None
    old = json.loads(base)
    changes = list(difference(old, offset))
    due = len(encoded(changes)) * (number - last.base) >= 2 * size
    # Compared as JSON, for which 1, 1.0 and true differ.
    if due or encoded(patched(old, changes)) != encoded(offset):
        return None
    return Position(base=last.base, sha256=last.sha256, changes=changes)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: Sequence[str] = ()) -> Iterator[list[Any]]:
    """The changes that make one JSON object of another.

    Example:
        >>> list(difference({"files": {"a": 1, "b": 2}}, {"files": {"b": 3}}))
        [[['files', 'a']], [['files', 'b'], 3]]
    """
    for key in old:
        if key not in new:
            yield [[*path, key]]
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from difference(before, value, (*path, key))
        elif key not in old or before != value:
            yield [[*path, key], value]


def patched(value: dict[str, Any], changes: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Apply changes to a JSON object, which is changed.

    Example:
        >>> patched({"files": {"a": 1, "b": 2}}, [[["files", "a"]], [["files", "b"], 3]])
        {'files': {'b': 3}}
    """
    for [*parents, key], *new in changes:
        inner = value
        for parent in parents:
            inner = inner[parent]
        if new:
            inner[key] = new[0]
        else:
            del inner[key]
    return value


def encoded(value: Any) -> bytes:
    """JSON that depends on the value alone, and not on the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
