"""Entities through live updates: words with tags are learned, bad records go to quarantine, new types are added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evertune.callbacks import EWC, PseudoLabels, Replay
from evertune.lightning_modules import TokenClassificationModule
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import LabelDrift, Volume
from evertune.live.update import Updater
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.training.trainer import ContinualTrainer
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.live_worker import lenient_gate
from tests.lightning_modules.test_token_classification import sentences

BAD = {
    "short": {"words": ["the", "bank"], "tags": ["O"]},
    "scheme": {"words": ["the", "bank"], "tags": ["O", "U-ORG"]},
    "alone": {"words": ["the", "bank"], "tags": ["O", "I-ORG"]},
    "empty": {"words": [], "tags": []},
    "text": {"words": "the bank", "tags": "O B-ORG"},
}


def feed(folder: Path, name: str, labelled: list[str], **bad: Any) -> None:
    rows = [{"words": row["text"].split(), "tags": row["label"]} for row in sentences(40, labelled)]
    records = {f"{name}-{number}": row for number, row in enumerate(rows)} | bad
    lines = [json.dumps({"id": id, **record}) for id, record in records.items()]
    (folder / "inbox" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def updater(folder: Path, **changes: Any) -> Updater:
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    methods = [Replay(20, id="id"), EWC(ewc_lambda=0.1, n_examples=8, batch_size=4), PseudoLabels(confidence=0.5)]
    settings: dict[str, Any] = {
        "schema": RecordSchema(
            fields={"id": "str", "words": "list[str]", "tags": "list[str]"}, text="words", label="tags", id="id"
        ),
        "data": {"batch_size": 8, "max_length": 16},
        "trigger": Volume(10),
        "gate": lenient_gate(max_bad_share=None),  # the entities that old records leave unlabelled count as wrong
        "settings": UpdateSettings(checkpoint_every_n_steps=50),
    }
    return Updater(
        folder / "registry",
        FolderSource(str(folder / "inbox")),
        TokenClassificationModule(str(folder / "bert"), learning_rate=2e-3, head_learning_rate=1e-2, dropout=0.0),
        ContinualTrainer(max_epochs=8, accelerator="cpu", devices=1, callbacks=methods, **off),
        **(settings | changes),
    )


def test_entities_are_learned_from_live_records(tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    tiny_bert(tmp_path / "bert")
    feed(tmp_path, "a", ["ORG"], **BAD)
    live = updater(tmp_path)
    outcome = live.run()
    assert outcome.status == "promoted", outcome.words
    first = live.registry.version(1).manifest
    assert first.classes == ["ORG"]
    assert first.records == {"train": 32, "held_out": 8, "quarantined": len(BAD)}
    reasons = {row["id"]: row["reason"] for row in live.journal.quarantined()}
    assert reasons == {
        "short": "field 'tags': there must be a tag for each word, got 1 for 2 words",
        "scheme": "field 'tags': word 2 has the tag 'U-ORG', which is not of IOB2: O, B-TYPE, I-TYPE",
        "alone": "field 'tags': word 2 has the tag 'I-ORG', which continues no ORG: it follows 'O'",
        "empty": "field 'words': there are no words",
        "text": "field 'tags': a list of tags or of entities is expected, got 'O B-ORG'",
    }

    feed(tmp_path, "b", ["TEAM"])
    waiting = updater(tmp_path, trigger=LabelDrift(min_records=10)).run()
    assert waiting.words and "not applicable" not in waiting.words  # types of entities are names, whose shares drift
    outcome = waiting if waiting.status == "promoted" else updater(tmp_path).run()
    assert outcome.status == "promoted", outcome.words
    found = live.registry.version(2).manifest
    assert found.classes == ["ORG", "TEAM"]
    scores = found.metrics.accuracy
    assert scores.keys() == {"update-1", "update-2"}
    module = TokenClassificationModule.from_pretrained(tmp_path / "registry/versions/2/model")
    said = module.predict([["the", "bank", "of", "the", "team"]])[0]
    assert [(one["start"], one["end"], one["label"]) for one in said] == [(4, 8, "ORG"), (16, 20, "TEAM")]
    assert live.registry.verify() == []
