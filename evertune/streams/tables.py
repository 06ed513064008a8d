"""Reading examples from any source, with bad rows set aside together with their reason.

A source is a Hugging Face ``Dataset`` or ``DatasetDict``, a pandas ``DataFrame``, a list of dicts, the path of a JSONL,
CSV or Parquet file (also ``.gz``), a list of such paths, a dict of paths by split, a folder of ``<label>/*.txt``, or
the name of a dataset on the Hugging Face hub. A path may start with ``package:NAME/`` for data in an installed package.

JSONL and CSV files are read by the reader of the live path, with its checks. Columns that nobody asked for are kept as
they are where Arrow can hold them; a column with several kinds of values, or with values that Arrow cannot hold, is
kept as text, with a warning.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import uuid4
from warnings import warn

from evertune.sources.formats import BadFileError, Blob, ChangedError, Gunzip, TextReader, different_names
from evertune.sources.values import absent, label_value
from evertune.utils.locate import locate

Normaliser = Callable[[Any], Any]
"""Converts a value of a column to the form that the stream uses, or raises ValueError with the reason."""

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
"""Names that a split may have in a source, with its canonical name."""

_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
_MAX_ROW_BYTES = 1 << 26  # a longer line, or an open quote, is a bad row: bounds memory and time


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
    numbers: list[int]
    bad: list[BadRow] = field(default_factory=list)
    path: Path | None = None
    split: str | None = None

    def columns(self) -> list[str]:
        if isinstance(self.rows, list):
            return list(dict.fromkeys(key for row in self.rows for key in row))
        return list(self.rows.column_names)

    def values(self, column: str) -> list[Any]:
        """A column; the numbers of a ``ClassLabel`` become the names they stand for."""
        return [row.get(column) for row in self.rows] if isinstance(self.rows, list) else _values(self.rows, column)

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
    fits: Callable[[Mapping[str, Any]], None] | None = None,
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
        fits: Function that checks the values of a row together, by column, and raises ValueError with the reason.

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
        good, checked = _check(part, columns, fits)
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
    return Rows(
        _join(datasets, ", ".join(part.origin for part in parts)),
        values,
        split if set(split) != {"train"} else None,
        bad_rows,
    )


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


def _check(
    part: _Part, columns: Mapping[str, Normaliser], fits: Callable[[Mapping[str, Any]], None] | None
) -> tuple[list[int], dict[str, list[Any]]]:
    """The positions of the good rows and their normalised values; bad rows are appended to ``part.bad``."""
    present = part.columns()
    missing = [column for column in columns if column not in present]
    if missing and len(part.rows):
        raise ValueError(f"{part.origin} has no column {missing[0]!r}; its columns are {present}")
    raw = {column: [] if missing else part.values(column) for column in columns}
    checked: dict[str, list[Any]] = {column: [] for column in columns}
    good = []
    for position, number in enumerate(part.numbers):
        try:
            row = {column: _normalised(columns[column], column, raw[column][position]) for column in columns}
            if fits is not None:
                fits(row)
        except ValueError as error:
            part.bad.append(BadRow(part.origin, number, str(error), _raw(part.rows, position)))
            continue
        good.append(position)
        for column, value in row.items():
            checked[column].append(value)
    return good, checked


def _normalised(normaliser: Normaliser, column: str, value: Any) -> Any:
    """The value as the stream uses it; whatever is wrong with it is a ValueError, so that it costs one row."""
    try:
        if isinstance(value, Exception):
            raise value
        return normaliser(value)
    except MemoryError:
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"column {column!r}: {kind}{error}") from None


def _raw(rows: Any, position: int) -> str:
    """A row as text, for the side file."""
    try:
        return _as_text(rows[position])
    except MemoryError:
        raise
    except Exception as error:  # a cell that cannot be decoded
        return f"the row cannot be shown ({type(error).__name__}: {error})"


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
        names = [str(name) for name in source.columns]
        with _readable("DataFrame"):
            different_names(names)
        rows = (dict(zip(names, row, strict=True)) for row in source.itertuples(index=False, name=None))
        yield _part("DataFrame", list(rows))
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
    return _Part(origin, rows, list(range(1, len(rows) + 1)), path=path)


def _path_parts(source: str) -> Iterator[_Part]:
    path = Path(locate(source)).expanduser()
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if path.is_dir():
        yield _read_folder(path)
    elif suffix in _SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        with _readable(str(path)), path.open("rb") as file:
            yield _read_parquet(path, file) if suffix == ".parquet" else _read_text(path, file, csv=suffix == ".csv")
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
def _readable(origin: str) -> Iterator[None]:
    """Name the corrupt file in the error, whichever library detects it."""
    import pyarrow as pa

    try:
        yield
    except BadFileError as error:
        raise ValueError(f"{origin}: {error}") from error
    except ChangedError as error:
        raise ValueError(f"{origin}: it was truncated while it was read; read it again") from error
    except pa.ArrowException as error:
        raise ValueError(f"{origin}: corrupt or truncated file ({error})") from error


def _content(path: Path, file: BinaryIO) -> Blob | Gunzip:
    def fetch(start: int, end: int) -> bytes:
        file.seek(start)
        return file.read(end - start)

    blob = Blob(fetch, path.stat().st_size)
    return Gunzip(blob) if path.name.lower().endswith(".gz") else blob


def _read_text(path: Path, file: BinaryIO, csv: bool) -> _Part:
    reader = TextReader(str(path), _content(path, file), 0, 0, _MAX_ROW_BYTES, strict=False)
    if csv:
        reader.read_csv(sys.maxsize, sys.maxsize, ",", final=True)
    else:
        reader.read_jsonl(sys.maxsize, sys.maxsize, final=True)
    part = _Part(str(path), [], [], path=path)
    for place, record in enumerate(reader.records, start=1):
        number = place if csv else int(record.origin.rpartition(":")[2])
        if record.value is None:
            part.bad.append(BadRow(str(path), number, record.error or "it cannot be read", record.raw))
        else:
            part.rows.append(record.value)
            part.numbers.append(number)
    return part


def _read_parquet(path: Path, file: BinaryIO) -> _Part:
    import pyarrow.parquet as pq
    from datasets import Dataset

    content = _content(path, file)
    with pq.ParquetFile(io.BytesIO(content.read()) if isinstance(content, Gunzip) else content) as parquet:
        different_names(parquet.schema_arrow.names)
        return _part(str(path), Dataset(parquet.read()), path)


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

    return Dataset(pa.table({_writable(str(name)): _array(values, name, origin) for name, values in columns.items()}))


def _array(values: Sequence[Any], column: str, origin: str) -> Any:
    """An Arrow array; of text, with a warning, if Arrow has no type for all the values."""
    import pyarrow as pa

    try:
        return pa.array(values, from_pandas=True)
    except MemoryError:
        raise
    except Exception as error:
        warn(
            f"{origin}: column {column!r} is kept as text, since Arrow has no one type for its values ({error})",
            stacklevel=6,
        )
        return pa.array([None if absent(value) else _as_text(value) for value in values], pa.string())


def _as_text(value: Any) -> str:
    """A value as text: a string as it is, anything else as JSON as far as possible."""
    if isinstance(value, str):
        return _writable(value)
    try:
        return json.dumps(value, default=str)
    except MemoryError:
        raise
    except Exception:  # nested too deep, keys that JSON does not have, a number of too many digits
        return f"<{type(value).__name__}>"


def _writable(text: str) -> str:
    """The text with lone surrogates, which no encoding can write, as escapes."""
    return text.encode(errors="backslashreplace").decode()


def _values(dataset: Any, column: str) -> list[Any]:
    """A column of a dataset, with names for the numbers of a ``ClassLabel``; an exception for a value that cannot be
    read."""
    plain, name = dataset.with_format(None), _namer(dataset.features[column])
    try:
        values = list(plain[column][:])
    except MemoryError:
        raise
    except Exception:
        values = [_cell(plain, column, row) for row in range(len(plain))]
    return values if name is None else [value if isinstance(value, Exception) else name(value) for value in values]


def _cell(dataset: Any, column: str, row: int) -> Any:
    try:
        return dataset[row : row + 1][column][0]
    except MemoryError:
        raise
    except Exception as error:
        return error


def _namer(feature: Any) -> Callable[[Any], Any] | None:
    """A function that gives the names of classes for their numbers, also in lists; None without a ``ClassLabel``."""
    if hasattr(feature, "int2str"):
        names = feature.names

        def name(number: int | None) -> Any:
            if number is None or number < 0:  # by convention, -1 is an example without a label
                return None
            return (
                str(names[number]) if number < len(names) else ValueError(f"{number} is none of {len(names)} classes")
            )

        return name
    inner = _namer(feature.feature) if hasattr(feature, "feature") else None
    if inner is None:
        return None

    def listed(numbers: Any) -> Any:
        named = None if numbers is None else [inner(number) for number in numbers]
        return next((part for part in named or () if isinstance(part, Exception)), named)

    return listed


def _join(datasets: Sequence[Any], origin: str) -> Any:
    """The datasets below each other. A column that has other types in some of them gets one that holds all values."""
    from datasets import concatenate_datasets

    if len(datasets) == 1:
        return datasets[0]
    kinds: dict[str, list[Any]] = {}
    for dataset in datasets:
        for column, feature in dataset.features.items():
            kinds.setdefault(column, []).append(feature)
    joined = list(datasets)
    for column in (column for column, features in kinds.items() if any(other != features[0] for other in features)):
        values = [_values(dataset, column) if column in dataset.features else [] for dataset in datasets]
        whole = _table({column: [value for part in values for value in part]}, origin)
        start = 0
        for place, part in enumerate(values):
            if part:
                others = joined[place].remove_columns(column)
                own = whole.select(range(start, start + len(part)))
                joined[place] = concatenate_datasets([others, own], axis=1) if others.column_names else own
                start += len(part)
    return concatenate_datasets(joined)
