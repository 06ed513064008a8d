"""Reading examples from any source, with bad rows set aside together with their reason.

A source is a Hugging Face ``Dataset`` or ``DatasetDict``, a pandas ``DataFrame``, a list of dicts, the path of a JSONL,
CSV or Parquet file (also ``.gz``), a list of such paths, a dict of paths by split, a folder of ``<label>/*.txt``, or
the name of a dataset on the Hugging Face hub. A path may start with ``package:NAME/`` for data in an installed package.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import uuid4
from warnings import warn

from evertune.sources.values import is_utf8, label_value
from evertune.utils.locate import locate

Normaliser = Callable[[Any], Any]
"""Converts a value of a column to the form that the stream uses, or raises ValueError with the reason."""

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
"""Names that a split may have in a source, with its canonical name."""

_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used.

    Args:
        source: File, or kind of object, that the row came from.
        row: Number of the row, from 1: the line of a JSONL file, the record of a CSV or Parquet file (not counting the
            header), or the row of a table.
        reason: Why the row could not be used.
        raw: The row as read, as text.
    """

    source: str
    row: int
    reason: str
    raw: str


@dataclass
class Rows:
    """All good rows of a source.

    Args:
        dataset: The rows, a Hugging Face ``Dataset``.
        values: Normalised values of the requested columns, one per row.
        split: "train", "val" or "test" for each row, or None if the source has no splits of its own.
        bad_rows: Rows that were left out.
    """

    dataset: Any
    values: dict[str, list[Any]]
    split: list[str] | None
    bad_rows: list[BadRow]


@dataclass
class _Part:
    """The rows of one origin (dicts, or a ``Dataset``), their numbers there, and the records that failed to parse."""

    origin: str
    rows: Any
    numbers: Sequence[int]
    bad: list[BadRow] = field(default_factory=list)
    path: Path | None = None
    split: str | None = None

    def columns(self) -> list[str]:
        if isinstance(self.rows, list):
            return list(dict.fromkeys(key for row in self.rows for key in row))
        return list(self.rows.column_names)

    def values(self, column: str) -> list[Any]:
        """A column; the numbers of a ``ClassLabel`` become the names they stand for."""
        if isinstance(self.rows, list):
            return [row.get(column) for row in self.rows]
        feature = self.rows.features[column]
        values = self.rows.with_format(None)[column][:]
        if hasattr(feature, "int2str"):
            return [None if value is None or value < 0 else feature.int2str(value) for value in values]
        return list(values)

    def dataset(self, good: Sequence[int], checked: Mapping[str, list[Any]]) -> Any:
        """The good rows as a ``Dataset`` with the checked values."""
        if isinstance(self.rows, list):
            rows = [self.rows[position] for position in good]
            columns = {column: [row.get(column) for row in rows] for column in self.columns()}
            return _table({**columns, **checked}, self.origin)
        dataset = self.rows.select(good)
        for column, values in checked.items():
            if values != dataset.with_format(None)[column][:]:
                dataset = dataset.remove_columns(column).add_column(column, values)
        return dataset


def read_rows(
    source: Any,
    columns: Mapping[str, Normaliser],
    split_column: str | None = None,
    on_bad_row: Literal["raise", "skip"] = "raise",
    bad_rows_file: str | Path | None = None,
) -> Rows:
    """Read a whole source, checking the requested columns in every row.

    Args:
        source: See the module's docstring.
        columns: Requested columns, each with the function that checks its values.
        split_column: Column with "train", "val" or "test", if there is one.
        on_bad_row: "raise" (default) at the first bad row, or "skip" the bad rows: they are counted in a warning and
            returned, and those of a file are stored in a side file.
        bad_rows_file: Side file for the skipped rows, as JSON lines. By default ``<path>.bad.jsonl`` for each path
            read.

    Raises:
        ValueError: If the source cannot be read, lacks a column, has a bad row (reported with file, row number and
            reason), or has no good row at all.
        FileNotFoundError: If a path does not exist.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f'on_bad_row must be "raise" or "skip", got {on_bad_row!r}')
    if split_column is not None:
        columns = {**columns, split_column: split_name}
    parts = list(_parts(source))
    values: dict[str, list[Any]] = {column: [] for column in columns}
    split: list[str] = []
    datasets = []
    for part in parts:
        good, checked = _check(part, columns)
        if part.bad and on_bad_row == "raise":
            first = min(part.bad, key=lambda bad: bad.row)
            more = f" ({len(part.bad) - 1} more rows are bad)" if len(part.bad) > 1 else ""
            raise ValueError(
                f'{first.source}, row {first.row}: {first.reason}{more}; correct it, or pass on_bad_row="skip"'
            )
        for column in columns:
            values[column] += checked[column]
        split += [part.split or "train"] * len(good)
        if good:
            datasets.append(part.dataset(good, checked))
    bad_rows = [bad for part in parts for bad in part.bad]
    if bad_rows:
        kept = _keep_bad_rows(parts, bad_rows_file)
        warn(f"skipped {len(bad_rows)} bad rows of {', '.join(p.origin for p in parts if p.bad)}{kept}", stacklevel=4)
    if not split:
        raise ValueError(f"{', '.join(part.origin for part in parts)}: no usable row")
    if split_column is not None:
        split = values.pop(split_column)
    return Rows(_join(datasets), values, split if set(split) != {"train"} else None, bad_rows)


def name_value(value: Any) -> str:
    """A single name: of a label if only one is allowed, or of a domain."""
    name = label_value(value)
    if not isinstance(name, str):
        raise ValueError(f"one name is expected, got {name!r}")
    return name


def split_name(value: Any) -> str:
    """The canonical name of a split."""
    if value not in SPLITS:
        raise ValueError(f"the split {value!r} is none of {sorted(SPLITS)}")
    return SPLITS[value]


def _check(part: _Part, columns: Mapping[str, Normaliser]) -> tuple[list[int], dict[str, list[Any]]]:
    """The positions of the good rows and their normalised values; bad rows are appended to ``part.bad``."""
    present = part.columns()
    absent = [column for column in columns if column not in present]
    if absent and len(part.rows):
        raise ValueError(f"{part.origin} has no column {absent[0]!r}; its columns are {present}")
    raw = {column: [] if absent else part.values(column) for column in columns}
    checked: dict[str, list[Any]] = {column: [] for column in columns}
    good = []
    for position, number in enumerate(part.numbers):
        try:
            row = {column: _normalised(columns[column], column, raw[column][position]) for column in columns}
        except ValueError as error:
            record = json.dumps(part.rows[position], default=str)
            part.bad.append(BadRow(part.origin, number, str(error), record))
            continue
        good.append(position)
        for column, value in row.items():
            checked[column].append(value)
    return good, checked


def _normalised(normaliser: Normaliser, column: str, value: Any) -> Any:
    try:
        return normaliser(value)
    except ValueError as error:
        raise ValueError(f"column {column!r}: {error}") from None


def _keep_bad_rows(parts: Sequence[_Part], bad_rows_file: str | Path | None) -> str:
    """Write the side files atomically; returns their paths for the warning."""
    files: dict[Path, list[BadRow]] = {}
    for part in parts:
        if part.bad and (bad_rows_file or part.path):
            path = Path(bad_rows_file) if bad_rows_file else Path(f"{part.path}.bad.jsonl")
            files.setdefault(path, []).extend(part.bad)
    for path, rows in files.items():
        draft = path.with_name(f"{path.name}.{uuid4().hex}.part")  # every rank replaces the same file
        try:
            draft.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise ValueError(
                f"cannot keep the skipped rows in {path} ({error.strerror}); "
                "pass bad_rows_file=, a file that can be written"
            ) from error
    return f"; they are kept in {', '.join(map(str, files))}" if files else ""


def _parts(source: Any) -> Iterator[_Part]:
    from datasets import Dataset, DatasetDict

    if isinstance(source, DatasetDict) or (isinstance(source, Mapping) and source):
        if not set(source) & set(SPLITS):
            raise ValueError(f"a dict of sources has the names of splits {sorted(SPLITS)}, got {list(source)}")
        for name in source:
            if name not in SPLITS:
                warn(f"ignored the split {name!r} of the source; it is none of {sorted(SPLITS)}", stacklevel=5)
                continue
            for part in _parts(source[name]):
                part.split = SPLITS[name]
                part.origin = part.origin if part.path else f"{part.origin} ({name})"
                yield part
    elif isinstance(source, Dataset):
        yield _part("Dataset", source)
    elif "pandas" in sys.modules and isinstance(source, sys.modules["pandas"].DataFrame):
        yield _part("DataFrame", Dataset.from_pandas(source, preserve_index=False))
    elif isinstance(source, (str, Path)):
        yield from _path_parts(str(source))
    elif isinstance(source, Sequence) and source and all(isinstance(item, Mapping) for item in source):
        yield _part("list", list(source))
    elif isinstance(source, Sequence) and source and all(isinstance(item, (str, Path)) for item in source):
        for item in source:
            yield from _path_parts(str(item))
    else:
        empty = "an empty " if hasattr(source, "__len__") and not len(source) else ""
        raise ValueError(
            "a source is a Dataset, a DatasetDict, a DataFrame, a list of dicts, a path, a list of paths, a dict of "
            f"paths by split, or the name of a dataset on the hub; got {empty}{type(source).__name__}"
        )


def _part(origin: str, rows: Any, path: Path | None = None) -> _Part:
    return _Part(origin, rows, range(1, len(rows) + 1), path=path)


def _path_parts(source: str) -> Iterator[_Part]:
    path = Path(locate(source)).expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if path.is_dir():
        yield _read_folder(path)
    elif suffix in _SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        with _readable(path):
            reader = {".csv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_jsonl)
            yield reader(path)
    elif path.exists():
        raise ValueError(f"{path}: cannot read files of this kind; use one of {', '.join(_SUFFIXES)} (also .gz)")
    else:
        yield from _parts(_load_from_hub(source))


def _load_from_hub(source: str) -> Any:
    """``load_dataset`` for a hub name, with the configuration, if any, after a colon ("glue:sst2")."""
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        return load_dataset(name, configuration or None)
    except Exception as error:
        raise ValueError(
            f"{source!r} is neither a file or folder here nor a dataset that the hub gave: {error}"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the corrupt file in the error, whichever library detects it."""
    import pyarrow as pa

    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: corrupt or truncated gzip file ({error})") from error
    except pa.ArrowException as error:
        raise ValueError(f"{path}: corrupt or truncated file ({error})") from error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(path: Path) -> _Part:
    records: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    bad: list[BadRow] = []
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                reason = "not valid UTF-8"
            except ValueError as error:
                reason = f"not valid JSON ({error})"
            else:
                if isinstance(record, dict):
                    records.append(record)
                    numbers.append(number)
                    continue
                reason = f"not a JSON object but a {type(record).__name__}"
            bad.append(BadRow(str(path), number, reason, line.decode(errors="backslashreplace").rstrip("\n")))
    return _Part(str(path), records, numbers, bad, path)


def _read_csv(path: Path) -> _Part:
    records: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    bad: list[BadRow] = []
    limit = csv.field_size_limit(2**31 - 1)  # fields may be longer than csv's default limit of 128 KiB
    try:
        # Undecodable bytes become surrogates, so that a bad row is reported instead of ending the whole file.
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            for number, row in enumerate((row for row in rows if row), start=1):
                if len(row) != len(header):
                    reason = f"has {len(row)} fields, the header has {len(header)}"
                elif not is_utf8(row):
                    reason = "not valid UTF-8"
                else:
                    records.append({name: cell or None for name, cell in zip(header, row, strict=True)})
                    numbers.append(number)
                    continue
                bad.append(BadRow(str(path), number, reason, json.dumps(row)))
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return _Part(str(path), records, numbers, bad, path)


def _read_parquet(path: Path) -> _Part:
    import pyarrow.parquet as pq
    from datasets import Dataset

    with _open(path) as file:
        table = pq.read_table(io.BytesIO(file.read()) if path.name.endswith(".gz") else file)
    return _part(str(path), Dataset(table), path)


def _read_folder(path: Path) -> _Part:
    """Documents in ``<label>/*.txt``, with columns ``text``, ``label`` and ``file``. UTF-8, or else Windows-1252."""
    records = []
    for file in sorted(path.glob("*/*.txt")):
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", errors="replace")
        records.append({"text": text, "label": file.parent.name, "file": file.relative_to(path).as_posix()})
    if not records:
        raise ValueError(f"{path}: no documents; a folder is read as <label>/*.txt, one subfolder a label")
    return _part(str(path), records, path)


def _table(columns: Mapping[str, list[Any]], origin: str) -> Any:
    """A Hugging Face dataset from columns."""
    import pyarrow as pa
    from datasets import Dataset

    arrays = {}
    for column, values in columns.items():
        try:
            arrays[column] = pa.array(values)
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(f"{origin}: column {column!r} does not hold one kind of value ({error})") from error
    return Dataset(pa.table(arrays))


def _join(datasets: Sequence[Any]) -> Any:
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets(datasets) if len(datasets) > 1 else datasets[0]
    except ValueError as error:
        raise ValueError(f"the parts of the source do not have the same columns: {error}") from error
