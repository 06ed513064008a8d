"""Cutting a source into experiences."""

from __future__ import annotations

from collections import Counter
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from evertune.streams import (
    Experience,
    ExperienceStream,
    StreamDataModule,
    class_incremental,
    data_incremental,
    domain_incremental,
    time_incremental,
)
from evertune.streams.splits import _stratified_split
from evertune.tasks import Task


def rows_of(counts, **columns):
    return [
        {"text": f"{label} {i}", "label": label, "id": f"{label}{i}", **columns}
        for label, count in counts.items()
        for i in range(count)
    ]


def ids(stream):
    return [row["id"] for experience in stream for data in experience.splits().values() for row in data or ()]


CLASSES = dict.fromkeys("abcdefg", 10)


def test_class_incremental_gives_each_class_to_one_experience():
    stream = class_incremental(rows_of(CLASSES), n_experiences=3)
    assert [len(experience.classes) for experience in stream] == [3, 2, 2]
    assert sorted(stream.classes) == sorted(CLASSES)
    for experience in stream:
        for data, per_class in ((experience.train, 6), (experience.val, 2), (experience.test, 2)):
            assert Counter(data["label"]) == dict.fromkeys(experience.classes, per_class)
    assert len(set(ids(stream))) == len(ids(stream)) == 70


def test_class_order_and_unequal_experiences():
    stream = class_incremental(rows_of(CLASSES), classes_per_experience=[4, 1, 2], class_order=list("gfedcba"))
    assert [experience.name for experience in stream] == ["classes 1-4", "c", "b+a"]
    assert stream.classes == list("gfedcba")


def test_the_seed_decides_order_and_split():
    one, same, other = (class_incremental(rows_of(CLASSES), n_experiences=3, seed=seed) for seed in (1, 1, 2))
    assert one.classes == same.classes and ids(one) == ids(same)
    assert one.classes != other.classes and ids(one) != ids(other)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "say into how many experiences"),
        ({"n_experiences": 8}, "n_experiences must be from 1 to the 7 classes found, got 8"),
        ({"n_experiences": 0}, "n_experiences must be from 1 to the 7 classes found, got 0"),
        ({"classes_per_experience": [3, 3]}, r"add up to the 7 classes found, got \[3, 3\]"),
        ({"classes_per_experience": [8, -1]}, r"must be positive and add up to the 7 classes found, got \[8, -1\]"),
        ({"classes_per_experience": [3, 4], "n_experiences": 3}, "has 2 numbers, but n_experiences is 3"),
        ({"n_experiences": 2, "class_order": ["a", "b"]}, r"class_order must name each class once; it misses \['c'"),
        ({"n_experiences": 2, "class_order": list("abcdefgh")}, r"it names \['h'\], which is not in the data"),
        ({"n_experiences": 2, "class_order": list("abcdefga")}, "it repeats one"),
        ({"n_experiences": 2, "label": None}, "needs the column of the labels"),
        ({"n_experiences": 2, "splits": (0.6, 0.6, 0.2)}, r"splits must be three shares .*got \(0.6, 0.6, 0.2\)"),
        ({"n_experiences": 2, "splits": (0, 0.8, 0.2)}, "train not 0"),
        ({"n_experiences": 2, "on_unseen_label": "keep"}, 'on_unseen_label must be "raise" or "drop", got \'keep\''),
    ],
)
def test_class_incremental_refuses(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        class_incremental(rows_of(CLASSES), **arguments)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="unknown option 'sed'"):
        class_incremental(rows_of(CLASSES), n_experiences=2, sed=1)


def test_class_incremental_refuses_multi_label_rows():
    with pytest.raises(ValueError, match=r"row 1: column 'label': one name is expected, got \['a', 'b'\]"):
        class_incremental([{"text": "x", "label": ["a", "b"]}], n_experiences=1)


def test_domain_incremental():
    rows = rows_of({"a": 10, "b": 20}, domain="mail") + rows_of({"a": 10, "b": 5, "c": 5}, domain="chat")
    stream = domain_incremental(rows)
    assert [(e.name, e.domain, e.classes) for e in stream] == [
        ("mail", "mail", ["a", "b"]),
        ("chat", "chat", ["a", "b", "c"]),
    ]
    assert stream.classes == ["a", "b", "c"]
    for experience in stream:
        assert {row["domain"] for data in experience.splits().values() for row in data} == {experience.domain}
    assert Counter(stream[0].test["label"]) == {"a": 2, "b": 4}
    assert [e.name for e in domain_incremental(rows, domain_order=["chat", "mail"])] == ["chat", "mail"]
    with pytest.raises(ValueError, match=r"domain_order must name each domain once; it misses \['mail'\]"):
        domain_incremental(rows, domain_order=["chat"])


@pytest.mark.parametrize(
    ("period", "names", "second"),
    [
        ("year", ["2023", "2024"], ("2024-01-01", "2024-12-31")),
        ("YE", ["2023", "2024"], ("2024-01-01", "2024-12-31")),
        ("quarter", ["2023-Q4", "2024-Q1"], ("2024-01-01", "2024-03-31")),
        ("M", ["2023-12", "2024-01", "2024-02"], ("2024-01-01", "2024-01-31")),
        ("W", ["2023-W52", "2024-W01", "2024-W09"], ("2024-01-01", "2024-01-07")),
        ("day", ["2023-12-31", "2024-01-01", "2024-02-29"], ("2024-01-01", "2024-01-01")),
    ],
)
def test_time_incremental(period, names, second):
    days = ["2024-02-29", "2023-12-31", "2024-01-01"]
    rows = [row for day in days for row in rows_of({"a": 5}, date=day)]
    stream = time_incremental(rows, period=period)
    assert [experience.name for experience in stream] == names
    assert stream[1].time_range == second
    assert sum(len(data) for e in stream for data in e.splits().values()) == 15


def test_kinds_of_dates():
    values = [date(2024, 5, 1), datetime(2024, 5, 2, 12), "2024-05-03T10:00:00+02:00", " 2024-05-04 "]
    for source in (
        [{"text": "x", "label": "a", "date": value} for value in values],
        pd.DataFrame({"text": "x", "label": "a", "date": pd.to_datetime(["2024-05-01", "2024-05-09"])}),
        datasets.Dataset.from_dict({"text": ["x"], "label": ["a"], "date": [datetime(2024, 5, 1)]}),
    ):
        assert [experience.name for experience in time_incremental(source, period="month")] == ["2024-05"]
    with pytest.raises(ValueError, match=r"period must be one of \['year', .*got 'decade'"):
        time_incremental(rows_of({"a": 3}, date="2024-01-01"), period="decade")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("9999-12-31", "the date 9999-12-31 is in the future"),
        (date(9999, 12, 31), "the date 9999-12-31 is in the future"),
        (datetime.max, "in the future"),
        ("9999-12-31T23:59:59.999999-12:00", "in the future"),
        (20240517, "20240517 is a number, not a date"),
        (1715940000.0, "is a number, not a date"),
        (float("nan"), "no date"),
        (pd.NaT, "no date"),
        (pd.NA, "no date"),
        (None, "no date"),
    ],
)
@pytest.mark.parametrize("period", ["year", "quarter", "month", "week", "day"])
def test_dates_that_cannot_be(wrong, reason, period):
    rows = [{"text": f"{number}", "label": "a", "date": "2024-05-01"} for number in range(9)]
    rows.append({"text": "wrong", "label": "a", "date": wrong})
    with pytest.raises(ValueError, match=reason):
        time_incremental(rows, period=period)
    with pytest.warns(UserWarning, match="skipped 1 bad row"):
        stream = time_incremental(rows, period=period, on_bad_row="skip")
    assert [row.row for row in stream.bad_rows] == [10] and len(stream) == 1


def test_dates_in_the_future_if_asked_for():
    rows = rows_of({"a": 6}, date=f"{date.today().year + 5}-05-01")
    with pytest.raises(ValueError, match=r"in the future.*max_time_jump"):
        time_incremental(rows)
    assert len(time_incremental(rows, max_time_jump="3650d")) == 1
    with pytest.raises(ValueError, match="max_time_jump must be"):
        time_incremental(rows, max_time_jump="soon")


def test_data_incremental_is_stratified():
    stream = data_incremental(rows_of({"a": 60, "b": 30}), n_experiences=3)
    for experience in stream:
        assert [Counter(data["label"]) for data in experience.splits().values()] == [
            {"a": 12, "b": 6},
            {"a": 4, "b": 2},
            {"a": 4, "b": 2},
        ]
    assert len(set(ids(stream))) == len(ids(stream)) == 90


def test_data_incremental_never_tests_before_it_trains():
    rows = [{**row, "part": part} for part, n in (("train", 1), ("test", 3)) for row in rows_of({"a": 9, "rare": n})]
    stream = data_incremental(
        [row for row in rows if row["part"] == "train" or row["label"] == "rare"], n_experiences=3, split_column="part"
    )
    assert "rare" in stream[0].classes


def test_data_incremental_refuses():
    with pytest.raises(ValueError, match="n_experiences must be positive, got 0"):
        data_incremental(rows_of({"a": 3}), n_experiences=0)
    with pytest.raises(ValueError, match="experience 'part 3' has no training examples"):
        data_incremental(rows_of({"a": 2}), n_experiences=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=200), st.integers(0, 5))
def test_split_keeps_its_shares(keys, seed):
    split = _stratified_split(keys, (0.6, 0.2, 0.2), seed)
    for key, count in Counter(keys).items():
        parts = Counter(part for k, part in zip(keys, split, strict=True) if k == key)
        assert parts["train"] >= 1
        for part in ("val", "test"):
            assert abs(parts[part] - 0.2 * count) < 1.5
    for part in ("val", "test"):
        assert abs(split.count(part) - 0.2 * len(keys)) <= 0.2 * len(set(keys)) + 1


def test_many_small_classes_share_the_test_set():
    split = _stratified_split([name for name in range(100) for _ in range(2)], (0.6, 0.2, 0.2), 0)
    assert Counter(split) == {"train": 120, "val": 40, "test": 40}


def test_a_label_never_seen_is_named():
    rows = [{**row, "part": "train"} for row in rows_of({"a": 3, "b": 3})]
    rows += [{**row, "part": "val"} for row in rows_of({"a": 1, "ghost": 2})]
    with pytest.raises(ValueError, match=r"label 'ghost' is in val, but in no train"):
        class_incremental(rows, n_experiences=2, split_column="part")
    with pytest.raises(ValueError, match=r"experience 'part 1': label 'ghost' is in val, but was in no train"):
        data_incremental(rows, n_experiences=1, split_column="part")
    for stream in (
        class_incremental(rows, n_experiences=2, split_column="part", on_unseen_label="drop"),
        data_incremental(rows, n_experiences=1, split_column="part", on_unseen_label="drop"),
    ):
        assert sorted(stream.classes) == ["a", "b"]
        assert sum(len(experience.val or ()) for experience in stream) == 1


def test_a_label_learnt_earlier_may_be_tested_later():
    first = Experience("one", rows_of({"a": 2, "b": 2}))
    second = Experience("two", rows_of({"a": 2}), test=rows_of({"b": 1}))
    assert len(ExperienceStream([first, second], label="label")) == 2
    with pytest.raises(ValueError, match=r"experience 'two': label 'b' is in test"):
        ExperienceStream([second, first], label="label")
    assert len(ExperienceStream([second], label="label", known_classes=["b"])) == 1


def test_experience_refuses():
    with pytest.raises(ValueError, match="experience 'monday' has no training examples"):
        Experience("monday", [])
    with pytest.raises(ValueError, match=r"names these classes twice: \['a'\]"):
        Experience("monday", [1], classes=["a", "b", "a"])
    with pytest.raises(ValueError, match="must be a map-style dataset with a length, got generator"):
        Experience("monday", (i for i in range(3)))


def test_stream_refuses():
    with pytest.raises(ValueError, match="at least one experience"):
        ExperienceStream([])
    with pytest.raises(ValueError, match=r"these appear twice: \['x'\]"):
        ExperienceStream([Experience("x", [1]), Experience("x", [2])])


def test_slices_and_joint():
    stream = class_incremental(rows_of(CLASSES), n_experiences=3)
    assert [e.name for e in stream[1:]] == [stream[1].name, stream[2].name]
    assert stream[1:].known_classes == stream[0].classes
    assert stream[-1] is stream[2]
    joint = stream.joint()
    assert (joint.name, joint.classes) == ("joint", stream.classes)
    assert [len(data) for data in joint.splits().values()] == [42, 14, 14]
    assert sorted(joint.train["id"]) == sorted(row["id"] for e in stream for row in e.train)


def test_streams_of_anything():
    parts = [TensorDataset(torch.arange(n), torch.arange(n)) for n in (3, 4)]
    stream = ExperienceStream([Experience(f"day {i}", part) for i, part in enumerate(parts)], text=None)
    assert len(stream.joint().train) == 7
    assert stream.joint().val is None


class Prices(Task):
    """A regression: its labels are numbers, which name no class."""

    def check_label(self, value: Any) -> float:
        return float(value)


def test_the_task_says_what_a_label_is_and_which_classes_it_names() -> None:
    rows = [{"text": f"a house of {i} rooms", "label": i / 2} for i in range(20)]
    stream = data_incremental(rows, n_experiences=2, task=Prices("gaussian"))
    assert stream.classes == []
    assert [type(row["label"]) for row in stream[0].train] == [float] * 6
    sizes = [[len(data or ()) for data in experience.splits().values()] for experience in stream]
    assert sizes == [[6, 2, 2]] * 2, "one stratum: the shares hold for all rows together"
    assert stream[1:].task is stream.task


def test_a_stream_is_read_with_the_task_of_the_module_unless_it_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "houses.jsonl").write_text("".join(f'{{"text": "{i} rooms", "label": {i / 2}}}\n' for i in range(20)))
    settings: dict[str, Any] = {"source": str(tmp_path / "houses.jsonl"), "scenario": "data_incremental"}
    own, modules = Prices("gaussian"), Prices("gaussian")
    module = SimpleNamespace(task=modules)
    assert StreamDataModule(**settings, n_experiences=2).stream_for(module).task is modules
    data = StreamDataModule(**settings, n_experiences=2, task=own)
    stream = data.stream_for(module)
    assert stream.task is own
    assert data.datamodule(stream[0], task=modules).task is own


def test_without_a_task_a_number_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the label 0\.5 is not a name"):
        data_incremental([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], n_experiences=1)


@pytest.mark.parametrize("name", ["a+b", "classes 1-4"])
def test_a_class_may_have_the_name_that_other_classes_give_an_experience(name: str) -> None:
    others = ["a", "b"] if name == "a+b" else ["a", "b", "c", "d"]
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate([*others, name] * 10)]
    stream = class_incremental(rows, classes_per_experience=[len(others), 1], class_order=[*others, name])
    assert [experience.name for experience in stream] == [name, f"{name} (2)"]
