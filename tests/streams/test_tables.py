"""Reading a source: every format, the bad rows, the corrupt files."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from evertune.sources.folder import FolderSource
from evertune.sources.values import label_value, text_value
from evertune.streams import data_incremental, time_incremental
from evertune.streams.tables import name_value
from evertune.tasks.base import Task

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2], "n": i} for i in range(10)]


def texts_of(stream):
    return sorted(row["text"] for row in stream.joint().train)


def everything(source, **options):
    return data_incremental(source, n_experiences=1, splits=(1, 0, 0), **options)


def write_jsonl(path, lines):
    data = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_csv(path, rows=ROWS):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def write_folder(path):
    for row in ROWS:
        (path / row["label"]).mkdir(parents=True, exist_ok=True)
        (path / row["label"] / f"{row['n']}.txt").write_text(row["text"])
    return path


SOURCES = {
    "dataset": lambda path: datasets.Dataset.from_list(ROWS),
    "frame": lambda path: pd.DataFrame(ROWS, index=range(5, 15)),
    "list": lambda path: ROWS,
    "jsonl": lambda path: write_jsonl(path / "rows.jsonl", ROWS),
    "jsonl.gz": lambda path: str(write_jsonl(path / "rows.jsonl.gz", ROWS)),
    "csv": lambda path: write_csv(path / "rows.csv"),
    "csv.gz": lambda path: write_csv(path / "rows.csv.gz"),
    "parquet": lambda path: write_parquet(path / "rows.parquet"),
    "parquet.gz": lambda path: write_parquet(path / "rows.parquet.gz"),
    "folder": lambda path: write_folder(path / "documents"),
    "paths": lambda path: [
        write_jsonl(path / "one.jsonl", ROWS[:5]),
        write_jsonl(path / "two.jsonl", [{**row, "extra": "x"} for row in ROWS[5:]]),
    ],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_examples(kind, tmp_path):
    stream = everything(SOURCES[kind](tmp_path))
    assert texts_of(stream) == sorted(row["text"] for row in ROWS)
    assert {row["text"]: row["label"] for row in stream[0].train} == {row["text"]: row["label"] for row in ROWS}
    assert stream.bad_rows == []
    assert not list(tmp_path.rglob("*.bad.jsonl"))


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("train", "dev", "test")])
@pytest.mark.parametrize("kind", ["dict of datasets", "dict of paths", "column"])
def test_given_splits_are_kept(kind, names, tmp_path):
    parts = dict(zip(names, (ROWS[:6], ROWS[6:8], ROWS[8:]), strict=True))
    options = {}
    if kind == "dict of datasets":
        source = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    elif kind == "dict of paths":
        source = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in parts.items()}
    else:
        source = [{**row, "part": name} for name, rows in parts.items() for row in rows]
        options["split_column"] = "part"
    experience = data_incremental(source, n_experiences=1, **options)[0]
    found = [[row["n"] for row in data] for data in (experience.train, experience.val, experience.test)]
    assert found == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9]]


def test_a_lone_train_split_is_split():
    experience = data_incremental({"train": ROWS}, n_experiences=1)[0]
    assert [len(data) for data in experience.splits().values()] == [6, 2, 2]


def test_an_unknown_split_of_a_dataset_is_ignored_by_name():
    source = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "unsupervised": ROWS})
    with pytest.warns(UserWarning, match="ignored the split 'unsupervised'"):
        assert len(everything(source)[0].train) == 10


def test_hub_name(monkeypatch):
    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        if name == "absent":
            raise ConnectionError("no network")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(everything("someone/reviews:english")[0].train) == 10
    assert len(everything("reviews")[0].train) == 10
    assert asked == [("someone/reviews", "english"), ("reviews", None)]
    with pytest.raises(ValueError, match=r"'absent' is neither a file or folder here nor a dataset .*no network"):
        everything("absent")


TORN = {
    "a quote that another row closes": (b'text,label\n"bad start,a\nfine row,b\nanother" row,b\nlast,a\n', 3, [1]),
    "a quote that nothing closes": (b'text,label\nfirst,b\n"bad start,a\nfine row,b\nlast,a\n', 3, [2]),
    "text after a quoted field": (b'text,label\n"first" one,a\nlast,a\nx,b\n', 2, [1]),
    "a row that is not UTF-8": (b"text,label\ngr\xfc\xdfe,a\nlast,a\n", 1, [1]),
    "a carriage return": (b"text,label\nfir\rst,a\nlast,a\n", 1, [1]),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", TORN)
def test_a_torn_csv_row_costs_no_other_row(damage, packed, tmp_path):
    content, n_good, bad = TORN[damage]
    path = tmp_path / ("ROWS.CSV.GZ" if packed else "rows.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.warns(UserWarning, match=f"skipped {len(bad)} bad"):
        stream = everything(path, on_bad_row="skip")
    assert ([row.row for row in stream.bad_rows], len(stream.joint().train)) == (bad, n_good)
    live = FolderSource(str(tmp_path), settle=0, exclude=["*.bad.jsonl"]).read(None, 100).records
    assert [record.error for record in live if record.error] == [row.reason for row in stream.bad_rows]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("text,label,größe\n".encode("latin-1"), "the header cannot be read: not valid UTF-8; save the file as UTF-8"),
        (b"text,label,text\n", "two columns have the same name: text, label, text"),
    ],
)
def test_a_csv_header_that_cannot_be_used_is_named(header, reason, tmp_path):
    (tmp_path / "rows.csv").write_bytes(header + b"x,a,1\n")
    with pytest.raises(ValueError, match=rf"rows\.csv: {reason}"):
        everything(tmp_path / "rows.csv", on_bad_row="skip")


def test_two_columns_of_one_name_in_tables(tmp_path):
    twice = pd.DataFrame([["x", "a", "b"]], columns=["text", "label", "label"])
    with pytest.raises(ValueError, match="DataFrame: two columns have the same name: text, label, label"):
        everything(twice)
    pq.write_table(pa.table([["x"], ["a"], ["b"]], names=["text", "label", "label"]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet: two columns have the same name"):
        everything(tmp_path / "rows.parquet")


ODD_LINES = {
    "deep": "[" * 200_000,
    "deep in a field": '{"text": "x", "label": "a", "by": ' + "[" * 150 + "]" * 150 + "}",
    "a number of 6,000 digits": '{"text": "x", "label": "a", "n": ' + "9" * 6000 + "}",
    "a lone surrogate": '{"text": "\\ud83d", "label": "a"}',
    "a lone surrogate in the label": '{"text": "x", "label": "\\ud83d"}',
    "bytes": b"\xff\xfe",
}


@pytest.mark.parametrize("line", ODD_LINES)
def test_one_odd_line_is_one_bad_row(line, tmp_path):
    odd = ODD_LINES[line] if isinstance(ODD_LINES[line], bytes) else ODD_LINES[line].encode()
    good = b'{"text": "x", "label": "a"}'
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, odd, good]))
    with pytest.warns(UserWarning, match="skipped 1 bad row"):
        stream = everything(tmp_path / "rows.jsonl", on_bad_row="skip")
    assert ([row.row for row in stream.bad_rows], len(stream[0].train)) == ([2], 2)


@pytest.mark.parametrize("error", [RecursionError, OverflowError, TypeError, KeyError, ZeroDivisionError])
def test_whatever_a_check_raises_costs_one_row(error):
    class Own(Task):
        def check_label(self, value):
            if value == "b":
                raise error("cannot")
            return value

    with pytest.warns(UserWarning, match="skipped 5 bad rows"):
        stream = everything(ROWS, task=Own(), on_bad_row="skip")
    assert error.__name__ in stream.bad_rows[0].reason


def test_memory_that_is_short_is_not_a_bad_row():
    class Own(Task):
        def check_label(self, value):
            raise MemoryError

    with pytest.raises(MemoryError):
        everything(ROWS, task=Own(), on_bad_row="skip")


OTHER_COLUMNS = {  # name: values of a column that nobody asked for, and what they are kept as
    "whole numbers and fractions": ([1, 1.5], [1.0, 1.5]),
    "numbers and texts": ([1, "s"], ["1", "s"]),
    "truth values and numbers": ([True, 3], ["true", "3"]),
    "beyond 64 bits": ([1, 10**30], ["1", str(10**30)]),
    "beyond all printing": ([1, 10**5000], ["1", "<int>"]),
    "beyond floats": ([1, 10**400], ["1", str(10**400)]),
    "a lone surrogate": (["a", "\ud83d"], ["a", "\\ud83d"]),
    "a lone surrogate in an object": ([{"a": "\ud83d"}, None], ['{"a": "\\ud83d"}', None]),
    "objects and lists": ([{"a": 1}, [1]], ['{"a": 1}', "[1]"]),
    "objects with other keys": ([{"a": 1}, {"b": "x"}], [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
    "none and numbers": ([None, 3], [None, 3]),
    "lists": ([["a"], [1]], ['["a"]', "[1]"]),
}


FORMS = ["one file", "two files", "list", "frame", "datasets"]
NOT_WRITTEN = {  # what the format, not evertune, refuses
    "beyond all printing": ("one file", "two files", "datasets"),
    "beyond 64 bits": ("datasets",),
    "beyond floats": ("datasets",),
    "a lone surrogate": ("datasets",),
    "a lone surrogate in an object": ("datasets",),
}


@pytest.mark.filterwarnings("ignore:.*is kept as text")
@pytest.mark.parametrize(
    ("values", "form"),
    [(values, form) for values in OTHER_COLUMNS for form in FORMS if form not in NOT_WRITTEN.get(values, ())],
)
def test_a_column_that_nobody_asked_for_stops_nothing(values, form, tmp_path):
    values, kept = OTHER_COLUMNS[values]
    rows = [{"text": f"text {i}", "label": "a", "z": value} for i, value in enumerate(values)]
    if form == "one file":
        source = write_jsonl(tmp_path / "rows.jsonl", rows)
    elif form == "two files":
        source = [write_jsonl(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]
    elif form == "frame":
        source = pd.DataFrame(rows, dtype=object)
    elif form == "datasets":
        source = {name: datasets.Dataset.from_list([row]) for name, row in zip(["train", "val"], rows, strict=True)}
    else:
        source = rows
    stream = everything(source)
    found = [row for part in stream[0].splits().values() for row in part or ()]
    assert [row["z"] for row in sorted(found, key=lambda row: row["text"])] == kept


def test_a_column_kept_as_text_is_said(tmp_path):
    rows = [{"text": "x", "label": "a", "z": 1}, {"text": "x", "label": "a", "z": "s"}]
    with pytest.warns(UserWarning, match=r"rows\.jsonl: column 'z' is kept as text"):
        everything(write_jsonl(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("kinds", itertools.permutations([pa.string(), pa.large_string(), pa.string_view()], 2))
def test_texts_of_two_arrow_types(kinds, tmp_path):
    for number, kind in enumerate(kinds):
        table = pa.table({"text": pa.array(["x"], kind), "label": pa.array(["a"], kind), "n": pa.array([1])})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    stream = everything([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    assert [row["text"] for row in stream[0].train] == ["x", "x"]


def test_a_cell_that_cannot_be_decoded_is_a_bad_row(tmp_path):
    raw = pa.array([b"x", b"\xff", b"z"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text, "label": ["a"] * 3}), tmp_path / "rows.parquet")
    with pytest.warns(UserWarning, match="skipped 1 bad row"):
        stream = everything(tmp_path / "rows.parquet", on_bad_row="skip")
    assert ([row.row for row in stream.bad_rows], texts_of(stream)) == ([2], ["x", "z"])


LABELS = {
    "numpy bool": (np.bool_(True), "True"),
    "numpy int": (np.int8(3), "3"),
    "numpy float": (np.float32(3.0), "3"),
    "numpy str": (np.str_("a"), "a"),
    "numpy scalar array": (np.array(3), "3"),
    "numpy array": (np.array(["a", "b"]), ["a", "b"]),
    "torch int": (torch.tensor(3), "3"),
    "torch bool": (torch.tensor(True), "True"),
    "torch half": (torch.tensor(3.0, dtype=torch.bfloat16), "3"),
    "torch vector": (torch.tensor([1, 2]), ["1", "2"]),
    "list of scalars": ([np.int64(1), torch.tensor(2), np.bool_(False)], ["1", "2", "False"]),
    "pandas.NA": (pd.NA, None),
    "pandas.NaT": (pd.NaT, None),
    "numpy nan": (np.float32("nan"), None),
    "torch nan": (torch.tensor(float("nan")), None),
    "a list with pandas.NA": (["a", pd.NA], None),
    "numpy fraction": (np.float32(0.5), None),
    "numpy matrix": (np.zeros((2, 2), dtype=int), None),
    "bytes": (b"ab", None),
    "infinity": (float("inf"), None),
    "beyond floats": (10**400, str(10**400)),
    "beyond all printing": (10**5000, None),
    "a date": (np.datetime64("2024-01-01"), None),
    "a lone surrogate": ("\ud800", None),
}


@pytest.mark.parametrize("label", LABELS)
def test_labels_of_other_libraries(label):
    value, name = LABELS[label]
    rows = [{"text": "x", "label": "other"}, {"text": "y", "label": value}]
    for source in (
        rows,
        pd.DataFrame({"text": ["x", "y"], "label": pd.Series([row["label"] for row in rows], dtype=object)}),
    ):
        if name is None:
            with pytest.warns(UserWarning, match="skipped 1 bad row"):
                assert [row.row for row in everything(source, on_bad_row="skip").bad_rows] == [2]
        else:
            assert label_value(value) == name and type(label_value(value)) in (str, list)
            assert everything(rows[1:])[0].train[0]["label"] == name


def test_names_of_lists_of_classes():
    names = datasets.ClassLabel(names=["joy", "anger", "fear"])
    for kind in (datasets.Sequence(names), datasets.List(names), datasets.LargeList(names)):
        features = datasets.Features({"text": datasets.Value("string"), "label": kind})
        source = datasets.Dataset.from_dict(
            {"text": ["a", "b", "c"], "label": [[0, 2], [1], [0, -1]]}, features=features
        )
        with pytest.warns(UserWarning, match="skipped 1 bad row"):
            stream = everything(source, on_bad_row="skip")
        assert sorted(map(tuple, (row["label"] for row in stream[0].train))) == [("anger",), ("joy", "fear")]


def test_numbers_of_labels_become_names():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    source = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    assert [row["label"] for row in everything(source)[0].train] == ["no", "yes"]
    assert everything([{"text": "x", "label": 3}, {"text": "y", "label": "z"}]).classes == ["3", "z"]
    frame = pd.DataFrame({"text": ["x", "y"], "label": [1.0, 2.0]})
    assert everything(frame).classes == ["1", "2"]
    frame = pd.DataFrame({"text": ["x", "y"], "label": [True, False]})
    assert everything(frame).classes == ["True", "False"]
    frame = pd.DataFrame({"text": ["x", "y"], "label": pd.Categorical(["no", "yes"])})
    assert everything(frame).classes == ["no", "yes"]


def test_multi_label_rows_keep_their_lists():
    rows = [{"text": "x", "label": ["a", "b"]}, {"text": "y", "label": ["b"]}, {"text": "z", "label": []}]
    stream = everything(rows)
    assert stream.classes == ["a", "b"]
    assert sorted((row["text"], row["label"]) for row in stream[0].train) == [
        ("x", ["a", "b"]),
        ("y", ["b"]),
        ("z", []),
    ]


@pytest.mark.parametrize(
    ("value", "normaliser", "problem"),
    [
        (None, text_value, "no text"),
        (" \n", text_value, "the text is empty"),
        (7, text_value, "the text is a int, not a string"),
        ("\ud800", text_value, "lone surrogate"),
        (None, label_value, "no label"),
        ("", label_value, "no label"),
        (math.nan, label_value, "no label"),
        (0.37, label_value, "the label 0.37 is not a name"),
        ({"a": 1}, label_value, "is not a name"),
        (["a", None], label_value, "no label"),
        (["a", "b"], name_value, r"one name is expected, got \['a', 'b'\]"),
    ],
)
def test_what_a_column_cannot_hold(value, normaliser, problem):
    with pytest.raises(ValueError, match=problem):
        normaliser(value)


BAD_LINES = [
    {"text": "one", "label": "a"},
    "",  # an empty line is no row, but counts as a line
    '{"text": "two", "label"',
    {"text": "  ", "label": "a"},
    {"text": "three"},
    "[1, 2]",
    {"text": 4, "label": "a"},
    {"text": "five", "label": "b"},
]
BAD_REASONS = {
    3: "not valid JSON",
    4: "column 'text': the text is empty",
    5: "column 'label': no label",
    6: "not a JSON object but a list",
    7: "column 'text': the text is a int",
}


def test_bad_rows_raise_with_file_row_and_reason(tmp_path):
    for row, reason in BAD_REASONS.items():
        path = write_jsonl(tmp_path / f"row{row}.jsonl", [BAD_LINES[0]] * (row - 1) + [BAD_LINES[row - 1]])
        with pytest.raises(ValueError, match=rf"row{row}\.jsonl, row {row}: {reason}.*on_bad_row=\"skip\""):
            everything(path)
    path = write_jsonl(tmp_path / "all.jsonl", BAD_LINES)
    with pytest.raises(ValueError, match=r"all\.jsonl, row 3: not valid JSON .* \(4 more rows are bad\)"):
        everything(path)


def test_skipped_rows_are_counted_and_kept_in_a_side_file(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl.gz", BAD_LINES)
    with pytest.warns(UserWarning, match=r"skipped 5 bad rows of .*they are kept in .*rows\.jsonl\.gz\.bad\.jsonl"):
        stream = everything(path, on_bad_row="skip")
    assert texts_of(stream) == ["five", "one"]
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl.gz.bad.jsonl").read_text().splitlines()]
    assert {row["row"]: row["source"] for row in kept} == dict.fromkeys(BAD_REASONS, str(path))
    for row in kept:
        assert row["reason"].startswith(BAD_REASONS[row["row"]])
    assert {row["raw"] for row in kept} >= {'{"text": "two", "label"', "[1, 2]"}
    assert sorted(bad.row for bad in stream.bad_rows) == sorted(BAD_REASONS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl.gz", "rows.jsonl.gz.bad.jsonl"]


def test_the_side_file_can_be_elsewhere(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", BAD_LINES)
    with pytest.warns(UserWarning, match="skipped 5"):
        everything(path, on_bad_row="skip", bad_rows_file=tmp_path / "bad.jsonl")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 5
    with pytest.raises(ValueError, match=r"cannot keep the skipped rows in .*nowhere.*pass bad_rows_file="):
        everything(path, on_bad_row="skip", bad_rows_file=tmp_path / "nowhere" / "bad.jsonl")


def test_bad_rows_of_a_frame_are_in_the_stream():
    frame = pd.DataFrame({"text": ["x", None, "z"], "label": ["a", "a", math.nan]})
    with pytest.warns(UserWarning, match="skipped 2 bad rows of DataFrame"):
        stream = everything(frame, on_bad_row="skip")
    assert [(bad.row, bad.reason) for bad in stream.bad_rows] == [
        (2, "column 'text': no text"),
        (3, "column 'label': no label"),
    ]


def test_bad_csv_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,label\n"quoted, text",a\nonly text\n\nx,b,c\n\xff\xfe,a\nlast,\nfine,b\n')
    with pytest.raises(ValueError, match=r"rows\.csv, row 2: has 1 fields, the header has 2 \(3 more"):
        everything(path)
    with pytest.warns(UserWarning, match="skipped 4"):
        stream = everything(path, on_bad_row="skip")
    assert texts_of(stream) == ["fine", "quoted, text"]
    assert {bad.row: bad.reason for bad in stream.bad_rows} == {
        2: "has 1 fields, the header has 2",
        3: "has 3 fields, the header has 2",
        4: "not valid UTF-8",
        5: "column 'label': no label",
    }


def test_long_documents_in_csv(tmp_path):
    path = write_csv(tmp_path / "long.csv", [{"text": "long " * 50_000, "label": "a"}])
    assert len(everything(path)[0].train[0]["text"]) == 250_000


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.parquet", "rows.parquet.gz"])
@pytest.mark.parametrize("damage", ["truncated", "not what it says"])
def test_a_corrupt_file_is_named(name, damage, tmp_path):
    path = SOURCES[name.removeprefix("rows.")](tmp_path)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2] if damage == "truncated" else b"rubbish" * 30)
    with pytest.raises(ValueError, match=rf"{name}: corrupt or truncated"):
        everything(path, on_bad_row="skip")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.jsonl"):
        everything(tmp_path / "absent.jsonl")


def test_files_of_another_kind(tmp_path):
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"model\.pkl: cannot read files of this kind; use one of \.jsonl"):
        everything(tmp_path / "model.pkl")
    with pytest.raises(ValueError, match="no documents; a folder is read as <label>"):
        everything(tmp_path)


def test_documents_that_are_not_utf8_are_read_as_windows_1252(tmp_path):
    (tmp_path / "sport").mkdir()
    (tmp_path / "sport" / "1.txt").write_bytes(b"\xa35m for the striker")
    assert everything(tmp_path)[0].train[0]["text"] == "£5m for the striker"


def test_columns_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"list has no column 'intent'; its columns are \['text', 'label', 'n'\]"):
        everything(ROWS, label="intent", on_bad_row="skip")


def test_nothing_usable(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: no usable row"):
        everything(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="got an empty list"):
        everything([])
    with pytest.raises(ValueError, match="got NoneType"):
        everything(None)
    with pytest.raises(ValueError, match=r"has the names of splits .*, got \['text', 'label'\]"):
        everything({"text": ["x"], "label": ["a"]})
    with pytest.raises(ValueError, match='on_bad_row must be "raise" or "skip", got \'ignore\''):
        everything(ROWS, on_bad_row="ignore")


def test_bad_dates_and_splits_are_bad_rows():
    rows = [{"text": "x", "label": "a", "date": "2024-01-01"}, {"text": "x", "label": "a", "date": "yesterday"}]
    with pytest.raises(ValueError, match=r"list, row 2: column 'date': 'yesterday' is not an ISO date"):
        time_incremental(rows)
    rows = [{"text": "x", "label": "a", "part": "train"}, {"text": "x", "label": "a", "part": "exam"}]
    with pytest.raises(ValueError, match=r"row 2: column 'part': the split 'exam' is none of"):
        everything(rows, split_column="part")
