"""Parses the bytes of JSONL, CSV and Parquet files into records, and reports why a record cannot be parsed."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from evertune.sources.base import Incoming
from evertune.sources.json import json_object, plain

KINDS = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".csv", ".csv.gz", ".parquet")

_Line = tuple[int, bytes, bool]  # its length in the file, its text, and whether a newline ends it

_BLOCK = 1 << 20  # bytes read at once
_WINDOW = 4096  # bytes at either end that a fingerprint covers
_BATCH_ROWS, _BATCH_BYTES = 1024, 1 << 22  # maximum rows and bytes of a Parquet file decoded at once
_UNPACKED_BYTES, _UNPACKED_RATIO = 1 << 30, 200  # a Parquet file unpacks to the larger of the two at most
_TEXTS = ("NONE", "STRING", "ENUM", "JSON", "BSON")  # logical types whose columns may be read with their dictionary
_MAX_DEPTH = 100
_BOM = b"\xef\xbb\xbf"


def kind(name: str) -> str:
    """Which of ``KINDS`` a file is, by its name; empty if it is of none."""
    return next((suffix for suffix in KINDS if name.lower().endswith(suffix)), "")


def digest(data: bytes, size: int) -> str:
    """A hash of ``size`` bytes, in hexadecimal."""
    return blake2b(data, digest_size=size).hexdigest()


class BadFileError(Exception):
    """A file cannot be used at all; the message says why."""


class ChangedError(Exception):
    """A file changed while it was read."""


def different_names(names: Sequence[str]) -> None:
    """Raise :class:`BadFileError` if two columns have the same name: one of them would be lost."""
    if len(set(names)) < len(names):
        raise BadFileError(f"two columns have the same name: {', '.join(names)}")


class _Header(NamedTuple):
    names: list[str]
    position: int
    line: int


class _Text(Protocol):
    """The bytes of a text file by position, and its header once it has been read."""

    header: _Header | None

    def read_at(self, position: int, size: int) -> bytes: ...


class Blob(io.RawIOBase):
    """A file, as long as it was when it was listed: read by position, and by libraries as a file object."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self.size = size
        self.header: _Header | None = None
        self._fetch = fetch
        self._kept = (0, b"")
        self._at = 0

    def read_at(self, position: int, size: int) -> bytes:
        end = min(position + size, self.size)
        if position >= end:
            return b""
        start, data = self._kept
        if not start <= position < end <= start + len(data):
            start, stop = (0, self.size) if self.size <= _BLOCK else (position, end)
            data = self._fetch(start, stop)
            if len(data) < stop - start:
                raise ChangedError
            self._kept = (start, data)
        return data[position - start : end - start]

    def fingerprint(self, position: int) -> str:
        """Hash of what comes before a position: of its size and both of its ends."""
        head = self.read_at(0, min(position, _WINDOW))
        tail = self.read_at(max(position - _WINDOW, 0), min(position, _WINDOW))
        return digest(b"%d %b%b" % (position, head, tail), 8)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._at = position + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.read_at(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Gunzip:
    """Random access to a gz file: fast from the position of the last read on; before it, from the start of the file."""

    def __init__(self, blob: Blob) -> None:
        self.header: _Header | None = None
        self._file = io.BufferedReader(blob, _BLOCK)
        self._data = b""
        self._rewind()
        # Reads the file once to its end, as a gz file reports damage only there.
        while self._unpack():
            pass
        self._rewind()

    def read_at(self, position: int, size: int) -> bytes:
        if position < self._start:
            self._rewind()
        while position >= self._start + len(self._data):
            self._start += len(self._data)
            self._data = self._unpack()
            if not self._data:
                return b""
        return self._data[position - self._start :][:size]

    def read(self) -> bytes:
        """The whole content."""
        self._rewind()
        return b"".join(iter(self._unpack, b""))

    def _rewind(self) -> None:
        self._file.seek(0)
        self._stream = gzip.GzipFile(fileobj=self._file)
        self._start = 0
        self._data = b""

    def _unpack(self) -> bytes:
        try:
            return self._stream.read(_BLOCK)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise BadFileError(f"corrupt or truncated gzip file ({error})") from error


class ParquetReader:
    """The rows of a Parquet file, by number: fast where the last read ended, else from the start of a row group.

    A text that all rows share is stored once, so that a file of 1 kB may unpack to gigabytes. Texts are therefore read
    with their dictionary, and what they take without it is counted before any row is made. Rows that take more than
    ``most`` bytes are bad records.
    """

    def __init__(self, blob: Blob, most: int) -> None:
        import pyarrow.parquet as pq

        self._most_of_row = most
        with _parquet_errors():
            file = pq.ParquetFile(blob)
            names = file.schema_arrow.names
            metadata = file.metadata
            self._most = max(_UNPACKED_BYTES, _UNPACKED_RATIO * blob.size)
            size = sum(self._checked_size(metadata.row_group(group)) for group in range(metadata.num_row_groups))
            self._n_rows: int = metadata.num_rows
            self._n_batch = min(max(_BATCH_BYTES * self._n_rows // max(size, 1), 1), _BATCH_ROWS)
            leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
            raw = [leaf for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            texts = [leaf.path for leaf in raw if leaf.logical_type.type in _TEXTS]
            self._file = pq.ParquetFile(blob, metadata=metadata, read_dictionary=texts)
            # Decodes everything once, so that damage is found before the first record is taken.
            total = largest = 0
            for batch in self._file.iter_batches(self._n_batch):
                unpacked = _size(batch)
                total, largest = total + unpacked, max(largest, unpacked)
                self._check(total)
            self._n_batch = max(1, self._n_batch * _BATCH_BYTES // max(largest, _BATCH_BYTES))
        different_names(names)
        self._batch: Any = b""
        self._next = -1

    def read(self, name: str, start: int, limit: int, room: int) -> tuple[list[Incoming], int, bool]:
        """Up to ``limit`` records and about ``room`` bytes from row ``start`` on; their size; whether more are left."""
        if start != self._next:
            self._begin(start)
        records: list[Incoming] = []
        size = 0
        while len(records) < limit and size < room and self._next < self._n_rows:
            if not len(self._batch):
                with _parquet_errors():
                    self._batch = next(self._batches)
            batch = self._batch[: limit - len(records)]
            self._batch = self._batch[len(batch) :]
            taken = _size(batch)
            records += _row_records(name, self._next, batch, None if taken <= self._most_of_row else self._most_of_row)
            size += taken
            self._next += len(batch)
        return records, size, self._next < self._n_rows

    def _checked_size(self, group: Any) -> int:
        """The bytes that a row group takes by its own account, of which each value, even of nothing, has one."""
        columns = [group.column(number) for number in range(group.num_columns)]
        size: int = sum(max(column.total_uncompressed_size, column.num_values) for column in columns)
        self._check(size)
        return size

    def _check(self, size: int) -> None:
        if size > self._most:
            raise BadFileError(
                f"a Parquet file that unpacks to more than {self._most / 1e9:.1f} GB, over {_UNPACKED_RATIO} times its "
                "size: write what it holds in several files"
            )

    def _begin(self, start: int) -> None:
        metadata = self._file.metadata
        first, group = 0, 0
        while group < metadata.num_row_groups and first + metadata.row_group(group).num_rows <= start:
            first += metadata.row_group(group).num_rows
            group += 1
        self._batches = self._file.iter_batches(self._n_batch, row_groups=range(group, metadata.num_row_groups))
        self._batch = b""
        while first < start:
            with _parquet_errors():
                self._batch = next(self._batches)
            skipped = min(start - first, len(self._batch))
            self._batch = self._batch[skipped:]
            first += skipped
        self._next = start


class TextReader:
    """Reads records of a text file from a position on: ``records``, and the ``position`` and ``line`` after them.

    The methods return whether the file, as it is now, may hold more records. With ``strict=False``, JSON may hold
    values that cannot be written back (:func:`~evertune.sources.json.json_object`).
    """

    def __init__(self, name: str, text: _Text, position: int, line: int, most: int, strict: bool = True) -> None:
        self.records: list[Incoming] = []
        self.position = position
        self.line = line
        self._name = name
        self._text = text
        self._most = most
        self._strict = strict

    def read_jsonl(self, limit: int, room: int, final: bool) -> bool:
        """Read up to ``limit`` records and ``room`` bytes; ``final``: nothing will be appended to the last line."""
        stop = self.position + room
        lines = self._lines(final)
        if len(self.records) == limit:
            return True
        for length, raw, ended in lines:
            record = self._json_record(length, raw)
            if not (ended or final or (record and record.value is not None)):
                return False
            self.position += length
            self.line += 1
            if record:
                self.records.append(record)
                if len(self.records) == limit or self.position >= stop:
                    return True
        return False

    def read_csv(self, limit: int, room: int, delimiter: str, final: bool) -> bool:
        """Like :meth:`read_jsonl`; ``final`` also means that an open quote will not be closed."""
        stop = self.position + room
        # The limit of the csv module is global: it is raised here and restored below.
        field_limit = csv.field_size_limit(max(csv.field_size_limit(), self._most))
        try:
            header = self._text.header = self._text.header or self._read_header(delimiter, final)
            if header is None:
                return not final
            if self.position < header.position:
                self.position, self.line = header.position, header.line
            rows = _CsvRows(self._lines(final), delimiter, self._most)
            while len(self.records) < limit and self.position < stop:
                row = rows.read()
                if row is None:
                    return False
                if row.unfinished and not final:
                    return True
                if row.fields or row.error:
                    self.records.append(self._csv_record(header.names, row))
                self.position += row.length
                self.line += row.n_lines
            return True
        finally:
            csv.field_size_limit(field_limit)

    def _read_header(self, delimiter: str, final: bool) -> _Header | None:
        rows = _CsvRows(_lines(self._text, 0, self._most), delimiter, self._most)
        position = line = 0
        while (row := rows.read()) and (final or not row.unfinished):
            position += row.length
            line += row.n_lines
            if row.error:
                raise BadFileError(f"the header cannot be read: {row.error}; save the file as UTF-8 CSV")
            different_names(row.fields)
            if row.fields:
                return _Header(row.fields, position, line)
        return None

    def _lines(self, final: bool) -> Iterator[_Line]:
        """The lines from the position on. The rest of a line that was taken early comes first."""
        lines = _lines(self._text, self.position, self._most)
        if self.position and isinstance(self._text, Blob) and self._text.read_at(self.position - 1, 1) != b"\n":
            length, raw, ended = next(lines, (0, b"", False))
            if ended or final:
                if raw.strip():
                    self.records.append(
                        self._bad("continues a line that was complete when it was read", raw, self.line)
                    )
                self.position += length
        return lines

    def _json_record(self, length: int, raw: bytes) -> Incoming | None:
        if length > self._most:
            return self._too_long(length, raw)
        try:
            return Incoming(f"{self._name}:{self.line + 1}", json_object(raw, self._strict))
        except ValueError as error:
            return self._bad(str(error), raw, self.line + 1) if raw.strip() else None

    def _csv_record(self, names: list[str], row: _CsvRow) -> Incoming:
        if row.length > self._most:
            return self._too_long(row.length, row.raw)
        if row.error:
            return self._bad(row.error, row.raw, self.line + 1)
        if len(row.fields) != len(names):
            reason = f"has {len(row.fields)} fields, the header has {len(names)}"
            return self._bad(reason, row.raw, self.line + 1)
        value = {name: field or None for name, field in zip(names, row.fields, strict=True)}
        return Incoming(f"{self._name}:{self.line + 1}", value)

    def _bad(self, reason: str, raw: bytes, line: int) -> Incoming:
        return Incoming(f"{self._name}:{line}", None, reason, raw.decode(errors="backslashreplace").rstrip("\r"))

    def _too_long(self, length: int, raw: bytes) -> Incoming:
        reason = f"a line of {length} bytes is longer than max_line_bytes={self._most}"
        head = raw[:200].decode(errors="backslashreplace")
        where = f"{head}... (bytes {self.position} to {self.position + length} of {self._name})"
        return Incoming(f"{self._name}:{self.line + 1}", None, reason, where)


def _lines(text: _Text, position: int, most: int) -> Iterator[_Line]:
    """The lines from a position on; of those longer than ``most`` bytes, the head."""
    rest, cut = b"", 0
    begin = position == 0
    while block := text.read_at(position, _BLOCK):
        position += len(block)
        if begin and block.startswith(_BOM):
            block, cut = block[len(_BOM) :], len(_BOM)
        begin = False
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield cut + len(line) + 1, line, True
            cut = 0
        if len(rest) > most:
            cut += len(rest) - most
            rest = rest[:most]
    if rest:
        yield cut + len(rest), rest, False


class _CsvRow(NamedTuple):
    fields: list[str]
    error: str
    raw: bytes
    length: int
    n_lines: int
    unfinished: bool


class _CsvRows:
    """Rows of CSV lines. If the end of a row cannot be found, its first line is bad, and a row begins at the next."""

    def __init__(self, lines: Iterator[_Line], delimiter: str, most: int) -> None:
        self._lines = lines
        self._delimiter = delimiter
        self._most = most
        self._back: deque[_Line] = deque()
        self._taken: list[_Line] = []
        self._length = 0
        self._begin()

    def read(self) -> _CsvRow | None:
        """The next row; None when there are no more lines."""
        self._taken, self._length, self._valid, self._dry = [], 0, True, False
        try:
            fields = next(self._reader)
        except StopIteration:
            return self._first_line("") if self._taken else None
        except csv.Error as problem:
            return self._first_line(str(problem))
        raw = self._taken[0][1] if len(self._taken) == 1 else b"\n".join(raw for _, raw, _ in self._taken)
        error = "" if self._valid else "not valid UTF-8"
        return _CsvRow(fields, error, raw, self._length, len(self._taken), not self._taken[-1][2])

    def _first_line(self, error: str) -> _CsvRow:
        if self._length > self._most:
            error = f"a row is longer than max_line_bytes={self._most}: perhaps a quote is never closed"
        elif self._dry:
            error = "a quote is opened and never closed"
        elif "new-line" in error:
            error = "a carriage return outside quotes"
        (length, raw, ended), *others = self._taken
        self._back.extendleft(reversed(others))
        self._begin()
        return _CsvRow([], error, raw, length, 1, self._dry or not ended)

    def _begin(self) -> None:
        self._reader = csv.reader(self._feed(), delimiter=self._delimiter, strict=True)

    def _feed(self) -> Iterator[str]:
        """Give the CSV reader the lines of one row, and remember them."""
        while self._length <= self._most and (line := self._back.popleft() if self._back else next(self._lines, None)):
            self._taken.append(line)
            self._length += line[0]
            try:
                text = line[1].decode()
            except UnicodeDecodeError:
                text = line[1].decode(errors="replace")
                self._valid = False
            if self._length <= self._most:
                yield text + "\n"
        self._dry = self._length <= self._most


@contextmanager
def _parquet_errors() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise BadFileError(f"corrupt or truncated Parquet file ({error})") from error


def _size(batch: Any) -> int:
    """The bytes that the rows of a batch take."""
    return sum(map(_unpacked, batch.columns))


def _unpacked(array: Any) -> int:
    """The bytes of an array, with each text of a dictionary counted as often as it is used."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    texts = (pa.string(), pa.binary(), pa.large_string(), pa.large_binary())
    if pa.types.is_dictionary(kind) and kind.value_type in texts:
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return int(array.indices.nbytes) + int(pc.sum(lengths).as_py() or 0)
    if pa.types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(_unpacked(part[first:last]) for part in (array.keys, array.items)) + 8 * len(array)
    if pa.types.is_struct(kind):
        return sum(map(_unpacked, array.flatten())) + 8 * len(array)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _unpacked(array.flatten()) + 8 * len(array)
    return int(array.nbytes)


def _row_records(name: str, first: int, batch: Any, most: int | None) -> list[Incoming]:
    """The rows of a batch, of which ``first`` come before it; those of more than ``most`` bytes are bad."""
    sizes = [0] * len(batch) if most is None else [_size(batch.slice(row, 1)) for row in range(len(batch))]
    too_long = {row for row, size in enumerate(sizes) if most is not None and size > most}
    try:
        rows = [None] * len(batch) if too_long else batch.to_pylist()
    except Exception:  # a value that Python cannot represent: find out below in which rows
        rows = [None] * len(batch)
    records = []
    for position, row in enumerate(rows):
        origin = f"{name}:{first + position + 1}"
        if position in too_long:
            reason = f"a row of {sizes[position]} bytes is longer than max_line_bytes={most}"
            records.append(Incoming(origin, None, reason, f"(row {first + position + 1} of {name})"))
            continue
        try:
            value = plain(row or batch.slice(position, 1).to_pylist()[0], decode=True)
        except MemoryError:
            raise
        except Exception as error:
            records.append(Incoming(origin, None, f"has no JSON equivalent ({error})", str(row or "")))
        else:
            records.append(Incoming(origin, value))
    return records
