"""The request log as a source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evertune.sources import LabelJoin, RecordSchema, RequestLogSource
from evertune.sources.labels import Half

REQUEST = {"kind": "request", "id": "a", "time": "2026-01-01T00:00:00+00:00", "text": "the bank", "label": "sport"}
REQUEST |= {"confidence": 0.7, "version": 3, "role": "production"}
FEEDBACK = {"kind": "feedback", "id": "a", "time": "2026-01-02T00:00:00+00:00", "label": "business"}
SHADOW = {"kind": "shadow", "id": "a", "label": "law", "version": 4}
PLAIN = {"id": "b", "text": "goal", "label": "sport"}


def write(folder: Path, *lines: Any) -> RequestLogSource:
    with (folder / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return RequestLogSource(str(folder))


def test_requests_and_feedback_become_records_that_a_label_join_joins(tmp_path: Path) -> None:
    source = write(tmp_path, REQUEST, SHADOW, FEEDBACK, PLAIN)
    request, feedback, plain = [record.value for record in source.read(None, 100).records]
    assert request == {
        **{"id": "a", "time": REQUEST["time"], "text": "the bank"},
        **{"predicted": "sport", "confidence": 0.7, "version": 3},
    }
    assert feedback == {"id": "a", "time": FEEDBACK["time"], "label": "business"}
    assert plain == PLAIN
    assert request is not None
    schema = RecordSchema(id="id", time="time")
    join = LabelJoin(time="time")
    assert join.add(Half("a", "1", schema.check_half(request), True)) is None
    pair = join.add(Half("a", "2", schema.check_half(feedback), False))
    assert pair is not None
    assert schema.check(pair[1].value | pair[0].value)["label"] == "business"


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_every_record_is_read_once_whatever_the_limit(tmp_path: Path, limit: int) -> None:
    source = write(tmp_path, SHADOW, SHADOW, REQUEST, *[SHADOW] * 5, FEEDBACK, PLAIN, SHADOW)
    offset, origins = None, []
    for _ in range(20):
        chunk = source.read(offset, limit)
        origins += [record.origin for record in chunk.records]
        assert len(chunk.records) <= limit
        if chunk.offset == offset:
            break
        offset = chunk.offset
    assert origins == ["log.jsonl:3", "log.jsonl:9", "log.jsonl:10"]
    write(tmp_path, FEEDBACK)
    assert [record.origin for record in source.read(offset, limit).records] == ["log.jsonl:12"]


def test_pairs_of_texts_and_other_names(tmp_path: Path) -> None:
    write(tmp_path, {**REQUEST, "text": ["a", "b"]}, REQUEST, FEEDBACK, {"kind": "other"})
    source = RequestLogSource(str(tmp_path), ["premise", "hypothesis"], "gold", "key", "at")
    pair, single, feedback, other = source.read(None, 100).records
    assert pair.value is not None and (pair.value["premise"], pair.value["hypothesis"]) == ("a", "b")
    assert single.value is None and single.error == (
        "the number of texts of the request is 1, but the source names premise, hypothesis"
    )
    assert feedback.value == {"key": "a", "at": FEEDBACK["time"], "gold": "business"}
    assert other.error == "not a line of a request log: its kind is 'other'"


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be different fields"):
        RequestLogSource(str(tmp_path), text="label")
