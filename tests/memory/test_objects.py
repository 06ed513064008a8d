"""Objects of common types in the memory: they come back as they were, and nothing that a file names is run."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import subprocess
import sys
import zoneinfo
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from evertune.memory.codec import decode, encode
from evertune.memory.objects import MissingTypeError, put_together


class Point(NamedTuple):
    x: Any
    y: Any


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


@dataclasses.dataclass
class Plain:
    text: Any
    more: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    text: Any


@dataclasses.dataclass
class Counted:
    """What ``__init__`` and ``__post_init__`` did is part of the state; they do not run again."""

    text: str
    made: int = dataclasses.field(init=False)
    runs = 0

    def __post_init__(self) -> None:
        Counted.runs += 1
        self.made = Counted.runs


class Outer:
    @dataclasses.dataclass
    class Inner:
        value: int


@dataclasses.dataclass
class Goodbye:
    text: str = ""

    def __del__(self) -> None:
        pass


DAY = datetime.timedelta(hours=23)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8")),
    st.binary(),
    st.text(st.characters(codec="utf-8", exclude_characters="\0")).map(np.str_),
    st.dates(),
    st.datetimes(),
    st.datetimes(timezones=st.timezones(), allow_imaginary=False),
    st.datetimes(timezones=st.timedeltas(-DAY, DAY).map(datetime.timezone)),
    st.timedeltas(),
    st.sampled_from([Colour.RED, Colour.BLUE, Level.LOW, Access.READ]),
)
keys = st.text(st.characters(codec="utf-8"), max_size=4)
examples = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(collections.OrderedDict),
        st.builds(Point, inner, inner),
        st.builds(Plain, inner, inner),
        st.builds(Slotted, inner),
    ),
    max_leaves=12,
)


def types_in(value: Any) -> Any:
    """The types of a value and all that is in it."""
    if dataclasses.is_dataclass(value):
        return type(value), [types_in(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return type(value), [(key, types_in(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [types_in(item) for item in value]
    return type(value), getattr(value, "tzinfo", None), getattr(value, "fold", None)


@settings(max_examples=60, deadline=None)
@given(examples)
def test_examples_come_back_as_they_were(example: Any) -> None:
    back = decode(encode(example))
    assert back == example
    assert types_in(back) == types_in(example)
    assert encode(back) == encode(example)


def test_the_output_of_a_tokenizer_comes_back() -> None:
    encoding = BatchEncoding({"input_ids": torch.tensor([1, 2]), "text": np.str_("a")})
    back = decode(encode({"inputs": encoding}))["inputs"]
    assert type(back) is BatchEncoding
    assert torch.equal(back["input_ids"], encoding["input_ids"]) and torch.equal(back.input_ids, torch.tensor([1, 2]))
    assert type(back["text"]) is np.str_


def test_numpy_times_and_a_zone_by_name_come_back() -> None:
    moment = np.datetime64("2026-01-31T12:00", "ns")
    assert decode(encode(moment)) == moment and decode(encode(moment)).dtype == moment.dtype
    autumn = datetime.datetime(2026, 10, 25, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1)
    assert decode(encode(autumn)).utcoffset() == autumn.utcoffset() == datetime.timedelta(hours=1)


def test_a_dataclass_comes_back_without_its_init() -> None:
    one = Counted("a")
    before = Counted.runs
    assert decode(encode(one)) == one and Counted.runs == before
    assert decode(encode(Outer.Inner(3))) == Outer.Inner(3)


def local() -> Any:
    @dataclasses.dataclass
    class Local:
        x: int

    return Local(1)


class Sub(Point):
    pass


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (local(), r"local.<locals>.Local"),
        (Sub(1, 2), "Sub"),
        (Goodbye(), "Goodbye"),
        (Access.READ | Access.WRITE, "Access"),
        (datetime.time(1), "datetime.time"),
        ({1, 2}, "builtins.set"),
        (Plain(text=[object()]), "builtins.object"),
    ],
)
def test_other_types_are_refused_by_name(bad: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"cannot store example.*, a .*{name}; replay stores .* in the collate_fn"):
        encode(bad)


# --- safety


@pytest.mark.parametrize(
    ("kind", "module", "name", "rest", "inner"),
    [
        ("dataclass", "this", "Anything", [], {}),  # a module that is not imported yet
        ("dataclass", "subprocess", "Popen", [], {"args": ["true"]}),  # not a dataclass
        ("namedtuple", "os", "system", [], ("true",)),  # not a class
        ("namedtuple", "builtins", "tuple", [], ()),
        ("namedtuple", __name__, "Sub", [], (1, 2)),
        ("namedtuple", __name__, "Plain", [], (1, 2)),  # another kind
        ("namedtuple", __name__, "Point", [], (1, 2, 3)),
        ("dataclass", __name__, "Goodbye", [], {"text": "a"}),
        ("dataclass", __name__, "Slotted", [], {"text": "a", "other": 1}),
        ("dataclass", __name__, "Plain.__init__", [], {}),
        ("enum", __name__, "Colour", ["GREEN"], None),
        ("enum", __name__, "Colour", ["mro"], None),
        ("anything", __name__, "Plain", [], {}),
    ],
)
def test_what_a_file_names_is_not_run(kind: str, module: str, name: str, rest: list[str], inner: Any) -> None:
    modules = set(sys.modules)
    with pytest.raises(MissingTypeError, match=name.replace(".", r"\.")):
        put_together(kind, [module, name, *rest], inner)
    assert set(sys.modules) == modules


def test_a_class_is_only_found_in_modules_that_are_imported(tmp_path: Path) -> None:
    """In another process: the module is there, and reading the example does not import it."""
    source = "import dataclasses\nprint('imported')\n@dataclasses.dataclass\nclass Note:\n    text: str\n"
    (tmp_path / "notes.py").write_text(source)
    write = "import notes, pathlib; from evertune.memory.codec import encode\n"
    write += "pathlib.Path('example').write_bytes(encode(notes.Note('a')))"
    read = "import pathlib; from evertune.memory.codec import decode\n"
    read += "try: decode(pathlib.Path('example').read_bytes())\nexcept ValueError as error: print(error)\n"
    read += "import notes; print(decode(pathlib.Path('example').read_bytes()))"
    root = str(Path(__file__).resolve().parents[2])
    environment = {"PYTHONPATH": f"{tmp_path}:{root}", "OMP_NUM_THREADS": "1"}
    for code in (write, read):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    refused, imported, note = done.stdout.splitlines()
    assert "holds a notes.Note" in refused and "import notes before the memory is read" in refused
    assert (imported, note) == ("imported", "Note(text='a')")
