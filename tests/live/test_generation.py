"""``evertune update`` on dialogues and on summaries: what is bad is set aside, the rest is learned and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import evertune
from evertune.cli import main as cli
from evertune.registry.registry import Registry
from tests.helpers.generation import QUESTIONS, dialogue, tiny_llama, tiny_t5

CONFIG = """
registry: registry
source: {{class_path: evertune.sources.folder.FolderSource, init_args: {{path: inbox}}}}
schema: {schema}
trigger: {{class_path: evertune.live.triggers.Volume, init_args: {{min_records: 8}}}}
model: {model}
data: {{batch_size: 8, max_length: 24}}
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks: [{{class_path: evertune.callbacks.Replay, init_args: {{memory_size: 6, id: id}}}}]
gate: {{max_latency_ratio: null, max_duplicate_share: null, max_forgetting: null, max_total_forgetting: null}}
"""


def update(capsys: pytest.CaptureFixture[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["update", "--config", "live.yaml"])
    print(capsys.readouterr())
    return int(stop.value.code or 0)


def feed(name: str, rows: list[dict[str, Any]]) -> None:
    Path("inbox").mkdir(exist_ok=True)
    lines = [json.dumps({"id": f"{name} {number}", **row}) for number, row in enumerate(rows)]
    Path(f"inbox/{name}.jsonl").write_text("\n".join(lines) + "\n")


def quarantined() -> dict[str, str]:
    from evertune.registry.journal import Journal

    registry = Registry("registry")
    return {row["id"]: row["reason"] for row in Journal(registry.store).quarantined()}


def test_dialogues_without_an_answer_are_set_aside_and_the_others_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama("model")
    model = (
        "{class_path: CausalLMModule, init_args: {model_name_or_path: model, learning_rate: 0.01, too_long: refuse}}"
    )
    schema = '{fields: {id: str, messages: "list[dict]"}, id: id, text: messages, label: null}'
    Path("live.yaml").write_text(CONFIG.format(model=model, schema=schema))
    feed(
        "a",
        [
            *({"messages": dialogue(*turns)} for turns in QUESTIONS["colours"] * 10),
            {"messages": dialogue("what is a city")},
            {"messages": dialogue("what is a city", "")},
            {"messages": dialogue("old " * 40, "big")},
        ],
    )
    assert update(capsys) == 0
    assert Registry("registry").aliases["production"] == 1
    reasons = quarantined()
    assert reasons.keys() == {"a 40", "a 41", "a 42"}
    assert "no turn of the assistant" in reasons["a 40"]
    assert "message 2, a turn of the assistant, is empty" in reasons["a 41"]
    assert 'more than max_length=24 (too_long="refuse")' in reasons["a 42"]

    feed("b", [{"messages": dialogue(*turns)} for turns in QUESTIONS["sizes"] * 10])
    assert update(capsys) == 0
    manifest = Registry("registry").version(2).manifest
    assert manifest.classes == []
    assert manifest.metrics.accuracy.keys() == {"update-1", "update-2"}
    assert all(score is not None and 0 < score <= 1 for score in manifest.metrics.accuracy.values())
    asked = [{"messages": dialogue("what is a city")}, {"messages": []}]
    Path("asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    with pytest.raises(SystemExit):
        cli.main(["predict", "registry", "--input", "asked.jsonl", "--output", "said.jsonl", "--version", "2"])
    first, second = map(json.loads, Path("said.jsonl").read_text().splitlines())
    assert isinstance(first["prediction"], str)
    assert second["prediction"] is None and "it has no 'messages'" in second["error"]
    with evertune.load("registry", 2) as served:
        assert len(served.predict([QUESTIONS["sizes"][0][0], dialogue("what is a city")], max_new_tokens=4)) == 2


def test_summaries_without_a_target_are_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_t5("model")
    model = "{class_path: Seq2SeqModule, init_args: {model_name_or_path: model, generation: {max_new_tokens: 4}}}"
    schema = "{fields: {id: str, report: str, summary: str}, id: id, text: report, label: summary}"
    Path("live.yaml").write_text(CONFIG.format(model=model, schema=schema))
    rows = [{"report": prompt, "summary": answer} for prompt, answer in QUESTIONS["sizes"] * 10]
    feed("a", [*rows, {"report": "what is a city", "summary": " "}])
    assert update(capsys) == 0
    assert quarantined() == {"a 40": "field 'summary': there is no answer to learn: the text is empty"}
    (score,) = Registry("registry").version(1).manifest.metrics.accuracy.values()
    assert score is not None and 0 <= score <= 1
