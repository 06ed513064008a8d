"""Rows of the journal in files of JSON lines, each checked against a SHA-256 when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evertune.registry.store import Store
from evertune.sources.base import Row
from evertune.utils.typed_json import decode

FORMAT = 1
REPAIR = "`evertune registry repair` sets it aside"
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def encode_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines. A lone surrogate, which UTF-8 cannot encode, becomes its JSON escape."""
    return "".join([_encode(row) + "\n" for row in rows]).encode(errors="backslashreplace")


def sha256(content: bytes) -> str:
    """The SHA-256 of the content of a file, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def decode_rows(content: bytes, address: str) -> list[Row]:
    """What :func:`encode_rows` encoded.

    Raises:
        ValueError: If a line is not an object; the message names the address.
    """
    try:
        rows = [decode(line, surrogates=True) for line in content.split(b"\n") if line]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is not an object")
    except ValueError as error:
        raise ValueError(f"{address} is damaged: {error}; {REPAIR}") from None
    return rows


def encode_sealed(rows: Sequence[Row]) -> bytes:
    """JSON lines that no segment describes. The first line holds the SHA-256 of the others."""
    content = encode_rows(rows)
    return encode_rows([{"format": FORMAT, "sha256": sha256(content)}]) + content


def decode_sealed(content: bytes, address: str) -> list[Row]:
    """What :func:`encode_sealed` encoded.

    Raises:
        ValueError: If it is damaged; the message names the address.
    """
    head, _, rows = content.partition(b"\n")
    if head + b"\n" != encode_rows([{"format": FORMAT, "sha256": sha256(rows)}]):
        raise ValueError(f"{address} is damaged or cut short: it does not match its sha256; {REPAIR}")
    return decode_rows(rows, address)


def write_sealed(store: Store, name: str, rows: Sequence[Row]) -> None:
    """Replace a file of rows that no segment describes."""
    store.write(name, encode_sealed(rows))


def read_sealed(store: Store, name: str) -> list[Row]:
    """The rows of a file that :func:`write_sealed` has written; none if it is missing.

    Raises:
        ValueError: If it is damaged.
    """
    if not store.exists(name):
        return []
    return decode_sealed(store.read(name), store.address(name))


def read_rows(store: Store, name: str, digest: str | None = None, expected: int = 0) -> list[Row]:
    """The rows of a file.

    Args:
        store: Store of the registry.
        name: Name of the file.
        digest: SHA-256 of the file, in hexadecimal; None if nothing gives it.
        expected: Number of rows, for the message if the file is missing.

    Raises:
        ValueError: If it is damaged or missing.
    """
    address = store.address(name)
    try:
        content = store.read(name)
    except FileNotFoundError:
        raise ValueError(f"{address} is missing, with {expected} lines of the journal; {REPAIR}") from None
    if digest is not None and sha256(content) != digest:
        raise ValueError(f"{address} is damaged or cut short: it does not match the sha256 of its segment; {REPAIR}")
    return decode_rows(content, address)


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
