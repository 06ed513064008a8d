"""``evertune review``: what a version is least sure of is chosen, labelled and taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evertune.cli.main import main
from evertune.gate.evaluation import Evaluation
from evertune.gate.predictions import Predictions
from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.review import sureness_of
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry
from tests.helpers.lightning_modules import TEXTS, tiny_bert


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("review")
    torch.manual_seed(0)
    module = SequenceClassificationModule(tiny_bert(folder / "bert"), classes=list(TEXTS))
    module.configure_model()
    module.save_pretrained(folder / "staging" / "model")
    registry = Registry(folder / "registry")
    about = {"module": "SequenceClassificationModule", "config": {"schema": {"text": "text"}}}
    registry.publish(folder / "staging", Manifest(version=1, parent=None, **about))
    registry.promote(1)
    return registry


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["review", *arguments])
    return int(ended.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS = [{"id": f"{name}-{n}", "text": text} for name, texts in TEXTS.items() for n, text in enumerate(texts)]


def test_the_least_sure_are_chosen_labelled_and_taken(registry: Registry, tmp_path: Path, capsys: Any) -> None:
    source, queue, out = tmp_path / "in.jsonl", tmp_path / "queue.jsonl", tmp_path / "inbox" / "reviewed.jsonl"
    bad = ["{broken", json.dumps({"id": "empty", "text": ""})]
    source.write_text("\n".join([*map(json.dumps, ROWS), *bad, json.dumps({**ROWS[0], "id": "again"})]) + "\n")
    assert (
        run("choose", "--registry", registry.store.root, "--input", str(source), "--queue", str(queue), "--n", "4") == 0
    )
    printed = capsys.readouterr().out
    assert f"4 of {len(ROWS) + 3} records are in" in printed and "2 left out because they cannot be read" in printed
    assert "declare reviewed: bool | None among the fields of the schema" in printed
    module = SequenceClassificationModule.from_pretrained(registry.version(1).folder() / "model")
    margins = {}
    for row, answer in zip(ROWS, module.predict([row["text"] for row in ROWS]), strict=True):
        first, second, *_ = answer.values()
        margins[row["id"]] = first - second
    chosen = lines(queue)
    assert [line["id"] for line in chosen] == sorted(margins, key=margins.__getitem__)[:4]
    assert all(line["label"] is None and line["version"] == 1 and line["suggested"] in TEXTS for line in chosen)
    assert [line["sureness"] for line in chosen] == pytest.approx([margins[line["id"]] for line in chosen], abs=1e-4)

    assert run("take", "--queue", str(queue), "--output", str(out)) == 3
    assert "none of the 4 records" in capsys.readouterr().err and not out.exists()
    chosen[0]["label"], chosen[2]["label"] = chosen[0]["suggested"], "something new"
    queue.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    assert run("take", "--queue", str(queue), "--output", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"taken": 2, "waiting": 2, "as_suggested": 1}
    assert lines(out) == [
        {**{name: chosen[n][name] for name in ("id", "text", "label")}, "reviewed": True} for n in (0, 2)
    ]
    assert [line["id"] for line in lines(queue)] == [chosen[n]["id"] for n in (1, 3)]
    for words in (
        ["choose", "--registry", registry.store.root, "--input", str(source)],
        ["take", "--output", str(out)],
    ):
        assert run(*words, "--queue", str(queue)) == 1
        assert "exists" in capsys.readouterr().err


def test_what_a_version_is_sure_of_is_accepted(registry: Registry, tmp_path: Path, capsys: Any) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "sure.jsonl"
    source.write_text("\n".join(map(json.dumps, ROWS)) + "\n{broken\n")
    words = ["accept", "--registry", registry.store.root, "--input", str(source), "--output", str(out)]
    assert run(*words) == 1
    assert "declare pseudo_label: bool | None among the fields of the schema" in capsys.readouterr().err

    module = SequenceClassificationModule.from_pretrained(registry.version(1).folder() / "model")
    said = [next(iter(answer.items())) for answer in module.predict([row["text"] for row in ROWS])]
    sure = np.tile([p for _, p in said], 40)
    limit = float(np.median(sure))
    right = ["sport" if p >= limit else "law" for p in sure]
    evaluation = Evaluation(
        {"1": Predictions(list(map(str, range(len(sure)))), ["sport"] * len(sure), right, sure, sure)}
    )
    staging = tmp_path / "staging"
    module.save_pretrained(staging / "model")
    (staging / "evaluation.json").write_text(json.dumps(evaluation.to_dict()))
    schema = {"text": "text", "fields": {"text": "str", "label": "str", "pseudo_label": "bool | None"}}
    about = {"module": "SequenceClassificationModule", "config": {"schema": schema}}
    registry.publish(staging, Manifest(version=2, parent=1, **about))
    assert run(*words, "--version", "2") == 0
    printed = capsys.readouterr().out
    accepted = {row["id"]: label for row, (label, p) in zip(ROWS, said, strict=True) if p >= limit - 1e-6}
    assert {line["id"]: line["label"] for line in lines(out)} == accepted
    assert f"{len(accepted)} of {len(ROWS) + 1} records are in" in printed and "1 cannot be read" in printed
    assert f"{len(ROWS) - len(accepted)} are not sure enough" in printed
    assert run(*words, "--version", "2") == 1 and "exists" in capsys.readouterr().err


def test_how_sure_each_kind_of_answer_is() -> None:
    entities = [{"label": "ORG", "score": 0.75}, {"label": "LOC", "score": 0.5}]
    assert sureness_of(entities) == (entities, 0.5) and sureness_of([]) == ([], 1.0)
    assert sureness_of({"answer": "Ann", "start": 0, "end": 3, "probability": 0.25}) == (
        {"answer": "Ann", "start": 0, "end": 3},
        0.25,
    )
    assert sureness_of({"only": 1.0}) == ("only", 1.0)
    with pytest.raises(TypeError, match="only answers with probabilities can be reviewed"):
        sureness_of("a story")


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--n", "0"], "--n must be positive"), (["--text", "body"], "none has body")]
)
def test_refused(registry: Registry, arguments: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    place = [
        "--registry",
        registry.store.root,
        "--input",
        str(tmp_path / "in.jsonl"),
        "--queue",
        str(tmp_path / "q.jsonl"),
    ]
    assert run("choose", *place, *arguments) == (3 if "--text" in arguments else 1)
    assert words in capsys.readouterr().err and not (tmp_path / "q.jsonl").exists()
