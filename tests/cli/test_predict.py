"""``evertune predict``: answers to the records of a file, bad ones among them, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.cli.main import main
from evertune.lightning_modules import SequenceClassificationModule
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry
from tests.helpers.lightning_modules import tiny_bert

ROWS: list[dict[str, Any]] = [{"text": f"the goal {n}", "n": n} for n in range(7)]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Versions 1 and 2, with one label and with several."""
    folder = tmp_path_factory.mktemp("predict")
    backbone, registry = tiny_bert(folder / "bert"), Registry(folder / "registry")
    for number, multi_label in enumerate([False, True], 1):
        torch.manual_seed(number)
        module = SequenceClassificationModule(backbone, classes=["business", "sport"], multi_label=multi_label)
        module.configure_model()
        module.save_pretrained(folder / "staging" / "model")
        about = {"module": "SequenceClassificationModule", "config": {"schema": {"text": "text"}}}
        registry.publish(folder / "staging", Manifest(version=number, parent=number - 1 or None, **about))
    registry.promote(1)
    return registry


def predict(registry: Registry, source: Path, out: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["predict", registry.store.root, "--input", str(source), "--output", str(out), *more])
    return int(ended.value.code or 0)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_gets_the_answer_of_the_module(registry: Registry, tmp_path: Path, capsys: Any) -> None:
    source, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "new" / "out.jsonl"
    assert predict(registry, source, out, "--batch_size", "3", "--top", "2") == 0
    assert "7 records, 7 answered by version 1" in capsys.readouterr().out
    module = SequenceClassificationModule.from_pretrained(registry.version(1).folder() / "model")
    for row, line, expected in zip(ROWS, lines(out), module.predict([row["text"] for row in ROWS]), strict=True):
        assert line == {
            **row,
            "version": 1,
            "prediction": {
                "label": next(iter(expected)),
                "probabilities": {name: pytest.approx(p, abs=1e-5) for name, p in expected.items()},
            },
        }


def test_several_labels_and_other_fields(registry: Registry, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("title,body\na vote,the party\ngoal,team\n")
    out = tmp_path / "out.jsonl"
    assert predict(registry, source, out, "--version", "2", "--text", "title", "body") == 0
    module = SequenceClassificationModule.from_pretrained(registry.version(2).folder() / "model")
    for line, found in zip(lines(out), module.predict([("a vote", "the party"), ("goal", "team")]), strict=True):
        assert line["version"] == 2
        assert line["prediction"]["label"] == [name for name, p in found.items() if p > 0.5]
        assert len(line["prediction"]["probabilities"]) == 1


def test_a_bad_record_has_its_reason_and_the_others_their_answers(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: list[Any] = ["{broken", {"n": 8}, {"text": 5}, {"text": ""}]
    source, out = write(tmp_path / "in.jsonl", [ROWS[0], *bad, ROWS[1]]), tmp_path / "out.jsonl"
    assert predict(registry, source, out) == 1
    found = lines(out)
    assert [line["prediction"] is None for line in found] == [False, True, True, True, True, False]
    assert ["in.jsonl:2" in found[1]["error"], "has no 'text'" in found[2]["error"]] == [True, True]
    assert "text" in found[3]["error"] and "has no 'text'" in found[4]["error"]
    assert "4 records could not be answered" in capsys.readouterr().err


def test_a_run_goes_on_where_it_was(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, whole, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert predict(registry, source, whole, "--batch_size", "2") == 0
    content = whole.read_bytes()
    out.write_bytes(content[: content.index(b'"n": 4') + 3])  # killed in the middle of a line
    assert predict(registry, source, out, "--batch_size", "2") == 0
    assert (
        "7 records, 7 answered by version 1" in (printed := capsys.readouterr().out) and "(4 of them by an" in printed
    )
    assert [line["prediction"]["label"] for line in lines(out)] == [
        line["prediction"]["label"] for line in lines(whole)
    ]
    assert predict(registry, source, out, "--version", "2") == 2
    assert "was begun with version 1, now it is version 2" in capsys.readouterr().err
    other = write(tmp_path / "other.jsonl", [*ROWS[:6], {"text": "another", "n": 6}])
    assert predict(registry, other, out) == 2
    assert "has the answers to other records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        (ROWS, ["--output", "out.csv"], "--output must end in .jsonl"),
        (ROWS, ["--batch_size", "0"], "--batch_size must be positive, got 0"),
        (ROWS, ["--version", "9"], "9"),
        (ROWS, ["--input", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ([{"text": "a goal", "prediction": 1}], [], "has a field 'prediction', which is where the answers go"),
    ],
)
def test_refused(
    registry: Registry, rows: Any, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(registry, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("evertune predict: ") and words in error and "Traceback" not in error


def test_versions_answer_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three versions, of which the first does not know the last class."""
    registry, backbone = Registry(tmp_path / "registry"), tiny_bert(tmp_path / "bert")
    for number, classes in enumerate(
        [["business", "sport"], ["business", "sport", "law"], ["business", "sport", "law"]], 1
    ):
        torch.manual_seed(number)
        module = SequenceClassificationModule(backbone, classes=classes)
        module.configure_model()
        module.save_pretrained(tmp_path / "staging" / "model")
        about = {"module": "SequenceClassificationModule", "config": {"schema": {"text": "text"}}}
        registry.publish(tmp_path / "staging", Manifest(version=number, parent=number - 1 or None, **about))
    registry.promote(3)
    each = [
        SequenceClassificationModule.from_pretrained(registry.version(number).folder() / "model").predict(
            ["the goal 0"]
        )
        for number in (3, 2, 1)
    ]
    source, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    assert predict(registry, source, out, "--last", "3", "--top", "3") == 0
    assert "7 answered by versions 3, 2, 1" in capsys.readouterr().out
    first = lines(out)[0]
    assert first["version"] == [3, 2, 1]
    means = {name: sum(p := [one[name] for [one] in each if name in one]) / len(p) for name in module.classes}
    expected = {name: pytest.approx(p / sum(means.values()), abs=1e-5) for name, p in means.items()}
    assert first["prediction"]["probabilities"] == expected

    assert predict(registry, source, out, "--versions", "3", "2", "1", "--top", "3") == 0  # goes on where it was
    assert predict(registry, source, out, "--versions", "3", "2") == 2
    assert "was begun with versions 3, 2, 1, now it is versions 3, 2" in capsys.readouterr().err
    for arguments, words in (
        (["--last", "4"], "version 3 has 2 versions before it, not 3"),
        (["--versions", "3", "3"], "--versions has 3 twice"),
        (["--last", "0"], "--last must be positive, got 0"),
    ):
        assert predict(registry, source, tmp_path / "other.jsonl", *arguments) == 2
        assert words in capsys.readouterr().err


def test_versions_that_do_not_answer_the_same(registry: Registry, tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    assert predict(registry, source, tmp_path / "out.jsonl", "--versions", "1", "2") == 2
    assert "versions 1 and 2 do not answer the same" in capsys.readouterr().err
