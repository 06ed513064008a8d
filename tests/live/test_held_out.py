"""A record that was held out stays held out when it is sent again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evertune.live.outcome import Outcome
from evertune.live.slices import load_slice
from evertune.live.training import remembered
from evertune.registry.registry import Registry
from evertune.sources.base import Row
from evertune.sources.schema import RecordSchema
from tests.helpers.live_worker import feed, lenient_gate, prepare, updater


def held_out(folder: Path, number: int) -> list[Row]:
    registry = Registry(folder / "registry")
    return [row for entry in registry.version(number).slices() for row in load_slice(registry.store, entry)]


@pytest.mark.parametrize("id", ["id", None])
def test_what_was_held_out_stays_held_out_when_it_is_sent_again(tmp_path: Path, id: str | None) -> None:
    prepare(tmp_path)
    schema = RecordSchema(id=id)
    feed(tmp_path, "a", ["business", "sport"], n=60)
    assert updater(tmp_path, schema=schema).run().status == "promoted"
    before = held_out(tmp_path, 1)
    sent = [dict(row["record"]) for row in before]
    if id is not None:
        sent[0]["label"] = "business" if sent[0]["label"] == "sport" else "sport"
    n_changed = 0 if id is None else 1
    (tmp_path / "inbox/again.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sent))
    gate = lenient_gate(min_records=None)
    only = updater(tmp_path, schema=schema, gate=gate).run()
    assert only == Outcome("nothing", "12 records are pending: all were held out before, and stay held out")
    assert "an update was tried on all of them" in updater(tmp_path, schema=schema, gate=gate).run().words
    feed(tmp_path, "z", ["business", "sport"], n=20)
    live = updater(tmp_path, schema=schema, gate=gate)
    outcome = live.run()
    assert outcome.words.endswith("; 12 records that were held out before were sent again, and stay held out")
    found = Registry(tmp_path / "registry").version(2).manifest
    assert found.records == {
        "train": 16, "held_out": 4 + n_changed, "quarantined": 12 - n_changed, "sent_again": 12,
    }  # fmt: skip
    memory = remembered(tmp_path / "registry/versions/2")
    assert memory is not None and memory.settings["seen"] == 48 + 16
    assert not {memory[place]["id"] for place in range(len(memory))} & {row["id"] for row in before}
    assert {row["reason"] for row in live.journal.quarantined()} == {"sent again, and held out already (update-1)"}
