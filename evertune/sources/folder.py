"""Files that keep arriving in a folder or bucket, and lines that are appended to them, as a live source."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from warnings import warn

from evertune.sources.base import Chunk, Incoming, Offset, Source, SourceError
from evertune.sources.formats import (
    KINDS,
    BadFileError,
    Blob,
    ChangedError,
    Gunzip,
    ParquetReader,
    TextReader,
    digest,
    kind,
)

_T = TypeVar("_T")
_Info = dict[str, Any]

_UNFINISHED = (".tmp", ".part", "~")
_BUCKETS = {"s3", "gs", "gcs", "abfs", "az", "oss"}  # where a folder is there only while something is in it
_TAGS = ("ETag", "etag", "md5Hash")  # what a store calls a version of a file by; else the times and the inode tell
_TIMES = ("mtime", "created", "ino", "LastModified", "last_modified", "updated", "modified")
_CHUNK_BYTES = 1 << 26  # of text in a chunk, give or take a line: long documents may not fill the memory
_ATTEMPTS = 3  # readings of a file that changes meanwhile
_BAD = -1  # the position in a file that cannot be read at all


class FolderSource(Source):
    """Reads JSONL, CSV and Parquet files of a folder or bucket: new files, and lines appended to those it has read.

    Files are read in the order of their names, whatever their times: name them by date and their records come in the
    order of time. The text formats may be compressed (``.jsonl.gz``, ``.csv.gz``). Left alone are hidden and unfinished
    names (``.x``, ``_x``, ``x.tmp``, ``x.part``, ``x~``, also of folders), links to folders, and, with a warning,
    files of other kinds.

    Plain text files may grow. Parquet and gz files are checked whole before their first record is taken, and are read
    once. What has been read must stay as it was: a file that is truncated, rewritten, or deleted before it was read to
    its end is an error. It is told by the fingerprint that the offset keeps, with which a file is compared when it has
    changed: the 4 KiB at either end of what was read (of a Parquet or gz file: at either end of it, and its size). A
    renamed file is a new file. A file may be deleted once it has been read; the offset remembers it, in about 60 bytes.

    These become bad records, with the reason: lines that are not UTF-8 or not a JSON object; NaN, infinities, and
    numbers and nesting beyond bounds (they are no JSON, whatever Python reads); CSV rows with too few or too many
    fields, or with quotes in wrong places; Parquet rows that cannot be JSON; lines over ``max_line_bytes``, of which
    only the head is kept; a Parquet or gz file that is corrupt, as one bad record: it is read anew once another version
    replaces it.
    Where a CSV row cannot be told apart, its first line is bad and reading goes on at the next.

    A last line without a newline may still be being written. In JSONL it is taken as soon as it is a whole JSON object.
    In CSV, where half a row can look whole, and for corrupt files, which may be half copied, it waits until the file
    has rested for ``settle`` seconds. A time of modification further than that in the future says nothing about it.

    The values of CSV are strings, or None where the field is empty; those of Parquet are what JSON has: dates and
    times are ISO strings, decimals strings, durations seconds, and bytes must be UTF-8.

    Args:
        path: the folder: a local path, or a URL that fsspec knows, such as ``s3://bucket/tickets``.
        pattern: which files, by their names relative to ``path``: ``*.jsonl``, ``2026-*/**/*.csv``.
        exclude: patterns of files to leave alone, also where they have been read in part.
        storage_options: what fsspec needs for the URL: credentials, endpoints.
        delimiter: between the fields of CSV files.
        settle: seconds without a change after which an unfinished end counts as final. 5 by default: programs that
            write line by line pause for less.
        max_line_bytes: longer lines (rows, in CSV) are bad; 4 MiB by default. It bounds the memory a line can take.

    Raises:
        ValueError: for a setting that cannot be, or a URL of a kind that fsspec does not know.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> _ = (folder / "monday.jsonl").write_text('{"text": "my card is lost"}\\noops\\n')
        >>> source = FolderSource(str(folder), settle=0)
        >>> chunk = source.read(None, limit=100)
        >>> [(record.origin, record.value or record.error[:14]) for record in chunk.records]
        [('monday.jsonl:1', {'text': 'my card is lost'}), ('monday.jsonl:2', 'not valid JSON')]
        >>> with (folder / "monday.jsonl").open("a") as file:
        ...     _ = file.write('{"text": "it was in my coat"}\\n')
        >>> [record.origin for record in source.read(chunk.offset, limit=100).records]
        ['monday.jsonl:3']
    """

    def __init__(
        self,
        path: str,
        pattern: str = "**/*",
        exclude: Sequence[str] = (),
        storage_options: dict[str, Any] | None = None,
        delimiter: str = ",",
        settle: float = 5.0,
        max_line_bytes: int = 1 << 22,
    ) -> None:
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a list of patterns, got {exclude!r}; write [{exclude!r}]")
        if not (math.isfinite(settle) and settle >= 0):
            raise ValueError(f"settle must be seconds, 0 or more, got {settle}")
        if max_line_bytes < 1:
            raise ValueError(f"max_line_bytes must be positive, got {max_line_bytes}")
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise ValueError(f"delimiter must be one character, no quote and no line end, got {delimiter!r}")
        self.path = str(path)
        self._fs, self._root = _filesystem(self.path, storage_options or {})
        self._pattern = _pattern(pattern)
        self._depth = math.inf if "**" in pattern else pattern.count("/")
        self._exclude = [_pattern(text) for text in exclude]
        self._delimiter = delimiter
        self._settle = settle
        self._max_line_bytes = max_line_bytes
        self._warned = False
        self._open: tuple[tuple[str, str], Gunzip | ParquetReader] | None = None  # where the last chunk ended
        self._listed: tuple[Offset, dict[str, _Info]] | None = None  # what a full chunk has left

    def read(self, offset: Offset | None, limit: int) -> Chunk:
        """The next records, at most ``limit`` of them, file by file.

        Raises:
            ValueError: for a limit under 1, or the offset of another kind of source.
            SourceError: when the folder is gone or cannot be reached, or a file was truncated, rewritten or deleted
                before it was read, or keeps changing.
        """
        if limit < 1:
            raise ValueError(f"limit must be positive, got {limit}")
        if offset is not None and not isinstance(offset.get("files"), dict):
            raise ValueError(f"this is not the offset of a folder: {str(offset)[:200]}")
        marks: dict[str, list[Any]] = dict(offset["files"]) if offset else {}
        listing = self._listed[1] if self._listed and self._listed[0] == offset else self._list()
        self._listed = None
        for name, entry in marks.items():
            if not entry[-1] and name not in listing and self._wanted(name):
                raise self._deleted(name)
        records: list[Incoming] = []
        room = _CHUNK_BYTES
        for name, info in listing.items():
            known = marks.get(name)
            if known[-1] == _version(info) if known else not info["size"]:
                continue
            if len(records) == limit or room <= 0:
                break
            reading = self._read_file(name, info, _Mark(*known) if known else None, limit - len(records), room)
            if reading:
                records += reading.records
                room -= reading.size
                if reading.mark.position or reading.mark.version:
                    marks[name] = list(reading.mark)
        chunk = Chunk(records, {"files": marks})
        self._listed = (chunk.offset, listing) if len(records) == limit or room <= 0 else None
        return chunk

    def close(self) -> None:
        self._open = self._listed = None

    def _wanted(self, name: str) -> bool:
        """Whether a file of this name is one to read, its kind apart."""
        return (
            self._pattern.match(name) is not None
            and not any(pattern.match(name) for pattern in self._exclude)
            and not _hidden(name)
        )

    def _list(self) -> dict[str, _Info]:
        """The files there are, in the order of their names, with what the filesystem says of them."""
        self._call(self._fs.invalidate_cache)
        listing: dict[str, _Info] = {}
        other: list[str] = []
        folders = [self._root]
        while folders:
            folder = folders.pop()
            try:
                infos = self._call(self._fs.ls, folder, detail=True)
            except FileNotFoundError:
                if folder == self._root and not self._is_empty_bucket():
                    raise SourceError(
                        f"there is no folder {self.path}: mount or create it, or correct the path"
                    ) from None
                continue
            for info in infos:
                path = info["name"].rstrip("/")
                name = path[len(self._root) :].lstrip("/")
                if info["type"] == "directory":
                    if name and not _hidden(name) and name.count("/") < self._depth:
                        folders.append(path)
                elif not name:
                    self._refuse_file(info)
                elif self._wanted(name) and (found := self._regular(info)):
                    if kind(name):
                        listing[_printable(name)] = found
                    else:
                        other.append(name)
        if other and not self._warned:
            self._warned = True
            warn(
                f"{self.path}: ignored {len(other)} files that are none of {', '.join(KINDS)}, such as {min(other)!r}; "
                "give a pattern that leaves them out",
                stacklevel=3,
            )
        return dict(sorted(listing.items()))

    def _is_empty_bucket(self) -> bool:
        """Whether this is a place where a folder is there only while something is in it."""
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        return bool(protocols & _BUCKETS) and bool(self._call(self._fs.exists, self._root.split("/")[0]))

    def _refuse_file(self, info: _Info) -> None:
        if info["size"]:  # buckets may hold an empty object in the name of a folder
            raise SourceError(f"{self.path} is a file: give the folder it is in as path, and its name as pattern")

    def _regular(self, info: _Info) -> _Info | None:
        """What is known of a file, or of the file that a link leads to; None when there is none."""
        if info.get("islink"):
            try:
                info = self._call(self._fs.info, info["name"])
            except FileNotFoundError:
                return None
        return info if info["type"] == "file" else None

    def _call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Ask the filesystem; whatever its library raises when it cannot answer becomes a SourceError."""
        try:
            return function(*args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise SourceError(
                f"cannot read {args[0] if args else self.path}: {error}; nothing is lost: read on when that is mended"
            ) from error

    def _read_file(self, name: str, info: _Info, mark: _Mark | None, limit: int, room: int) -> _Reading | None:
        """Read on in a file: from one version of it, or from one to which lines are being appended."""
        try:
            for _ in range(_ATTEMPTS):
                try:
                    reading = self._read_once(name, info, mark, limit, room)
                    now = self._stat(info)
                    if _version(now) == _version(info):
                        return reading
                    again = self._read_once(name, {**now, "size": info["size"]}, mark, limit, room)
                    if (again and again.unmarked) == (reading and reading.unmarked):
                        return reading  # with the old version: what was appended is there for the next reading
                except ChangedError:
                    pass
                info = self._stat(info)
        except FileNotFoundError:
            if mark and not mark.version:
                raise self._deleted(name) from None
            return None
        raise SourceError(
            f"{self.path}/{name} keeps changing while it is read: only append to it, or write it elsewhere and move "
            "it here when it is whole"
        )

    def _stat(self, info: _Info) -> _Info:
        self._call(self._fs.invalidate_cache)
        now: _Info = self._call(self._fs.info, info["name"])
        return now

    def _read_once(self, name: str, info: _Info, mark: _Mark | None, limit: int, room: int) -> _Reading | None:
        """Read on in a file as if it did not change meanwhile; None while it waits for the rest of itself."""
        version = _version(info)
        blob = Blob(lambda start, end: self._call(self._fs.cat_file, info["name"], start=start, end=end), info["size"])
        if mark and mark.position == _BAD:
            if blob.fingerprint(blob.size) == mark.fingerprint:
                return _Reading([], mark._replace(version=version), 0)
            mark = None
        sealed = kind(name).endswith((".gz", ".parquet"))
        if mark:
            self._check(name, blob, mark, sealed)
        start, line = mark[:2] if mark else (0, 0)
        try:
            opened = self._opened(name, version, blob) if sealed else blob
            if isinstance(opened, ParquetReader):
                records, size, more = opened.read(name, start, limit, room)
                position = start + len(records)
            else:
                reader = TextReader(name, opened, start, line, self._max_line_bytes)
                if kind(name).startswith(".csv"):
                    more = reader.read_csv(limit, room, self._delimiter, final=sealed or self._settled(info))
                else:
                    more = reader.read_jsonl(limit, room, final=sealed)
                records, position, line = reader.records, reader.position, reader.line
                size = position - start
                more = more and (sealed or position < blob.size)
        except BadFileError as error:
            return self._bad_file(name, info, blob, str(error), waits=sealed, begun=mark is not None)
        if more and not isinstance(opened, Blob):
            self._open = ((name, version), opened)
        fingerprint = blob.fingerprint(blob.size if sealed else position)
        return _Reading(records, _Mark(position, line, fingerprint, "" if more else version), size)

    def _bad_file(self, name: str, info: _Info, blob: Blob, reason: str, waits: bool, begun: bool) -> _Reading | None:
        if begun:
            raise SourceError(f"{self.path}/{name} can no longer be read: {reason}; put it back as it was")
        if waits and not self._settled(info):
            return None
        fingerprint = blob.fingerprint(blob.size)
        bad = Incoming(name, None, reason, f"{blob.size} bytes, fingerprint {fingerprint}")
        return _Reading([bad], _Mark(_BAD, 0, fingerprint, _version(info)), 0)

    def _check(self, name: str, blob: Blob, mark: _Mark, sealed: bool) -> None:
        """Refuse a file that is no longer the one that was read up to the mark."""
        if not sealed and blob.size < mark.position:
            what = f"was truncated: {mark.position} bytes of it have been read, and it has {blob.size}"
        elif blob.fingerprint(blob.size if sealed else mark.position) != mark.fingerprint:
            what = "was rewritten: what has been read of it has changed"
        else:
            return
        raise SourceError(
            f"{self.path}/{name} {what}. {'Never change it' if sealed else 'Only append to it'}: put it back as it was "
            f"and give new contents a new name, or add {name!r} to exclude to go on without it"
        )

    def _deleted(self, name: str) -> SourceError:
        return SourceError(
            f"{self.path}/{name} was deleted before it was read to its end: put it back, or add {name!r} to exclude "
            "to go on without the rest of it"
        )

    def _opened(self, name: str, version: str, blob: Blob) -> Gunzip | ParquetReader:
        """A sealed file: as the last chunk left it, or opened and checked whole."""
        left, self._open = self._open, None  # whoever stumbles does not leave it half-way
        if left and left[0] == (name, version):
            return left[1]
        return ParquetReader(blob) if kind(name) == ".parquet" else Gunzip(blob)

    def _settled(self, info: _Info) -> bool:
        """Whether a file has rested. A clock that went backwards since makes it look as if it came from the future."""
        modified = info.get("mtime")
        try:
            if not isinstance(modified, (int, float)):
                modified = self._call(self._fs.modified, info["name"]).timestamp()
        except SourceError:  # a filesystem that keeps no times
            return True
        return abs(time.time() - modified) >= self._settle


class _Mark(NamedTuple):
    """How far a file has been read: its value in the offset.

    ``position`` is in bytes of text or in rows of Parquet, ``line`` the lines before it, ``version`` what the
    filesystem says of the file as long as there is nothing more to read in it, and empty where there is.
    """

    position: int
    line: int
    fingerprint: str
    version: str


class _Reading(NamedTuple):
    records: list[Incoming]
    mark: _Mark
    size: int

    @property
    def unmarked(self) -> tuple[Any, ...]:
        """All but the version of the file."""
        return self.records, self.mark[:3], self.size


def _filesystem(path: str, options: dict[str, Any]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        fs, root = url_to_fs(path, **options)
    except ImportError as error:
        raise ModuleNotFoundError(f'{path}: {error}; for s3://, pip install "evertune[s3]"') from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot use {path!r} with the storage_options {sorted(options)}: {error}") from error
    return fs, root.rstrip("/")


def _pattern(pattern: str) -> re.Pattern[str]:
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]

    return re.compile(glob_translate(pattern))


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) or part.endswith(_UNFINISHED) for part in name.lower().split("/"))


def _printable(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceError(f"the name of the file {name!r} is not valid UTF-8: rename it") from None
    return name


def _version(info: _Info) -> str:
    """What changes when a file changes."""
    tag = next((info[key] for key in _TAGS if info.get(key)), None)
    stamps = str(tag).strip('"') if tag else list(map(info.get, _TIMES))
    return digest(f"{info['size']} {stamps}".encode(), 6)
