"""What production answers: by class, what is mistaken for what, and which labels are suspect."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evertune.cli.main import main
from evertune.gate.predictions import Predictions
from evertune.live.slices import save_slice
from evertune.registry.manifest import Manifest, Metrics
from evertune.registry.registry import Registry
from evertune.reports.answers import answers_of, write_suspects
from evertune.reports.registry import write_versions_report
from tests.reports.test_registry import page_of, words_of

LABELS = ["sport"] * 6 + ["tech"] * 4
SAID = ["sport"] * 5 + ["tech"] + ["tech"] * 2 + ["sport", "law"]
SURE = [0.9, 0.8, 0.95, 0.9, 0.99, 0.97, 0.9, 0.9, 0.6, 0.5]


def registry_with(tmp_path, predictions: Predictions | None, text: str | list[str] = "text") -> Registry:
    registry = Registry(tmp_path / "news")
    rows = [
        {"id": f"r-{i}", "origin": "x", "record": {"text": f"text {i}", "title": "T", "label": label}}
        for i, label in enumerate(LABELS)
    ]
    entry = save_slice(registry.store, "update-1", rows)
    folder = tmp_path / "staging"
    folder.mkdir()
    if predictions is not None:
        (folder / "evaluation.json").write_text(json.dumps({"slices": {"update-1": predictions.to_dict()}}))
    manifest = Manifest(
        version=1,
        experience="update-1",
        metrics=Metrics({"update-1": 0.7}, 0.7),
        config={"schema": {"text": text}},
    )
    registry.promote(registry.publish(folder, manifest, [entry]).number)
    return registry


def single() -> Predictions:
    ids = [f"r-{i}" for i in range(len(LABELS))]
    return Predictions(ids, LABELS, SAID, np.array(SURE), np.where(np.array(LABELS) == np.array(SAID), SURE, 0.01))


def test_answers_are_counted_by_class(tmp_path):
    registry = registry_with(tmp_path, single())
    answers = answers_of(registry, registry.version(1))
    assert answers is not None and answers.records == 10
    found = {one.name: (one.records, one.found, one.right) for one in answers.classes}
    assert found["sport"] == (6, pytest.approx(5 / 6), pytest.approx(5 / 6))
    assert found["tech"] == (4, 0.5, pytest.approx(2 / 3))
    assert found["law"][0] == 0 and found["law"][2] == 0.0
    assert [one.name for one in answers.classes] == ["tech", "sport", "law"], "the worst first"
    assert answers.confusions == [("sport", "tech", 1), ("tech", "law", 1), ("tech", "sport", 1)]
    assert [(one.id, one.suspect) for one in answers.wrong] == [("r-5", True), ("r-8", False), ("r-9", False)]


def test_several_labels_count_one_by_one(tmp_path):
    labels = [["a", "b"], ["a"], []]
    said = [["a"], ["a", "b"], []]
    several = Predictions(["1", "2", "3"], labels, said, np.full(3, 0.9), np.full(3, 0.9))
    registry = registry_with(tmp_path, several)
    answers = answers_of(registry, registry.version(1))
    assert answers is not None
    assert {one.name: (one.records, one.found, one.right) for one in answers.classes} == {
        "a": (2, 1.0, 1.0),
        "b": (1, 0.0, 0.0),
    }
    assert answers.confusions == []
    assert "a, b , answered a" in words_of(page_of(registry, tmp_path))


def test_the_page_shows_them(tmp_path):
    words = words_of(page_of(registry_with(tmp_path, single()), tmp_path))
    assert "tech 50.0 66.7 4 sport 83.3 83.3 6 law" in words
    assert "sport → tech 1" in words
    assert "r-5 · update-1 label suspect sport , answered tech (97.0 %) text 5" in words


@pytest.mark.parametrize("scores", [None, np.full(10, 0.5)])
def test_a_version_without_classes_or_predictions_has_a_page(tmp_path, scores):
    made = None if scores is None else Predictions.scored([f"r-{i}" for i in range(10)], [1.0] * 10, scores)
    assert "What production answers" not in words_of(page_of(registry_with(tmp_path, made), tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"slices": {"update-1": {}}}', "[" * 100_000])
def test_damaged_predictions_are_named(tmp_path, content):
    registry = registry_with(tmp_path, single())
    registry.store.write("versions/1/evaluation.json", content.encode())
    assert "evaluation.json does not match its sha256" in words_of(page_of(registry, tmp_path))
    assert write_versions_report(registry, tmp_path / "page.html").exists()


@pytest.mark.parametrize(("text", "shown"), [("text", "text 5"), (["title", "text"], "T / text 5")])
def test_suspect_labels_are_written_for_relabelling(tmp_path, monkeypatch, capsys, text, shown):
    registry = registry_with(tmp_path, single(), text)
    monkeypatch.chdir(tmp_path)
    main(["report", "news", "--suspects", "out/suspects.jsonl"])
    assert "suspect labels: 1 records in out/suspects.jsonl" in capsys.readouterr().out
    (line,) = map(json.loads, (tmp_path / "out/suspects.jsonl").read_text().splitlines())
    assert line == {
        "id": "r-5",
        "slice": "update-1",
        "text": shown,
        "label": "sport",
        "predicted": "tech",
        "confidence": 0.97,
    }
    registry.store.delete("slices/" + registry.store.list("slices")[-1])
    assert write_suspects(registry, "again.jsonl") == 1, "a slice that is gone costs the text alone"
    with pytest.raises(ValueError, match="no version in production"):
        write_suspects(tmp_path / "empty", "none.jsonl")
