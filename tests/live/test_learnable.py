"""Records that pass the schema and cannot be learned: set aside with their reason, and the rest is learned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.learnable import unlearnable
from evertune.live.planning import PlannedUpdate
from evertune.live.slices import hold_out
from evertune.live.update import Updater
from evertune.sources.base import Row
from evertune.sources.schema import RecordSchema
from evertune.tasks.base import Task
from evertune.tasks.sequence_classification import SequenceClassificationTask
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.live_worker import feed, prepare, updater


class Module:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(tiny_bert(folder) or folder)


class Numbers(Task):
    """Its labels pass the check, and some of them make no tensor."""

    def check_label(self, value: Any) -> Any:
        return value

    def collator(self, tokenizer: Any) -> Callable[[list[Any]], Any]:
        pad = super().collator(tokenizer)
        return lambda examples: {**pad(examples), "labels": torch.tensor([float(one["labels"]) for one in examples])}


def rows(labels: list[Any]) -> list[Row]:
    return [
        {"id": str(n), "origin": f"f:{n}", "record": {"text": "the team", "label": one}} for n, one in enumerate(labels)
    ]


def test_only_the_records_that_fail_alone_are_found(tmp_path: Path) -> None:
    module, schema = Module(tmp_path / "bert"), RecordSchema()
    labels: list[Any] = [0.5] * 200
    labels[3], labels[150] = "high", None
    found = unlearnable(rows(labels), Numbers(), module, schema)
    assert [(row["id"], row["kind"]) for row in found] == [("3", "unlearnable"), ("150", "unlearnable")]
    assert found[0]["reason"] == "it cannot be learned: could not convert string to float: 'high'"
    assert found[1]["reason"].startswith("it cannot be learned: TypeError: float() argument must be")
    assert unlearnable(rows([0.5] * 70), Numbers(), module, schema) == []
    assert unlearnable([], Numbers(), module, schema) == []
    with pytest.raises(ValueError, match="none of 70 records can be learned: could not convert"):
        unlearnable(rows(["high"] * 70), Numbers(), module, schema)


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    """A copy of it, over the same inbox."""
    shutil.copytree(first, tmp_path / "live", symlinks=True)
    return tmp_path / "live"


def write(folder: Path, name: str, *records: dict[str, Any]) -> None:
    (folder / f"inbox/{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def ids(live: Updater) -> tuple[list[str], list[str]]:
    """Those in the journal and those in quarantine."""
    journal = live.journal
    return [row["id"] for row in journal.records(journal.segments())], [row["id"] for row in journal.quarantined()]


@pytest.mark.parametrize("label", [["sport"], [], ["sport", "law"]])
def test_a_label_that_the_task_cannot_take_is_known_at_intake(tmp_path: Path, label: list[str]) -> None:
    prepare(tmp_path)
    feed(tmp_path, "a", ["business", "sport"], n=40)
    write(tmp_path, "b", {"id": "list", "text": "goal", "label": label})
    live = updater(tmp_path)
    outcome = live.run()
    assert outcome.status == "promoted"
    assert "1 of 41 records went to quarantine: field 'label': one label is expected, got the list" in outcome.words
    assert ids(live)[1] == ["list"]


def test_pending_records_are_checked_again_when_the_task_says_more(tmp_path: Path) -> None:
    """What an earlier release let into the journal, with its update dying again and again."""
    prepare(tmp_path)
    feed(tmp_path, "a", ["business", "sport"], n=40)
    write(tmp_path, "b", {"id": "list", "text": "goal", "label": ["sport"]})
    before = updater(tmp_path, task=Task())
    before.intake()
    assert len(ids(before)[0]) == 41
    live = updater(tmp_path)
    outcome = live.run()
    assert outcome.status == "promoted"
    assert "one label is expected, got the list ['sport']" in outcome.words
    assert (len(ids(live)[0]), ids(live)[1]) == (40, ["list"])


def test_pending_records_are_checked_again_when_the_schema_changes(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=40)
    live = updater(folder)
    live.intake()
    closed = RecordSchema(id="id", closed_classes=["business", "sport"])
    other = updater(folder, schema=closed, config={"schema": 2})
    outcome = other.run()
    assert (outcome.status, outcome.code) == ("stopped", 5)  # half of them
    assert (
        "'politics' is none of the closed classes business, sport (checked again under another schema)" in outcome.words
    )
    assert len(ids(other)[1]) == 20
    assert len(ids(other)[0]) == 80


def test_a_record_that_would_end_the_training_is_set_aside_and_the_rest_is_learned(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=40)
    live = updater(folder, task=Stumbling())
    outcome = live.run()
    assert outcome.status == "promoted"
    assert "it cannot be learned: TypeError: it stumbles" in outcome.words
    assert ids(live)[1] == ["b-7"]
    version = live.registry.production
    assert version is not None
    assert version.manifest.records["train"] + version.manifest.records["held_out"] == 39


class Stumbling(SequenceClassificationTask):
    """Cannot make a batch of one record."""

    def collator(self, tokenizer: Any) -> Callable[[list[Any]], Any]:
        pad = super().collator(tokenizer)

        def collate(examples: list[Any]) -> Any:
            if any(one.get("id") == "b-7" for one in examples):
                raise TypeError("it stumbles")
            return pad(examples)

        return collate


class Picky(SequenceClassificationModule):
    """Fails while it learns or answers, if one text is in the batch."""

    def forward(self, **inputs: Any) -> Any:
        unknown = self.tokenizer.unk_token_id
        if ((inputs["input_ids"] == unknown).sum(1) >= 3).any():
            raise IndexError("index out of range in self")
        return super().forward(**inputs)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_record_that_ends_the_training_or_the_evaluation_is_found(tmp_path: Path, held_out: bool) -> None:
    prepare(tmp_path)
    feed(tmp_path, "a", ["business", "sport"], n=40)
    base = updater(tmp_path)
    model = Picky(str(tmp_path / "bert"), learning_rate=3e-3)
    live = Updater(base.registry, base.source, model, base.trainer, schema=RecordSchema(id="id"), data=base.data,
                   gate=base.gate, trigger=base.trigger, settings=base.settings)  # fmt: skip
    name = next(f"odd-{n}" for n in range(100) if _is_held_out(live, f"odd-{n}") is held_out)
    write(tmp_path, "b", {"id": name, "text": "xyzzy plugh frotz", "label": "sport"})
    outcome = live.run()
    assert outcome.status == "promoted"
    assert "it cannot be learned: IndexError: index out of range in self" in outcome.words
    assert ids(live)[1] == [name]


def _is_held_out(live: Updater, name: str) -> bool:
    live.intake()
    rows = [*live.journal.records(live.journal.segments()), {"id": name, "record": {"text": "x", "label": "sport"}}]
    _, held_out = hold_out(rows, "label", live.settings.holdout, live.settings.max_holdout)
    return name in {row["id"] for row in held_out}


def test_an_update_that_was_planned_with_such_a_record_is_planned_again(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=40)
    live = updater(folder)
    live.intake()
    assert isinstance(live._planner.plan(), PlannedUpdate)
    row = live.journal.records(live.journal.segments(after=1), numbered=True)[0]
    live.journal.withdraw([row | {"kind": "dropped", "reason": "poisoned"}])
    outcome = updater(folder).run()
    assert outcome.status == "promoted"
    version = live.registry.production
    assert version is not None
    assert version.manifest.records["train"] + version.manifest.records["held_out"] == 39


@pytest.mark.parametrize("labels", [[["business"], ["sport"]], [["business"], []], [["business", "sport"], ["sport"]]])
def test_several_labels_each(tmp_path: Path, labels: list[list[str]]) -> None:
    prepare(tmp_path)
    records = [{"id": str(n), "text": "the team goal", "label": labels[n % 2]} for n in range(40)]
    write(tmp_path, "a", *records, {"id": "plain", "text": "goal", "label": "sport"})
    live = updater(tmp_path)
    model = SequenceClassificationModule(str(tmp_path / "bert"), multi_label=True, learning_rate=3e-3)
    live = Updater(live.registry, live.source, model, live.trainer, schema=RecordSchema(id="id"), data=live.data,
                   gate=live.gate, trigger=live.trigger, settings=live.settings)  # fmt: skip
    outcome = live.run()
    assert outcome.status == "promoted", outcome.words
    assert "multi_label=True expects a list of names, got 'sport'; write ['sport']" in outcome.words
    assert ids(live)[1] == ["plain"]
