"""Files that keep arriving in a folder or bucket, and lines that are appended to them, as a live source."""

from __future__ import annotations

import math
import os
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
from evertune.utils.secrets import fill_in

_T = TypeVar("_T")
_Info = dict[str, Any]

_UNFINISHED = (".tmp", ".part", "~")
_BUCKETS = {"s3", "gs", "gcs", "abfs", "az", "oss"}  # where a folder exists only while it contains an object
_TAGS = ("ETag", "etag", "md5Hash")  # names of a file's version in object stores; elsewhere see _TIMES
_TIMES = ("mtime", "created", "ino", "LastModified", "last_modified", "updated", "modified")
_CHUNK_BYTES = 1 << 26  # bytes of text in a chunk, give or take a line: bounds the memory that long documents take
_ATTEMPTS = 3  # attempts to read a file that changes meanwhile
_ABANDONED = 86_400.0  # seconds after which half a JSON object at the end of a file is taken for a bad line
_BAD = -1  # the position that marks a file which cannot be read at all


class FolderSource(Source):
    """Reads JSONL, CSV and Parquet files of a folder or bucket: new files, and lines appended to those it has read.

    Files are read in the order of their names, not of their times: name them by date, and their records come in
    chronological order. The text formats may be compressed (``.jsonl.gz``, ``.csv.gz``). Ignored are hidden and
    unfinished names (``.x``, ``_x``, ``x.tmp``, ``x.part``, ``x~``, also of folders), links to folders, and, with a
    warning, files of other kinds and links that lead out of the folder: whoever may write to an inbox need not be
    allowed to read what this process can.

    Plain text files may grow. Parquet and gz files are checked as a whole before their first record is taken, and are
    read once. What has been read must not change: a file that is truncated, rewritten, or deleted before it was read to
    its end is an error. It is detected by a fingerprint in the offset, with which a modified file is compared: a hash
    of the 4 KiB at either end of what was read (for a Parquet or gz file: of the whole file, and its size). A renamed
    file is a new file. A file may be deleted once it has been read; the offset remembers it, in about 60 bytes.

    These become bad records, with the reason: lines that are not UTF-8 or not a JSON object; NaN, infinities, and
    numbers and nesting that are too large (not JSON, even if Python accepts them); CSV rows with too few or too many
    fields, or with misplaced quotes; Parquet rows that have no JSON equivalent; lines over ``max_line_bytes``, of which
    only the head is kept, and Parquet rows over it; a Parquet or gz file that is corrupt, as one bad record: it is read
    again once another version replaces it. If the end of a CSV row cannot be found, its first line is bad and reading
    resumes at the next.

    A last line without a newline may still be being written. In JSONL it is taken as soon as it is a whole JSON object.
    In CSV, where half a row can look whole, and for corrupt files, which may be half copied, it waits until the file
    has not changed for ``settle`` seconds. A modification time further than that in the future is ignored.

    The values of CSV are strings, or None if the field is empty. The values of Parquet are converted to JSON: dates and
    times to ISO strings, decimals to strings, durations to seconds; bytes must be UTF-8.

    Args:
        path: The folder: a local path, or a URL that fsspec supports, such as ``s3://bucket/tickets``.
        pattern: Glob pattern of the files to read, relative to ``path``: ``*.jsonl``, ``2026-*/**/*.csv``.
        exclude: Patterns of files to ignore, even if they have been read in part.
        storage_options: Options of fsspec for the URL: credentials, endpoints. ``${NAME}``, here and in the URL, is
            taken from the environment, so that secrets stay out of configurations and versions.
        delimiter: Character between the fields of CSV files.
        settle: Seconds without a change after which an unfinished end counts as final. 5 by default: programs that
            write line by line rarely pause for longer.
        max_line_bytes: Lines (in CSV and Parquet: rows) longer than this are bad records; 4 MiB by default. It bounds
            the memory that a line can take.

    Raises:
        ValueError: If a setting is out of range, a name is not set in the environment, or fsspec does not support the
            kind of URL.

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
        self._warned: set[str] = set()
        self._open: tuple[tuple[str, str], Gunzip | ParquetReader] | None = None  # where the last chunk ended
        self._listed: tuple[Offset, dict[str, _Info]] | None = None  # files that a full chunk has left unread

    def read(self, offset: Offset | None, limit: int) -> Chunk:
        """The next records, at most ``limit`` of them, file by file.

        Raises:
            ValueError: If ``limit`` is below 1, or the offset belongs to another kind of source.
            SourceError: If the folder is gone or cannot be reached, or a file was truncated, rewritten or deleted
                before it was read, or keeps changing.
        """
        if limit < 1:
            raise ValueError(f"limit must be positive, got {limit}")
        if offset is not None and not isinstance(offset.get("files"), dict):
            raise ValueError(f"this is not the offset of a folder: {str(offset)[:200]}")
        marks: dict[str, list[Any]] = dict(offset["files"]) if offset else {}
        # A full chunk left files unread: the next call continues with the same listing, which in a bucket is slow.
        listing = self._listed[1] if self._listed and self._listed[0] == offset else self._list()
        self._listed = None
        for name, entry in marks.items():
            # An entry without a version was not read to its end.
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
        """The files to read, in the order of their names, with their information from the filesystem."""
        self._call(self._fs.invalidate_cache)
        listing: dict[str, _Info] = {}
        other: list[str] = []
        leading_out: list[str] = []
        folders = [self._root]
        while folders:
            folder = folders.pop()
            try:
                infos = self._call(self._fs.ls, folder, detail=True)
            except FileNotFoundError:
                if folder == self._root and not self._is_empty_bucket():
                    raise SourceError(
                        f"the folder {self.path} does not exist: mount or create it, or correct the path"
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
                elif self._wanted(name) and self._leads_out(info):
                    leading_out.append(name)
                elif self._wanted(name) and (found := self._regular(info)):
                    if kind(name):
                        listing[_printable(name)] = found
                    else:
                        other.append(name)
        self._warn(leading_out, "links that lead out of the folder", "move or copy the files here")
        self._warn(other, f"files of other kinds than {', '.join(KINDS)}", "pass a pattern that excludes them")
        return dict(sorted(listing.items()))

    def _warn(self, names: list[str], what: str, what_to_do: str) -> None:
        if names and what not in self._warned:
            self._warned.add(what)
            warn(f"{self.path}: ignored {len(names)} {what}, such as {min(names)!r}; {what_to_do}", stacklevel=4)

    def _is_empty_bucket(self) -> bool:
        """Whether this is an existing bucket, in which a folder exists only while it contains an object."""
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        return bool(protocols & _BUCKETS) and bool(self._call(self._fs.exists, self._root.split("/")[0]))

    def _refuse_file(self, info: _Info) -> None:
        if info["size"]:  # buckets may hold an empty object in the name of a folder
            raise SourceError(f"{self.path} is a file: pass its folder as path and its name as pattern")

    def _leads_out(self, info: _Info) -> bool:
        """Whether this is a link to what is not in the folder."""
        if not info.get("islink"):
            return False
        root = os.path.realpath(self._root)
        return os.path.commonpath([root, os.path.realpath(info["name"])]) != root

    def _regular(self, info: _Info) -> _Info | None:
        """The information about a file, or the target of a link; None if it is not a regular file."""
        if info.get("islink"):
            try:
                info = self._call(self._fs.info, info["name"])
            except FileNotFoundError:
                return None
        return info if info["type"] == "file" else None

    def _call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call the filesystem; any error of its library other than FileNotFoundError becomes a SourceError."""
        try:
            return function(*args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise SourceError(
                f"cannot read {args[0] if args else self.path}: {error}; nothing is lost: reading resumes once the "
                "cause is fixed"
            ) from error

    def _read_file(self, name: str, info: _Info, mark: _Mark | None, limit: int, room: int) -> _Reading | None:
        """Resume reading a file whose content may be appended to, but must not change, meanwhile."""
        try:
            for _ in range(_ATTEMPTS):
                try:
                    # The file may change between two reads: only if its version was the same before and after is the
                    # content known to be consistent. Otherwise the same range is read again, which must give the same
                    # records.
                    reading = self._read_once(name, info, mark, limit, room)
                    now = self._stat(info)
                    if _version(now) == _version(info):
                        return reading
                    again = self._read_once(name, {**now, "size": info["size"]}, mark, limit, room)
                    if (again and again.unmarked) == (reading and reading.unmarked):
                        return reading  # with the old version, so that the next call reads what was appended
                except ChangedError:
                    pass
                info = self._stat(info)
        except FileNotFoundError:
            if mark and not mark.version:
                raise self._deleted(name) from None
            return None
        raise SourceError(
            f"{self.path}/{name} keeps changing while it is read: only append to it, or write it elsewhere and move "
            "it here when it is complete"
        )

    def _stat(self, info: _Info) -> _Info:
        self._call(self._fs.invalidate_cache)
        now: _Info = self._call(self._fs.info, info["name"])
        return now

    def _read_once(self, name: str, info: _Info, mark: _Mark | None, limit: int, room: int) -> _Reading | None:
        """Resume reading a file that is assumed not to change meanwhile; None while it seems incomplete."""
        version = _version(info)
        blob = Blob(lambda start, end: self._call(self._fs.cat_file, info["name"], start=start, end=end), info["size"])
        # A bad file was reported once: it is read again only if its content has changed.
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
                    more = reader.read_jsonl(limit, room, final=sealed or self._settled(info, _ABANDONED))
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
            raise SourceError(f"{self.path}/{name} can no longer be read: {reason}; restore it")
        if waits and not self._settled(info):
            return None
        fingerprint = blob.fingerprint(blob.size)
        bad = Incoming(name, None, reason, f"{blob.size} bytes, fingerprint {fingerprint}")
        return _Reading([bad], _Mark(_BAD, 0, fingerprint, _version(info)), 0)

    def _check(self, name: str, blob: Blob, mark: _Mark, sealed: bool) -> None:
        """Refuse a file that is no longer the one that was read up to the mark."""
        if not sealed and blob.size < mark.position:
            what = f"was truncated: {mark.position} bytes of it have been read, but it has only {blob.size} left"
        elif blob.fingerprint(blob.size if sealed else mark.position) != mark.fingerprint:
            what = "was rewritten: the part that has been read has changed"
        else:
            return
        raise SourceError(
            f"{self.path}/{name} {what}. {'Never change it' if sealed else 'Only append to it'}: restore it and "
            f"write new contents under a new name, or add {name!r} to exclude to continue without it"
        )

    def _deleted(self, name: str) -> SourceError:
        return SourceError(
            f"{self.path}/{name} was deleted before it was read to its end: restore it, or add {name!r} to exclude "
            "to continue without the rest of it"
        )

    def _opened(self, name: str, version: str, blob: Blob) -> Gunzip | ParquetReader:
        """A sealed file: as the last chunk left it, or opened and checked as a whole."""
        left, self._open = self._open, None  # after an error, the file is opened again from its start
        if left and left[0] == (name, version):
            return left[1]
        return ParquetReader(blob, self._max_line_bytes) if kind(name) == ".parquet" else Gunzip(blob)

    def _settled(self, info: _Info, at_least: float = 0.0) -> bool:
        """Whether a file has not changed for ``settle`` seconds; ``abs``, as the clock may have been set back since."""
        modified = info.get("mtime")
        try:
            if not isinstance(modified, (int, float)):
                modified = self._call(self._fs.modified, info["name"]).timestamp()
        except SourceError:  # the filesystem does not store times
            return not at_least
        return abs(time.time() - modified) >= max(self._settle, at_least)


class _Mark(NamedTuple):
    """How far a file has been read: its value in the offset.

    ``position`` is in bytes of text or rows of Parquet, and ``line`` the number of lines before it. ``version`` is the
    version of the file (see :func:`_version`) once it has been read to its end, and empty before.
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
        """All but the version of the file, to compare two readings."""
        return self.records, self.mark[:3], self.size


def _filesystem(path: str, options: dict[str, Any]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        fs, root = url_to_fs(fill_in(path) if "://" in path else path, **fill_in(options))
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
