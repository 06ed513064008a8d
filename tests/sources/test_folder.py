"""The folder source: new files, appended lines, and everything that can be wrong with them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
import threading
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.sources.base import Incoming, Offset, SourceError
from evertune.sources.folder import FolderSource


def read_all(folder: Any, limits: Any = 1000, offset: Offset | None = None, **options: Any) -> list[Incoming]:
    """All records, by a new source for each chunk and offsets that went through JSON, as after a kill."""
    records, _ = read_on(folder, limits, offset, **options)
    return records


def read_on(
    folder: Any, limits: Any = 1000, offset: Offset | None = None, **options: Any
) -> tuple[list[Incoming], Offset]:
    records: list[Incoming] = []
    while True:
        limit = limits() if callable(limits) else limits
        chunk = FolderSource(str(folder), **options).read(offset, limit)
        assert len(chunk.records) <= limit
        offset = json.loads(json.dumps(chunk.offset))
        if not chunk.records:
            return records, offset
        records += chunk.records


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def texts(records: list[Incoming]) -> list[str]:
    return [record.value["text"] if record.value else f"! {record.error}" for record in records]


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def table(n: int, /, **columns: list[Any]) -> pa.Table:
    return pa.table({"text": [f"row {i}" for i in range(n)], **columns})


def test_reads_every_format_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "2026-01.jsonl").write_text(lines({"text": "a", "n": 1}))
    (tmp_path / "2026-02.csv").write_text("text,label\nb,\n")
    with gzip.open(tmp_path / "2026-03.csv.gz", "wt") as file:
        file.write("text\nc")
    with gzip.open(tmp_path / "2026-04.ndjson.gz", "wt") as file:
        file.write(lines({"text": "d"}))
    (tmp_path / "2026-05").mkdir()
    pq.write_table(pa.table({"text": ["e"]}), tmp_path / "2026-05" / "x.parquet")
    for name in (".h.jsonl", "_h.jsonl", "h.jsonl.tmp", "h.jsonl.part", "h.jsonl~", "empty.jsonl"):
        (tmp_path / name).write_text("" if name == "empty.jsonl" else lines({"text": "no"}))
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "h.jsonl").write_text(lines({"text": "no"}))

    records, offset = read_on(tmp_path)
    assert records == [
        Incoming("2026-01.jsonl:1", {"text": "a", "n": 1}),
        Incoming("2026-02.csv:2", {"text": "b", "label": None}),
        Incoming("2026-03.csv.gz:2", {"text": "c"}),
        Incoming("2026-04.ndjson.gz:1", {"text": "d"}),
        Incoming("2026-05/x.parquet:1", {"text": "e"}),
    ]
    assert list(offset["files"]) == [record.origin.rsplit(":", 1)[0] for record in records]
    assert len(json.dumps(offset)) < 80 * len(records)
    assert [read.origin for read in read_all(tmp_path, 2)] == [read.origin for read in records]


def test_pattern_and_exclude_choose_the_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "sub/a.jsonl", "sub/deep/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\nx\n" if name.endswith("csv") else lines({"text": name}))

    def origins(**options: Any) -> list[str]:
        return [record.origin for record in read_all(tmp_path, **options)]

    assert origins(pattern="*.jsonl") == ["a.jsonl:1"]
    assert origins(pattern="sub/*.jsonl") == ["sub/a.jsonl:1"]
    assert origins(pattern="**/*.jsonl", exclude=["sub/*.jsonl"]) == ["a.jsonl:1", "sub/deep/a.jsonl:1"]


def test_files_of_other_kinds_are_ignored_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    source = FolderSource(str(tmp_path))
    with pytest.warns(UserWarning, match=r"ignored 1 files.*README.md"):
        assert source.read(None, 10).records == []
    source.read(None, 10)  # once is enough


def test_links_to_files_are_read_and_loops_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in" / ".data").mkdir(parents=True)
    (tmp_path / "in" / ".data" / "a.jsonl").write_text(lines({"text": "a"}))
    (tmp_path / "in" / "link.jsonl").symlink_to(".data/a.jsonl")
    (tmp_path / "in" / "broken.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "pipe.jsonl")
    records, offset = read_on(tmp_path / "in")
    assert texts(records) == ["a"]
    with (tmp_path / "in" / ".data" / "a.jsonl").open("a") as file:
        file.write(lines({"text": "b"}))
    (tmp_path / "other").symlink_to(tmp_path / "in")  # the folder itself may be a link
    assert texts(read_all(tmp_path / "other", offset=offset)) == ["b"]


@pytest.mark.parametrize("kind", ["a file", "a chain", "up and down", "a folder", "a file beside it", "nothing"])
def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path, kind: str) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    (tmp_path / "in2").mkdir()
    for secret in (tmp_path / "secret.jsonl", tmp_path / "in2" / "secret.jsonl"):
        secret.write_text(lines({"text": "secret"}))
    (inbox / "a.jsonl").write_text(lines({"text": "a"}))
    target = {
        "a file": tmp_path / "secret.jsonl",
        "up and down": Path("../in/../secret.jsonl"),
        "a folder": tmp_path / "in2",
        "a file beside it": Path("../in2/secret.jsonl"),
        "nothing": tmp_path / "gone.jsonl",
    }
    if kind == "a chain":
        (inbox / ".hop").symlink_to(tmp_path / "secret.jsonl")
        target["a chain"] = Path(".hop")
    (inbox / "link.jsonl").symlink_to(target[kind])
    source = FolderSource(str(inbox), settle=0)
    with pytest.warns(UserWarning, match=r"ignored 1 links that lead out of the folder, such as 'link.jsonl'"):
        chunk = source.read(None, 10)
    assert texts(chunk.records) == ["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source.read(chunk.offset, 10).records == []  # once is enough


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_chunks_of_any_size_equal_one_reading(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    for part in range(3):
        rows = [{"text": f"{part}, {i}\n{'é' * rng.randrange(2000)}", "id": f"{part}.{i}"} for i in range(700)]
        path = tmp_path / f"{part}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
            continue
        text = io.StringIO()
        if "csv" in suffix:
            writer = csv.DictWriter(text, ["text", "id"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            text.write(lines(*rows))
        data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    whole = read_all(tmp_path, 10_000)
    assert [record.value["id"] for record in whole if record.value] == [
        f"{p}.{i}" for p in range(3) for i in range(700)
    ]
    assert len({record.origin for record in whole}) == 2100
    assert read_all(tmp_path, lambda: rng.randrange(1, 400)) == whole

    source, offset, kept = FolderSource(str(tmp_path)), None, []  # one source that goes on where it was
    while (chunk := source.read(offset, 333)).records:
        assert source.read(offset, 333) == chunk  # and goes back
        kept += chunk.records
        offset = chunk.offset
    source.close()
    assert kept == whole


def test_appended_lines_and_a_last_line_without_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    offset = None
    seen: list[Incoming] = []
    for piece in ('{"text": "a"}', "\n", '{"text":', ' "b"}', ' \r\n\n{"text": "c', '"}\n{"text": "d"}', "x\n", '{"te'):
        with path.open("a") as file:
            file.write(piece)
        new, offset = read_on(tmp_path, offset=offset)
        seen += new
    assert [(record.origin, record.value and record.value["text"]) for record in seen] == [
        ("a.jsonl:1", "a"),
        ("a.jsonl:2", "b"),
        ("a.jsonl:4", "c"),
        ("a.jsonl:5", "d"),
        ("a.jsonl:5", None),
    ]
    assert seen[-1].raw == "x"
    assert "continues a line" in str(seen[-1].error)
    age(path, 1000)
    assert read_on(tmp_path, offset=offset)[0] == []  # half a JSON line waits for ever


json_lines = st.one_of(
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.text(max_size=9), st.none()), max_size=3).map(
        lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    ),
    st.sampled_from([b"", b"  ", b"[1]", b"oops", b"\xff\xfe", b"\x00", b'{"a": NaN}', b"\xef\xbb\xbf{}"]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(json_lines, max_size=8), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.randoms())
def test_appending_in_pieces_loses_and_doubles_nothing(
    content: list[bytes], newline: bytes, ended: bool, rng: random.Random
) -> None:
    data = newline.join(content) + (newline if ended else b"")
    with TemporaryDirectory() as folder:
        append_in_pieces(Path(folder), "a.jsonl", data, rng)


cells = st.text(alphabet='ab",\né \t', max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(cells, min_size=1, max_size=3), max_size=8), st.randoms())
def test_appending_csv_rows_in_pieces_loses_and_doubles_nothing(rows: list[list[str]], rng: random.Random) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["one", "two"], *rows])
    with TemporaryDirectory() as folder:
        append_in_pieces(Path(folder), "a.csv", text.getvalue().encode(), rng)


def append_in_pieces(folder: Path, name: str, data: bytes, rng: random.Random) -> None:
    seen: list[Incoming] = []
    offset = None
    position = 0
    while position < len(data):
        piece = data[position : position + rng.randrange(1, 12)]
        position += len(piece)
        with (folder / name).open("ab") as file:
            file.write(piece)
        chunk = FolderSource(str(folder), settle=3600).read(offset, rng.randrange(1, 4))
        seen += chunk.records
        offset = chunk.offset
    rest, _ = read_on(folder, offset=offset, settle=3600)
    assert seen + rest == read_all(folder, settle=3600)


def test_lines_appended_by_another_thread_arrive_once(tmp_path: Path) -> None:
    n = 3000

    def write() -> None:
        rng = random.Random(0)
        data = lines(*({"text": str(i)} for i in range(n))).encode()
        with (tmp_path / "a.jsonl").open("ab", buffering=0) as file:
            while data:
                cut = rng.randrange(1, 300)
                file.write(data[:cut])
                data = data[cut:]

    writer = threading.Thread(target=write)
    writer.start()
    source, offset, seen = FolderSource(str(tmp_path)), None, []
    more = True
    while more:
        more = writer.is_alive()  # asked before reading
        chunk = source.read(offset, 500)
        offset = chunk.offset
        seen += texts(list(chunk.records))
        more = more or bool(chunk.records)
    assert seen == [str(i) for i in range(n)]


def test_csv_quoting_bom_line_ends_and_the_number_of_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbftext,label\r\n"two\r\nlines, ""quoted""",x\r\n\r\ntoo,many,fields\r\nfew\r\n'
        b'\xff,y\r\n"a"b,y\r\na"b,z\r\nnul\0,y\r\na\rb,c\r\n,\r\n'
    )
    records = read_all(tmp_path)
    assert [(record.origin, record.value or record.error) for record in records] == [
        ("a.csv:2", {"text": 'two\r\nlines, "quoted"', "label": "x"}),
        ("a.csv:5", "has 3 fields, the header has 2"),
        ("a.csv:6", "has 1 fields, the header has 2"),
        ("a.csv:7", "not valid UTF-8"),
        ("a.csv:8", "',' expected after '\"'"),
        ("a.csv:9", {"text": 'a"b', "label": "z"}),
        ("a.csv:10", {"text": "nul\0", "label": "y"}),
        ("a.csv:11", "a carriage return outside quotes"),
        ("a.csv:12", {"text": None, "label": None}),
    ]
    assert records[1].raw == "too,many,fields"
    assert records[3].raw == "\\xff,y"


def test_csv_waits_for_an_unfinished_row_until_the_file_has_rested(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\nb,y")
    records, offset = read_on(tmp_path)
    assert texts(records) == ["a"]
    age(path, 10)
    records, offset = read_on(tmp_path, offset=offset)
    assert texts(records) == ["b"]
    with path.open("a") as file:
        file.write("es\nc,z\n")  # the row was not finished after all: nothing is silently cut
    records, offset = read_on(tmp_path, offset=offset)
    assert texts(records) == ["! continues a line that was complete when it was read", "c"]
    assert records[0].origin == "a.csv:3"
    with path.open("a") as file:
        file.write('"never closed,z\nd,z\n')
    assert read_on(tmp_path, offset=offset)[0] == []
    age(path, 10)
    records, _ = read_on(tmp_path, offset=offset)
    assert texts(records) == ["! a quote is opened and never closed", "d"]


@pytest.mark.parametrize("ahead", [3600.0, 1e9, 1e12])
def test_a_file_from_the_future_does_not_wait_for_ever(tmp_path: Path, ahead: float) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\na\nb")
    age(path, -ahead)
    assert texts(read_all(tmp_path)) == ["a", "b"]


def test_a_csv_header_that_cannot_be_used_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,text\na,b\nc,d\n")
    records, offset = read_on(tmp_path)
    assert [(record.origin, record.error) for record in records] == [
        ("a.csv", "two columns have the same name: text, text")
    ]
    assert read_on(tmp_path, offset=offset)[0] == []
    path.write_text("text,label\na,b\nc,d\n")
    assert texts(read_on(tmp_path, offset=offset)[0]) == ["a", "c"]


def test_what_json_cannot_hold_is_bad(tmp_path: Path) -> None:
    bad = {
        '{"text": NaN}': "NaN is not a JSON number",
        '{"text": -Infinity}': "-Infinity is not a JSON number",
        '{"text": 1e999}': "is too large",
        f'{{"text": {"9" * 5000}}}': "limit",
        '{"text": "\\ud800"}': "half a surrogate pair",
        f'{{"text": {"[" * 150}{"]" * 150}}}': "nested deeper than 100",
        "[" * 100_000: "nested deeper than 100",
        "[1]": "not a JSON object but a list",
        '{"text": 1': "not valid JSON",
        '{"text": "\0"}': "not valid JSON",
        "\0" * 50: "not valid JSON",
    }
    good = ['{"text": "\\ud83d\\ude00 \\u0000", "n": [[[1e3]]]}', json.dumps({"text": "[" * 500})]
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in [*bad, *good]))
    records = read_all(tmp_path)
    for record, (line, reason) in zip(records, bad.items(), strict=False):
        assert reason in str(record.error)
        assert record.raw == line
    assert [record.value for record in records[len(bad) :]] == [json.loads(line) for line in good]


def fuzzed_line(rng: random.Random, token: str) -> bytes:
    value = {
        "text": token,
        "n": rng.choice([1, -0.5, 10**30, None, True, [{}], "\u2028 😀 \udcff \x00"[: rng.randrange(9)]]),
    }
    line = json.dumps(value).encode()
    cut = rng.randrange(len(line))
    kinds: list[bytes] = [
        line,
        json.dumps({"text": token + "né日本"}, ensure_ascii=False).encode(),
        line[:cut],
        line[:cut] + rng.randbytes(3) + line[cut:],
        token.encode() + rng.randbytes(rng.randrange(200)),
        b"{" * rng.randrange(2000) + token.encode(),
        b'{"a":' * rng.choice([50, 150, 5000]) + b"1",
        token.encode() + b"\0" * rng.randrange(100),
        f'{{"text": {rng.choice(["NaN", "1e400", "-", "0x1", "1_0", "9" * 6000])}}}'.encode(),
        rng.choice([b"", b" ", b"\r", b"null", b"\xff\xfe{\0}\0", b"\xed\xa0\x80", b"\xef\xbb\xbf{}", b'"', b"{}"]),
    ]
    return rng.choice(kinds).replace(b"\n", b"")


def test_fuzzed_json_lines_are_values_or_errors_and_all_counted(tmp_path: Path) -> None:
    rng = random.Random(1)
    content = [fuzzed_line(rng, f"token{i}") for i in range(10_000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(content) + b"\n")
    records = read_all(tmp_path, 4000, max_line_bytes=20_000)
    assert [record.origin for record in records] == [
        f"a.jsonl:{number}" for number, line in enumerate(content, start=1) if line.strip()
    ]
    assert all((record.value is None) == bool(record.error) for record in records)
    assert 2000 < sum(record.value is not None for record in records) < 5000
    for record in records:
        json.dumps(record.value, allow_nan=False, ensure_ascii=False).encode()
        record.raw.encode()
    assert read_all(tmp_path, lambda: rng.randrange(1, 2000), max_line_bytes=20_000) == records


def test_fuzzed_csv_rows_are_values_or_errors_and_all_counted(tmp_path: Path) -> None:
    rng = random.Random(2)
    junk = ['"', '""', ",", "a", "\r", "\0", " ", "é", "\ufeff", "'", "\\", "x" * 50]
    content = [
        (
            rng.choice(["", "", '"'])
            + f"token{i}."
            + "".join(rng.choices(junk, k=rng.randrange(6)))
            + rng.choice(["", ",b", '",b'])
        ).encode()
        + rng.choice([b"", b"", b"", b"\xff", b"\r"])
        for i in range(10_000)
    ]
    path = tmp_path / "a.csv"
    path.write_bytes(b"one,two\n" + b"\n".join(content))
    age(path, 10)
    records, offset = read_on(tmp_path, 4000, max_line_bytes=500)
    assert offset["files"]["a.csv"][0] == path.stat().st_size
    assert all((record.value is None) == bool(record.error) for record in records)
    assert 1000 < sum(record.value is not None for record in records) < 9000
    found = "\n".join(json.dumps(record.value) if record.value else record.raw for record in records)
    tokens = sorted(map(int, re.findall(r"token(\d+)\.", found)))
    assert tokens == list(range(10_000))  # every line is in one record
    assert read_all(tmp_path, lambda: rng.randrange(1, 2000), max_line_bytes=500) == records


def test_a_huge_line_is_kept_by_reference_in_bounded_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    records = read_all(tmp_path, max_line_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    length = (64 << 20) + len('{"text": ""}\n')
    reason = f"! a line of {length} bytes is longer than max_line_bytes=1048576"
    assert texts(records) == ["a", reason, "b"]
    assert records[1].raw.startswith('{"text": "xxx')
    assert records[1].raw.endswith(f"(bytes 14 to {14 + length} of a.jsonl)")
    assert len(records[1].raw) < 300
    assert peak < 12 << 20


def test_parquet_values_become_what_json_has(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    values = {
        "text": "é",
        "n": 2**40,
        "share": 0.5,
        "yes": True,
        "nothing": None,
        "day": date(2026, 1, 2),
        "moment": moment,
        "price": Decimal("1.50"),
        "took": timedelta(seconds=1.5),
        "raw": b"bytes",
        "list": [1.0, None],
        "map": {"when": [date(2026, 1, 2)]},
    }
    nano = pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))
    pq.write_table(pa.Table.from_pylist([values]).append_column("nano", nano), tmp_path / "a.parquet")
    (record,) = read_all(tmp_path)
    assert record.value == values | {
        "day": "2026-01-02",
        "moment": "2026-01-02T03:04:05.000678+00:00",
        "price": "1.50",
        "took": 1.5,
        "raw": "bytes",
        "map": {"when": ["2026-01-02"]},
        "nano": "2023-11-14T22:13:20.000000001",
    }
    json.dumps(record.value, allow_nan=False)


def test_parquet_rows_that_cannot_be_json_are_bad(tmp_path: Path) -> None:
    year_40000 = pa.array([0, 1_200_000_000_000, 0, 0], pa.timestamp("s"))
    share, raw = [1.0, 1.0, float("nan"), 1.0], [b"a", b"a", b"a", b"\xff"]
    pq.write_table(table(4, when=year_40000, share=share, raw=raw), tmp_path / "a.parquet", coerce_timestamps="ms")
    records = read_all(tmp_path)
    assert [record.origin for record in records] == [f"a.parquet:{i}" for i in (1, 2, 3, 4)]
    assert records[0].value == {"text": "row 0", "when": "1970-01-01T00:00:00", "share": 1.0, "raw": "a"}
    assert [record.value for record in records[1:]] == [None] * 3
    assert all("has no JSON equivalent" in str(record.error) for record in records[1:])
    assert "nan is not a JSON number" in str(records[2].error)


SHARED = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), pa.array(["x" * 20_000_000]))
BOMBS = {
    "a text that all rows share": SHARED,
    "in a struct": pa.StructArray.from_arrays([SHARED], ["inner"]),
    "in lists": pa.ListArray.from_arrays(pa.array(range(1025), pa.int32()), SHARED),
    "bytes": SHARED.cast(pa.dictionary(pa.int32(), pa.binary())),
    "in a map": pa.MapArray.from_arrays(pa.array(range(1025), pa.int32()), pa.array(["k"] * 1024), SHARED),
}


@pytest.mark.parametrize("column", BOMBS.values(), ids=BOMBS)
def test_a_parquet_file_that_unpacks_to_gigabytes_is_one_bad_record(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    (tmp_path / "b.jsonl").write_text(lines({"text": "next"}))
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    before = pa.default_memory_pool().max_memory()
    bad, good = read_all(tmp_path, settle=0)
    assert bad.value is None and "unpacks to more than 1.1 GB, over 200 times its size" in str(bad.error)
    assert good.value == {"text": "next"}
    assert pa.default_memory_pool().max_memory() - before < 1 << 28


@pytest.mark.parametrize(
    "values",
    [["a", None, "é"], [1, 2, None], [1.5, None, 2.0], [b"a", b"b", None], [Decimal("1.5"), None, Decimal("2")]],
)
def test_categories_are_read_as_their_values(tmp_path: Path, values: list[Any]) -> None:
    table = pa.table({"value": pa.array(values).dictionary_encode(), "plain": pa.array(values)})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [record.value for record in read_all(tmp_path)]
    assert len(rows) == 3 and all(row is not None and row["value"] == row["plain"] for row in rows)


def test_a_text_that_all_rows_share_is_read_within_the_bounds_of_a_chunk(tmp_path: Path) -> None:
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"text": shared}), tmp_path / "a.parquet", compression="zstd")
    source, offset, sizes = FolderSource(str(tmp_path), settle=0), None, []
    while (chunk := source.read(offset, 1_000)).records:
        offset = chunk.offset
        sizes.append(len(chunk.records))
        assert all(record.value == {"text": "x" * 1_000_000} for record in chunk.records)
    assert sum(sizes) == 300 and max(sizes) < 80


LONG = "x" * 5_000
LONG_VALUES = {
    "a text": pa.array(["short", LONG, "short"]),
    "bytes": pa.array([b"short", LONG.encode(), b"short"]),
    "a shared text": pa.array(["short", LONG, "short"]).dictionary_encode(),
    "a struct": pa.array([{"inner": "short"}, {"inner": LONG}, {"inner": "short"}]),
    "a list": pa.array([["short"], ["short"] * 1_000, []]),
    "a list of fixed size": pa.array([["a", "b"], [LONG, "b"], None], pa.list_(pa.string(), 2)),
    "a map": pa.array([[("k", "short")], [("k", LONG)], []], pa.map_(pa.string(), pa.string())),
    "the keys of a map": pa.array([[("k", 1)], [(LONG, 1)], []], pa.map_(pa.string(), pa.int64())),
    "a list of numbers": pa.array([[1.0], [1.0] * 600, [2.0]]),
}


@pytest.mark.parametrize("column", LONG_VALUES.values(), ids=LONG_VALUES)
def test_a_parquet_row_that_is_too_long_is_a_bad_record(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"], "more": column}), tmp_path / "a.parquet")
    first, bad, last = read_all(tmp_path, settle=0, max_line_bytes=4_000)
    assert [record.value and record.value["text"] for record in (first, bad, last)] == ["a", None, "c"]
    assert re.fullmatch(r"a row of \d{4,5} bytes is longer than max_line_bytes=4000", str(bad.error))
    assert (bad.origin, bad.raw) == ("a.parquet:2", "(row 2 of a.parquet)")


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl.gz"])
def test_a_truncated_file_is_one_bad_record_until_it_is_replaced(tmp_path: Path, name: str) -> None:
    data = io.BytesIO()
    if name.endswith("parquet"):
        pq.write_table(table(5000), data)
    else:
        data.write(gzip.compress(lines(*({"text": f"row {i}"} for i in range(5000))).encode()))
    whole = data.getvalue()
    path = tmp_path / name
    (tmp_path / "c.jsonl").write_text(lines({"text": "next"}))

    path.write_bytes(whole[: len(whole) // 2])
    records, offset = read_on(tmp_path)
    assert texts(records) == ["next"]  # it may still be being copied
    age(path, 10)
    records, offset = read_on(tmp_path, offset=offset)
    assert [(record.origin, record.value) for record in records] == [(name, None)]
    assert "corrupt or truncated" in str(records[0].error)
    assert f"{len(whole) // 2} bytes, fingerprint" in records[0].raw
    age(path, 20)
    records, offset = read_on(tmp_path, offset=offset)  # touched, but the same
    assert records == []

    path.write_bytes(whole)
    records, _ = read_on(tmp_path, 700, offset=offset)
    assert texts(records) == [f"row {i}" for i in range(5000)]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
def test_damaged_bytes_never_raise(tmp_path: Path, name: str) -> None:
    rng = random.Random(3)
    data = io.BytesIO()
    if name.endswith("parquet"):
        pq.write_table(table(300, n=list(range(300))), data)
    else:
        data.write(gzip.compress(lines(*({"text": f"row {i}"} for i in range(300))).encode()))
    for _ in range(60):
        damaged = bytearray(data.getvalue())
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / name).write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(1, len(damaged))])])
        records = read_all(tmp_path, settle=0)
        assert len(records) in (1, 300)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "csv.gz"])
def test_a_file_rewritten_after_it_was_read_is_refused(tmp_path: Path, suffix: str) -> None:
    def write(*values: str) -> None:
        path = tmp_path / f"a.{suffix}"
        path.unlink(missing_ok=True)
        if suffix == "parquet":
            pq.write_table(pa.table({"text": list(values)}), path)
        elif suffix == "jsonl":
            path.write_text(lines(*({"text": value} for value in values)))
        else:
            data = "".join(f"{value}\n" for value in ("text", *values)).encode()
            path.write_bytes(gzip.compress(data, mtime=0) if suffix.endswith("gz") else data)

    write("a", "b", "c")
    _, offset = read_on(tmp_path)
    half = FolderSource(str(tmp_path)).read(None, 2).offset
    write("a", "b", "c")  # another inode and time, the same contents
    assert read_all(tmp_path, offset=offset) == []
    assert texts(read_all(tmp_path, offset=half)) == ["c"]
    for values in (("a", "x", "c"), ("a", "x", "c", "d")):
        write(*values)
        for known in (offset, half):
            with pytest.raises(SourceError, match=rf"a\.{suffix} was rewritten.*new name.*exclude"):
                read_on(tmp_path, offset=known)
            assert read_all(tmp_path, offset=known, exclude=[f"a.{suffix}"]) == []


def test_a_truncated_or_deleted_file_is_refused_unless_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (tmp_path / "b.jsonl").write_text(lines({"text": "d"}))
    path.write_text(lines({"text": "a"}, {"text": "b"}, {"text": "c"}))
    _, offset = read_on(tmp_path)
    half = FolderSource(str(tmp_path)).read(None, 2).offset
    for size in (20, 0):
        os.truncate(path, size)
        with pytest.raises(
            SourceError, match=rf"a\.jsonl was truncated: 42 bytes of it have been read, but it has only {size} left"
        ):
            read_on(tmp_path, offset=offset)
    path.unlink()
    assert read_all(tmp_path, offset=offset) == []
    with pytest.raises(SourceError, match=r"a\.jsonl was deleted before it was read to its end: restore it"):
        read_on(tmp_path, offset=half)
    assert texts(read_all(tmp_path, offset=half, exclude=["a.*"])) == ["d"]
    path.write_text(lines({"text": "a"}, {"text": "b"}, {"text": "c"}))  # put back
    assert texts(read_all(tmp_path, offset=half)) == ["c", "d"]
    assert read_all(tmp_path, offset=offset) == []


class MeddlingFileSystem(LocalFileSystem):
    """The local files, to which something happens between two readings of a block."""

    protocol = "meddling"
    meddle: ClassVar[list[Any]] = []

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        if self.meddle:
            self.meddle.pop(0)()
        return data

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).removeprefix("meddling://")))


fsspec.register_implementation("meddling", MeddlingFileSystem, clobber=True)


@pytest.fixture
def meddle() -> Any:
    MeddlingFileSystem.meddle = []
    yield MeddlingFileSystem.meddle
    MeddlingFileSystem.meddle = []


def big(letter: str, n: int = 3000) -> list[dict[str, str]]:
    return [{"text": f"{letter}{i}", "padding": "x" * 1000} for i in range(n)]  # three blocks


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("after", [1, 2])
def test_a_file_replaced_while_it_is_read_gives_no_mixture(
    tmp_path: Path, meddle: list[Any], in_place: bool, after: int
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path, draft = folder / "a.jsonl", tmp_path / "draft"
    old, new = lines(*big("old")), lines(*big("new"))

    def replace() -> None:
        if in_place:
            path.write_text(new)
        else:
            draft.write_text(new)
            draft.replace(path)

    path.write_text(old)
    source = FolderSource(f"meddling://{folder}")
    meddle += [lambda: None] * (after - 1) + [replace]
    records = source.read(None, 5000).records  # nothing of it was taken: the new one is read
    assert texts(list(records)) == [f"new{i}" for i in range(3000)]

    path.write_text(old)
    first = source.read(None, 1000)
    meddle += [lambda: None] * after + [replace]
    with pytest.raises(SourceError, match="was rewritten"):
        source.read(first.offset, 5000)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl.gz"])
def test_a_sealed_file_replaced_while_it_is_read_gives_no_mixture(
    tmp_path: Path, meddle: list[Any], suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    rng = random.Random(4)

    def write(letter: str) -> None:
        rows = [{"text": f"{letter}{i}", "noise": rng.randbytes(500).hex()} for i in range(2500)]
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
        else:
            path.write_bytes(gzip.compress(lines(*rows).encode(), 1))

    source = FolderSource(f"meddling://{tmp_path}")
    for after in range(1, 6):
        write("old")
        meddle[:] = [lambda: None] * after + [lambda: write("new")]
        chunk = source.read(None, 5000)
        if not chunk.records:  # it was in pieces, and was left to settle
            chunk = source.read(chunk.offset, 5000)
        letter = "old" if meddle else "new"  # it may have been read before the moment came
        assert texts(list(chunk.records)) == [f"{letter}{i}" for i in range(2500)]
    write("old")
    first = source.read(None, 1500)
    write("new")
    with pytest.raises(SourceError, match="was rewritten"):
        source.read(first.offset, 1500)


def test_a_file_that_never_rests_or_goes_while_it_is_read(tmp_path: Path, meddle: list[Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*big("a", 1500)))
    source = FolderSource(f"meddling://{tmp_path}")
    meddle += [lambda i=i: path.write_text(lines(*big(f"b{i}", 1500))) for i in range(30)]
    with pytest.raises(SourceError, match="keeps changing while it is read"):
        source.read(None, 5000)
    meddle[:] = [path.unlink]
    assert source.read(None, 5000).records == []
    path.write_text(lines(*big("a")))
    first = source.read(None, 10)
    meddle[:] = [path.unlink]
    with pytest.raises(SourceError, match="deleted before it was read to its end"):
        source.read(first.offset, 5000)


def test_lines_appended_while_it_is_read_come_with_the_next_chunk(tmp_path: Path, meddle: list[Any]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "a\n" * 3000)

    def append() -> None:
        with path.open("a") as file:
            file.write("b\nhalf")

    meddle += [append] * 3
    source, offset, seen = FolderSource(f"meddling://{tmp_path}"), None, []
    while (chunk := source.read(offset, 1100)).records:
        offset = chunk.offset
        seen += texts(list(chunk.records))
    assert seen == ["a"] * 3000 + ["b", "halfb", "halfb"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl.gz", "jsonl"])
def test_a_store_that_fails_now_and_then_loses_and_doubles_nothing(
    tmp_path: Path, meddle: list[Any], suffix: str
) -> None:
    rng = random.Random(5)
    rows = [{"text": str(i), "noise": rng.randbytes(500).hex()} for i in range(4000)]
    data = lines(*rows).encode()
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=500)
    else:
        (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(data, 1) if suffix == "jsonl.gz" else data)

    def fail() -> None:
        raise ConnectionError("now and then")

    meddle += [fail if rng.random() < 0.2 else lambda: None for _ in range(200)]
    source, offset, seen, failures = FolderSource(f"meddling://{tmp_path}"), None, [], 0
    while True:
        try:
            chunk = source.read(offset, 300)
        except SourceError:
            failures += 1
            continue
        if not chunk.records:
            break
        seen += texts(list(chunk.records))
        offset = chunk.offset
    assert seen == [str(i) for i in range(4000)]
    assert failures > 1


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_long_documents_make_short_chunks(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evertune.sources.folder._CHUNK_BYTES", 3 << 20)
    monkeypatch.setattr("evertune.sources.formats._BATCH_BYTES", 1 << 18)
    text = "x" * (1 << 16)
    for part in range(2):
        path = tmp_path / f"{part}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"text": [f"{i}{text}" for i in range(50)]}), path)
        elif suffix == "csv":
            path.write_text("text\n" + f"{text}\n" * 50)
        else:
            path.write_text(lines({"text": text}) * 50)
    source, offset, sizes = FolderSource(str(tmp_path)), None, []
    while (chunk := source.read(offset, 1000)).records:
        offset = chunk.offset
        sizes.append(len(chunk.records))
    assert sum(sizes) == 100
    assert max(sizes) <= 70


class FailingFileSystem(MeddlingFileSystem):
    protocol = "failing"
    failing: ClassVar[set[str]] = set()

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        if "ls" in self.failing:
            raise TimeoutError("the store does not answer")
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        if "cat" in self.failing:
            raise RuntimeError("access denied")
        return super().cat_file(path, start=start, end=end, **kwargs)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).removeprefix("failing://")))


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_a_store_that_cannot_be_reached_is_an_error_never_a_bad_record(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything\n")
    age(tmp_path / name, 100)
    source = FolderSource(f"failing://{tmp_path}")
    try:
        FailingFileSystem.failing.add("cat")
        with pytest.raises(SourceError, match=rf"cannot read .*{name}: access denied"):
            source.read(None, 10)
        FailingFileSystem.failing.add("ls")
        with pytest.raises(SourceError, match="the store does not answer; nothing is lost"):
            source.read(None, 10)
    finally:
        FailingFileSystem.failing.clear()
    assert len(source.read(None, 10).records) == 1


def test_a_folder_that_is_gone_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    source = FolderSource(str(folder))
    with pytest.raises(SourceError, match=f"the folder {folder} does not exist: mount or create it"):
        source.read(None, 10)
    folder.mkdir()
    assert source.read(None, 10).records == []
    (folder / "a.jsonl").write_text(lines({"text": "a"}))
    with pytest.raises(SourceError, match="is a file: pass its folder as path"):
        FolderSource(str(folder / "a.jsonl")).read(None, 10)


@contextmanager
def unprivileged() -> Iterator[None]:
    """The rights of another user, where the tests run as root, who may read everything."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(mine)


def test_a_subfolder_that_cannot_be_read_is_an_error() -> None:
    with TemporaryDirectory() as folder:  # unlike tmp_path, in reach of any user
        Path(folder).chmod(0o755)
        (Path(folder) / "sub").mkdir(mode=0o000)
        with unprivileged(), pytest.raises(SourceError, match="Permission denied"):
            FolderSource(folder).read(None, 10)


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_text("{}")
    with pytest.raises(SourceError, match="rename it"):
        FolderSource(str(tmp_path)).read(None, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere://x"}, "cannot use 'nowhere://x'"),
        ({"exclude": "*.csv"}, "exclude must be a list"),
        ({"settle": -1}, "settle must be seconds, 0 or more, got -1"),
        ({"settle": float("nan")}, "got nan"),
        ({"max_line_bytes": 0}, "max_line_bytes must be positive, got 0"),
        ({"delimiter": "\n"}, "delimiter must be one character"),
        ({"pattern": "a**b"}, r"\*\*"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FolderSource(**{"path": "in", **options})


def test_a_limit_or_an_offset_that_cannot_be_is_refused(tmp_path: Path) -> None:
    source = FolderSource(str(tmp_path))
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        source.read(None, 0)
    with pytest.raises(ValueError, match="not the offset of a folder"):
        source.read({"partitions": {"0": 17}}, 10)


def test_a_semicolon_may_be_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label\nlost, stolen;card\n")
    assert read_all(tmp_path, delimiter=";") == [Incoming("a.csv:2", {"text": "lost, stolen", "label": "card"})]


def test_a_remote_store(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    url = f"memory:/{root}/in"
    with pytest.raises(SourceError, match="does not exist"):
        FolderSource(url).read(None, 10)
    check_store(store, f"{root}/in", url)


def test_an_s3_bucket() -> None:
    pytest.importorskip("s3fs", reason='s3fs is not installed (pip install "evertune[s3]")')
    server = pytest.importorskip(
        "moto.server", reason='moto is not installed (pip install "moto[server]")'
    ).ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
        store = fsspec.filesystem("s3", **options)
        store.mkdir("bucket")
        assert FolderSource("s3://bucket/in", storage_options=options).read(None, 10).records == []
        with pytest.raises(SourceError, match="the folder s3://nobucket/in does not exist"):
            FolderSource("s3://nobucket/in", storage_options=options).read(None, 10)
        check_store(store, "bucket/in", "s3://bucket/in", storage_options=options)
    finally:
        server.stop()
    with pytest.raises(SourceError, match="cannot read"):
        FolderSource("s3://bucket/in", storage_options=options).read(None, 10)


def check_store(store: Any, root: str, url: str, **options: Any) -> None:
    """New objects, longer and rewritten ones, ranges of a large one, a truncated one, and deletion."""
    parquet = io.BytesIO()
    pq.write_table(table(3000), parquet)
    store.pipe(f"{root}/a.jsonl", lines(*big("a")).encode())
    store.pipe(f"{root}/sub/b.parquet", parquet.getvalue())
    store.pipe(f"{root}/sub/c.csv.gz", gzip.compress(b"text\nc\n"))
    expected = [*(f"a{i}" for i in range(3000)), *(f"row {i}" for i in range(3000)), "c"]
    records, offset = read_on(url, 700, **options)
    assert texts(records) == expected
    assert texts(read_all(url, 10_000, **options)) == expected
    half = FolderSource(url, **options).read(None, 1500).offset

    store.pipe(f"{root}/a.jsonl", lines(*big("a", 3001)).encode())  # a bucket's way to append
    store.pipe(f"{root}/sub/d.parquet", parquet.getvalue()[:1000])
    records, offset = read_on(url, 700, offset=offset, settle=0, **options)
    assert [record.origin for record in records] == ["a.jsonl:3001", "sub/d.parquet"]
    assert records[1].value is None

    store.pipe(f"{root}/a.jsonl", lines(*big("b", 3001)).encode())
    for known in (offset, half):
        with pytest.raises(SourceError, match=r"a\.jsonl was rewritten"):
            read_on(url, offset=known, **options)
    store.rm(f"{root}/a.jsonl")
    assert read_all(url, offset=offset, **options) == []
    with pytest.raises(SourceError, match=r"a\.jsonl was deleted"):
        read_on(url, offset=half, **options)


@pytest.mark.parametrize("content", [b'{"text": "a"}\r{"text": "b"}\r', b'{"text": "a', b"\xff"])
def test_an_end_that_has_not_come_for_days_is_a_bad_line(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + content)
    source = FolderSource(str(tmp_path))
    chunk = source.read(None, 10)
    assert [record.value for record in chunk.records] == [{"text": "first"}]
    os.utime(path, (1, 1))
    later = source.read(chunk.offset, 10)
    assert [(record.origin, record.value) for record in later.records] == [("a.jsonl:2", None)]
    assert source.read(later.offset, 10).records == []
