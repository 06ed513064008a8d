"""Reads records from files, folders and iterables once, and decides which of them can be used."""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from evertune.drift.comparison.comparison import SetAside
from evertune.sources.base import Incoming
from evertune.sources.folder import FolderSource
from evertune.sources.formats import KINDS, kind
from evertune.utils.locate import locate

Records: TypeAlias = str | Path | Iterable[Mapping[str, Any] | Incoming]
"""A file, a folder, or an iterable of records: mappings from the names of fields to values."""

_CHUNK = 1_000
_SHOWN_REASONS = 3


def read_records(path: str | Path) -> Iterator[Incoming]:
    """The records of a file, or of all files of a folder in the order of their names.

    Args:
        path: A file in JSON Lines, CSV (both also gzipped) or Parquet, identified by its name; a folder of such files;
            a URL that fsspec supports; or ``package:NAME/PATH``.

    Yields:
        All records, including bad ones with the reason: see :class:`~evertune.sources.folder.FolderSource`.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the file is of another kind.
        SourceError: If it cannot be read further.
    """
    where = locate(str(path))
    remote = "://" in where
    if not remote and not Path(where).exists():
        raise FileNotFoundError(f"{where} does not exist")
    if (remote and kind(where)) or (not remote and not Path(where).is_dir()):
        folder, _, name = where.rpartition("/")
        if not kind(name):
            raise ValueError(f"{where} is none of {', '.join(KINDS)}: give it the name of what it is")
        if name.startswith((".", "_")):
            raise ValueError(f"{where} is hidden, as its name says: rename it")
        source = FolderSource(folder or ".", pattern=glob.escape(name), settle=0)
    else:
        source = FolderSource(where, settle=0)
    chunk = source.read(None, _CHUNK)
    while chunk.records:
        yield from chunk.records
        chunk = source.read(chunk.offset, _CHUNK)
    source.close()


def incoming(records: Records) -> Iterator[Incoming]:
    """Records with their origins; those that do not come from a file are ``record 1``, ``record 2``, ..."""
    if isinstance(records, str | Path):
        yield from read_records(records)
        return
    for number, record in enumerate(records, 1):
        yield record if isinstance(record, Incoming) else Incoming(f"record {number}", dict(record))


def number_of(value: Any) -> float | None:
    """The value as a finite number, also if it is written as text; None if it is not a number.

    Example:
        >>> number_of("0.5"), number_of(float("nan")), number_of(True), number_of("half")
        (0.5, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


class Usable:
    """Checks whether a record can be used; returns the reason if not, else None."""

    def __init__(self, text_fields: Sequence[str], value: str | None) -> None:
        self._text_fields, self._value = text_fields, value

    def __call__(self, record: Incoming) -> str | None:
        if record.value is None:
            return (record.error or "cannot be read").split(" (")[0]
        if self._value is not None:
            number = number_of(record.value.get(self._value))
            return f"has no number in {self._value!r}" if number is None else None
        there = [name for name in self._text_fields if name in record.value]
        if not there:
            return f"has no field {' or '.join(map(repr, self._text_fields))}"
        wrong = [name for name in there if not isinstance(record.value[name], str | None)]
        return f"has a {type(record.value[wrong[0]]).__name__} in {wrong[0]!r}, not a text" if wrong else None


class Sorter:
    """Iterates over the usable records and counts the others."""

    def __init__(self, records: Records, use: Usable) -> None:
        self._records, self._use = incoming(records), use
        self._reasons: Counter[str] = Counter()
        self._first: str | None = None
        self._fields: list[str] = []

    def __iter__(self) -> Iterator[Incoming]:
        for record in self._records:
            reason = self._use(record)
            if reason is None:
                yield record
                continue
            self._reasons[reason] += 1
            self._first = self._first or f"{record.origin}: {record.error or reason}"
            self._fields = self._fields or [str(name) for name in record.value or ()]

    def set_aside(self) -> SetAside:
        return SetAside(self._reasons.total(), dict(self._reasons.most_common(_SHOWN_REASONS)), self._first)

    def why(self) -> str:
        """The end of an error message that reports that there is no usable record."""
        if not self._reasons:
            return ": it is empty"
        fields = f"; it has the fields {', '.join(self._fields[:10])}" if self._fields else ""
        return f": {self._reasons.total()} were set aside, first {self._first}{fields}"
