"""The schema: what it lets through, and what it says of the rest."""

import json
import math
import re
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import pytest
from jsonargparse import ArgumentParser
from pydantic import AliasChoices, AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from evertune.sources.schema import FIELD_TYPES, RecordSchema, time_value
from evertune.tasks import SequenceClassificationTask, Task


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    body: str = Field(validation_alias=AliasChoices("body", "text"))
    topic: Literal["billing", "delivery"] = Field(alias="class")
    opened: AwareDatetime | None = None
    tags: list[str] = []
    priority: int = 0

    @field_validator("priority")
    @classmethod
    def _divides(cls, value: int) -> int:
        return 12 // (value + 1)


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    text: str
    label: int
    more: Any = None


def refusal(schema, value):
    with pytest.raises(ValueError) as caught:
        schema.check(value)
    return str(caught.value)


def test_by_default_text_and_label():
    schema = RecordSchema()
    value = {"text": "Charged twice", "label": "billing", "agent": "Ann"}
    assert schema.check(value) == {"text": "Charged twice", "label": "billing"}
    assert value["agent"] == "Ann"
    assert (schema.text, schema.label, schema.id, schema.time) == ("text", "label", None, None)


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        ("billing", "billing"),
        (3, "3"),
        (3.0, "3"),
        (True, "True"),
        (["a", "b", "a"], ["a", "b"]),
        ([1, 2], ["1", "2"]),
        ([], []),
    ],
)
def test_labels_become_names(label, kept):
    assert RecordSchema().check({"text": "x", "label": label})["label"] == kept


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"label": "a"}, "field 'text' is missing"),
        ({"text": "x"}, "field 'label' is missing"),
        ({}, "field 'text' is missing; field 'label' is missing"),
        ({"text": 7, "label": "a"}, "field 'text' must be a text, not a number"),
        ({"text": None, "label": "a"}, "field 'text' must be a text, not null"),
        ({"text": ["x"], "label": "a"}, "field 'text' must be a text, not a list"),
        ({"text": " \n", "label": "a"}, "field 'text': the text is empty"),
        ({"text": "a\ud800", "label": "a"}, "field 'text': it has a lone surrogate, which no encoding can write"),
        (
            {"text": "x" * 101, "label": "a"},
            "field 'text': the text has 101 characters, more than 100 (max_text_length)",
        ),
        ({"text": "x", "label": None}, "field 'label': no label"),
        ({"text": "x", "label": ""}, "field 'label': no label"),
        ({"text": "x", "label": math.nan}, "field 'label': no label"),
        ({"text": "x", "label": 1.5}, "field 'label': the label 1.5 is not a name"),
        ({"text": "x", "label": {"a": 1}}, "field 'label': the label {'a': 1} is not a name"),
        ({"text": "x", "label": ["a", None]}, "field 'label': no label"),
        ({"text": "x", "label": " "}, "field 'label': the label ' ' is not a name"),
        (
            {"text": "x", "label": "x" * 1001},
            "field 'label': the label has 1001 characters, more than the 1000 of a name",
        ),
        ({"text": "x", "label": "a\udfff"}, "field 'label': the label 'a\\udfff' is not a name"),
        ("text", "the record must be an object, not a text"),
        (None, "the record must be an object, not null"),
    ],
)
def test_what_does_not_fit_is_refused_in_plain_words(value, reason):
    assert refusal(RecordSchema(max_text_length=100), value) == reason


def test_long_lists_of_reasons_are_cut():
    schema = RecordSchema(fields={"text": "str", "label": "str", **{f"n{i}": "int" for i in range(5)}})
    words = refusal(schema, {"text": "x", "label": "y"})
    assert words == "field 'n0' is missing; field 'n1' is missing; field 'n2' is missing; and 2 more"


def test_fields_by_name():
    kinds = {name: f"{name} | None" for name in FIELD_TYPES}
    schema = RecordSchema(fields={"text": "str", "label": "str", **kinds})
    absent = schema.check({"text": "x", "label": "a"})
    assert absent == {"text": "x", "label": "a"} | dict.fromkeys(FIELD_TYPES)
    values = {
        "str": "s", "int": "7", "float": "0.5", "bool": "true",
        "date": "2024-05-17", "datetime": "2024-05-17T10:00:00Z",
        "list[str]": ["a"], "list[int]": [1], "list[float]": [0.5],
    }  # fmt: skip
    kept = schema.check({"text": "x", "label": "a", **values})
    assert kept == {"text": "x", "label": "a", **values, "int": 7, "float": 0.5, "bool": True}
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    native = {"date": date(2024, 5, 17), "datetime": datetime(2024, 5, 17, 10, tzinfo=UTC), "float": Decimal("0.5")}
    assert schema.check({"text": "x", "label": "a", **native}) == absent | {
        "date": "2024-05-17", "datetime": "2024-05-17T10:00:00Z", "float": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("int", "seven", "field 'int' must be a whole number, not a text"),
        ("int", 2**70, "field 'int': Input should be less than 9223372036854775808"),
        ("float", math.nan, "field 'float' must be a finite number"),
        ("float", "inf", "field 'float' must be a finite number"),
        ("list[float]", [1.0, math.inf], "field 'list[float].1' must be a finite number"),
        ("bool", "perhaps", "field 'bool' must be true or false, not a text"),
        ("str", "a\ud800", "field 'str': it has a lone surrogate, which no encoding can write"),
        ("list[str]", ["a", "\ud800"], "field 'list[str].1': it has a lone surrogate, which no encoding can write"),
        ("str", 5, "field 'str' must be a text, not a number"),
        ("list[str]", "a", "field 'list[str]' must be a list, not a text"),
        ("datetime", [], "field 'datetime' must be a date and time, not a list"),
    ],
)
def test_fields_of_the_wrong_type(name, value, reason):
    schema = RecordSchema(fields={"text": "str", "label": "str", name: name})
    assert refusal(schema, {"text": "x", "label": "a", name: value}) == reason


def test_any_name_will_do_for_a_field():
    odd = ["copy", "model_config", "_private", "class", "two words", "schema", "text.de", ""]
    schema = RecordSchema(fields={"text": "str", "label": "str", **dict.fromkeys(odd, "int")})
    value = {"text": "x", "label": "a", **{name: place for place, name in enumerate(odd)}}
    assert schema.check(value) == value


def test_a_pair_of_texts():
    schema = RecordSchema(text=["premise", "hypothesis"])
    pair = {"premise": "It rains", "hypothesis": "It is wet", "label": 0}
    assert schema.check(pair) == pair | {"label": "0"}
    assert refusal(schema, {"premise": "It rains", "label": 0}) == "field 'hypothesis' is missing"


def test_one_label_or_a_list():
    one = RecordSchema(fields={"text": "str", "label": "str"})
    assert one.check({"text": "x", "label": 3})["label"] == "3"
    assert refusal(one, {"text": "x", "label": ["a"]}) == "field 'label': one label is expected"
    many = RecordSchema(fields={"text": "str", "label": "list[str]"})
    assert many.check({"text": "x", "label": [1, "b"]})["label"] == ["1", "b"]
    assert refusal(many, {"text": "x", "label": "a"}) == "field 'label': a list of labels is expected"


def test_without_labels():
    assert RecordSchema(label=None).check({"text": "x", "label": "a"}) == {"text": "x"}


def test_closed_classes():
    schema = RecordSchema(closed_classes=["a", "b"])
    assert schema.check({"text": "x", "label": ["b", "a"]})["label"] == ["b", "a"]
    assert (
        refusal(schema, {"text": "x", "label": ["a", "c"]}) == "field 'label': 'c' is none of the closed classes a, b"
    )
    many = RecordSchema(closed_classes=[str(number) for number in range(12)])
    assert refusal(many, {"text": "x", "label": 99}).endswith("0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more")


@pytest.mark.parametrize(
    ("id", "kept"), [("t-1", "t-1"), (17, "17"), (17.0, "17"), (uuid.UUID(int=1), str(uuid.UUID(int=1)))]
)
def test_ids(id, kept):
    assert RecordSchema(id="id").check({"text": "x", "label": "a", "id": id})["id"] == kept


@pytest.mark.parametrize("id", ["", " ", True, 1.5, [1], "a\ud800"])
def test_what_identifies_nothing(id):
    assert "field 'id'" in refusal(RecordSchema(id="id"), {"text": "x", "label": "a", "id": id})


def test_an_id_may_be_optional():
    schema = RecordSchema(fields={"text": "str", "label": "str", "id": "str | None"}, id="id")
    assert schema.check({"text": "x", "label": "a"})["id"] is None


@pytest.mark.parametrize(
    "time",
    [
        "2024-05-17T10:00:00Z",
        "2024-05-17T12:00:00+02:00",
        "2024-05-17 10:00:00+00:00",
        1715940000,
        1715940000.0,
        "1715940000",
        1715940000000,
        datetime(2024, 5, 17, 10, tzinfo=UTC),
    ],
)
def test_times_are_kept_in_utc(time):
    schema = RecordSchema(time="at")
    assert schema.check({"text": "x", "label": "a", "at": time})["at"] == "2024-05-17T10:00:00+00:00"


@pytest.mark.parametrize(
    ("time", "reason"),
    [
        ("2024-05-17T10:00:00", "has no time zone; write 2024-05-17T10:00:00+00:00 for UTC"),
        ("2024-05-17", "has no time zone"),
        (datetime(2024, 5, 17), "has no time zone"),
        ("yesterday", "'yesterday' is not a time"),
        ("0001-01-01T00:00:00Z", "is not of the years 1900 to 2099"),
        ("9999-12-31T23:59:59-23:59", "is not of the years 1900 to 2099"),
        (-1e10, "is not of the years 1900 to 2099"),
        (1e300, "is not a time since 1970"),
        (10**400, "is not a time since 1970"),
        ("nan", "is not a time"),
        (True, "is not a time"),
        ([], "is not a time"),
        (None, "is not a time"),
        (math.nan, "is not a time"),
    ],
)
def test_naive_and_absurd_times(time, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        time_value(time)
    if time is not None and time == time:  # noqa: PLR0124 NaN is None in JSON
        words = refusal(RecordSchema(time="at"), {"text": "x", "label": "a", "at": time})
        assert words.startswith("field 'at': ") and (reason in words or isinstance(time, float))


def test_a_model_of_ones_own():
    schema = RecordSchema(model="tests.sources.test_schema.Ticket", text="body", label="topic", time="opened")
    assert schema.model is Ticket
    value = {"text": "Charged twice", "class": "billing", "opened": "2024-05-17T12:00:00+02:00"}
    assert schema.check(value) == {
        "body": "Charged twice",
        "topic": "billing",
        "opened": "2024-05-17T10:00:00+00:00",
        "tags": [],
        "priority": 0,
    }
    assert RecordSchema(Ticket, text="body", label="topic").check(value | {"opened": None})["opened"] is None
    assert refusal(schema, value | {"agent": "Ann"}) == "field 'agent' is not declared"
    assert refusal(schema, value | {"class": "x"}) == "field 'class': Input should be 'billing' or 'delivery'"
    assert refusal(schema, value | {"priority": -1}).startswith("the record could not be checked (ZeroDivisionError: ")


def test_a_model_that_keeps_what_it_does_not_know():
    schema = RecordSchema(Loose)
    assert schema.check({"text": "x", "label": 3, "agent": "Ann"}) == {
        "text": "x", "label": "3", "more": None, "agent": "Ann",
    }  # fmt: skip
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for bad, words in [
        ({"agent": math.nan}, "field 'agent' must be a finite number"),
        ({"more": {"a": [1, -math.inf]}}, "field 'more.a.1' must be a finite number"),
        ({"more": 2**64}, "field 'more' must be a number of at most 64 bits"),
        ({"more": "a\ud800"}, "field 'more': it has a lone surrogate"),
        ({"\ud800": 1}, "has a lone surrogate"),
        ({"more": object()}, "a value that JSON cannot say"),
        ({"more": deep}, "nested more than 100 levels deep"),
    ]:
        assert words in refusal(schema, {"text": "x", "label": 3} | bad)


def test_halves():
    schema = RecordSchema(id="id", fields={"text": "str", "label": "str", "id": "str", "score": "float"})
    text = {"id": "1", "text": "x", "score": 1.5, "label": None, "agent": "Ann"}
    assert schema.has_text(text) and not schema.has_label(text)
    assert schema.check_half(text) == {"id": "1", "text": "x", "score": 1.5}
    label = {"id": "1", "label": 3}
    assert schema.has_label(label) and not schema.has_text(label)
    assert schema.check_half(label) == label
    assert schema.check_half(text | {"label": math.nan}) == {"id": "1", "text": "x", "score": 1.5}
    for half, reason in [
        ({"id": "1", "text": "", "score": 1}, "field 'text': the text is empty"),
        ({"id": "1", "text": 7, "score": 1}, "field 'text' must be a text, not a number"),
        ({"id": "1", "text": "x"}, "field 'score' is missing"),
        ({"id": "1", "label": 1.5}, "field 'label': the label 1.5 is not a name"),
        ({"id": math.inf, "label": "a"}, "field 'id' must be a finite number"),
    ]:
        with pytest.raises(ValueError, match=re.escape(reason)):
            schema.check_half(half)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text": "body", "fields": {"text": "str", "label": "str"}}, "text='body' is not a field of the records"),
        (
            {"label": "topic", "model": Loose},
            "label='topic' is not a field of the records: they have text, label, more",
        ),
        ({"id": "id", "model": Loose}, "id='id' is not a field"),
        ({"time": "at", "fields": {"text": "str", "label": "str"}}, "time='at' is not a field"),
        ({"model": Loose, "fields": {"text": "str"}}, "not both"),
        ({"model": "tests.sources.test_schema.Nothing"}, "cannot import the model 'tests.sources.test_schema.Nothing'"),
        ({"model": "no.such.module"}, "cannot import"),
        ({"model": "Ticket"}, "cannot import"),
        ({"model": "tests.sources.test_schema.refusal"}, "is not a pydantic BaseModel"),
        ({"fields": {"text": "__import__('os').system('x')", "label": "str"}}, "cannot be of type"),
        (
            {"fields": {"text": "str", "label": "str", "x": "complex"}},
            "cannot be of type 'complex'; use one of str, int",
        ),
        ({"fields": {"text": "str", "label": "str", "x": "str | int"}}, "cannot be of type"),
        (
            {"fields": {"text": "int", "label": "str"}},
            "field 'text', the text, cannot be of type 'int'; use one of str",
        ),
        ({"fields": {"text": "str", "label": "date"}}, "the label, cannot be of type 'date'"),
        ({"text": []}, "one field or a pair"),
        ({"text": ["a", "b", "c"]}, "one field or a pair"),
        ({"text": "x", "label": "x"}, "must be different fields"),
        ({"id": "text"}, "must be different fields"),
        ({"max_text_length": 0}, "max_text_length must be positive, got 0"),
        ({"closed_classes": []}, "closed_classes must be a list of labels"),
        ({"closed_classes": "ab"}, "closed_classes must be a list of labels"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError) as caught:
        RecordSchema(**settings)
    assert words in str(caught.value)


def test_it_can_be_configured_from_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_class_arguments(RecordSchema, "schema")
    config = tmp_path / "live.yaml"
    config.write_text(
        "schema:\n  fields: {text: str, label: str, score: float | None}\n"
        "  closed_classes: [a, b]\n  max_text_length: 50\n"
    )
    schema = parser.instantiate_classes(parser.parse_path(str(config))).schema
    assert schema.check({"text": "x", "label": "a"}) == {"text": "x", "label": "a", "score": None}
    named = parser.parse_object(
        {"schema": {"model": "tests.sources.test_schema.Ticket", "text": "body", "label": "topic"}}
    )
    assert parser.instantiate_classes(named).schema.model is Ticket


def test_annotated_models_work_too():
    class Short(BaseModel):
        text: Annotated[str, Field(max_length=3)]
        label: str

    words = refusal(RecordSchema(Short), {"text": "too long", "label": "a"})
    assert words == "field 'text': String should have at most 3 characters"


@pytest.mark.parametrize(
    ("zone", "utc"),
    [("UTC", "12"), ("Europe/Berlin", "10"), ("+05:30", "06:30"), ("-0300", "15")],
)
def test_the_zone_of_times_without_one(zone, utc):
    schema = RecordSchema(time="at", time_zone=zone)
    value = {"text": "x", "label": "a", "at": "2024-05-17T12:00"}
    assert schema.check(value)["at"].startswith(f"2024-05-17T{utc}")
    assert schema.check(value | {"at": "2024-05-17T12:00+01:00"})["at"] == "2024-05-17T11:00:00+00:00"


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "+25:99", "../etc/passwd", "+1"])
def test_an_unknown_zone_is_refused(zone):
    with pytest.raises(ValueError, match="time_zone must be a name such as 'Europe/Berlin'"):
        RecordSchema(time="at", time_zone=zone)


@pytest.mark.parametrize(
    ("multi_label", "label", "kept"),
    [
        (False, "a", "a"),
        (False, 3, "3"),
        (True, ["a", "b", "a"], ["a", "b"]),
        (True, [], []),
        (True, [1, True], ["1", "True"]),
    ],
)
def test_labels_that_a_classifier_learns(multi_label, label, kept):
    task = SequenceClassificationTask(multi_label)
    schema = RecordSchema().for_task(task)
    assert schema.check({"text": "x", "label": label})["label"] == kept


@pytest.mark.parametrize(
    ("multi_label", "label", "reason"),
    [
        (False, ["sport"], "one label is expected, got the list ['sport']; multi_label=True learns lists"),
        (False, [], "one label is expected, got the list []"),
        (False, ["a", "b"], "one label is expected"),
        (True, "sport", "multi_label=True expects a list of names, got 'sport'; write ['sport']"),
        (True, 3, "multi_label=True expects a list of names, got '3'"),
        (True, ["a", ""], "no label"),
        (True, [["a"]], "is not a name"),
        (True, ["a", None], "no label"),
        (True, [math.nan], "no label"),
        (True, [" "], "the label ' ' is not a name"),
        (False, math.nan, "no label"),
        (False, math.inf, "no label"),
        (False, None, "no label"),
        (False, {"a": 1}, "is not a name"),
        (False, "\t", "is not a name"),
        (False, 0.5, "is not a name"),
    ],
)
def test_labels_that_a_classifier_cannot_learn(multi_label, label, reason):
    task = SequenceClassificationTask(multi_label)
    schema = RecordSchema().for_task(task)
    assert reason in refusal(schema, {"text": "x", "label": label})


class Faulty(Task):
    """A task whose check of labels does what it should not."""

    def __init__(self, does):
        super().__init__()
        self.does = does

    def check_label(self, value):
        return self.does(value)


@pytest.mark.parametrize(
    "does",
    [lambda value: value["missing"], lambda value: float("nan"), lambda value: object(), lambda value: {1: math.inf},
     lambda value: 10**30, lambda value: "a\ud800"],
)  # fmt: skip
def test_a_fault_in_a_tasks_check_costs_one_record(does):
    task = Faulty(does)
    schema = RecordSchema().for_task(task)
    assert "label" in refusal(schema, {"text": "x", "label": "a"})


def test_what_was_kept_can_be_checked_again():
    schema = RecordSchema(model=Ticket, text="body", label="topic", time="opened")
    record = schema.check({"text": "Charged twice", "class": "billing", "opened": "2024-05-17T12:00:00+02:00"})
    assert schema.check_again(record)["topic"] == "billing"
    with pytest.raises(ValueError, match="none of the closed classes delivery"):
        RecordSchema(model=Ticket, text="body", label="topic", closed_classes=["delivery"]).check_again(record)
    plain = RecordSchema(id="id")
    assert plain.check_again(plain.check({"id": 7, "text": "x", "label": 3})) == {"id": "7", "text": "x", "label": "3"}


@pytest.mark.parametrize(
    "other",
    [{"text": "body"}, {"label": "topic"}, {"id": "id"}, {"max_text_length": 9}, {"closed_classes": ["a"]},
     {"time": "t"}, {"fields": {"text": "str", "label": "str"}},
     {"fields": {"text": "str", "label": "str", "x": "int"}}],
)  # fmt: skip
def test_another_schema_has_another_digest(other):
    assert RecordSchema().digest == RecordSchema().digest
    assert RecordSchema(**other).digest != RecordSchema().digest
