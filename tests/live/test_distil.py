"""A student of the version in production: promoted, refused, resumed, and updated like any other version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evertune.callbacks import Replay
from evertune.cli.main import main
from evertune.lightning_modules import SequenceClassificationModule
from evertune.lightning_modules.backbone import encoder_layers
from evertune.live.settings import StudentSettings
from evertune.live.training import remembered
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.registry.registry import Registry
from evertune.registry.serving import load
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.training.trainer import ContinualTrainer
from tests.cli.test_update import CONFIG
from tests.helpers.live_worker import feed, lenient_gate, prepare, updater
from tests.tasks.table import ROWS

ONE_LAYER = StudentSettings(layers=1)


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    target = tmp_path / "live"
    shutil.copytree(first, target)
    return target


def n_layers(folder: Path, number: int) -> int:
    module = SequenceClassificationModule.from_pretrained(folder / f"registry/versions/{number}/model")
    return int(module.backbone.config.num_hidden_layers)


def test_a_student_takes_the_place_of_its_teacher_and_goes_on_learning(folder: Path) -> None:
    outcome = updater(folder).distil(ONE_LAYER)
    assert (outcome.status, outcome.version) == ("promoted", 2), outcome.words
    registry = Registry(folder / "registry")
    found = registry.version(2).manifest
    assert (found.kind, found.parent, found.consumed) == ("distillation", 1, 1)
    assert found.reason == "version 1 is distilled into 1 of its 2 layers"
    assert [*found.metrics.accuracy] == ["update-1"] and found.metrics.average_accuracy is not None
    assert found.records == {"train": 48, "held_out": 0, "quarantined": 0}
    assert [entry.name for entry in registry.version(2).slices()] == ["update-1"]
    assert n_layers(folder, 2) == 1
    assert registry.verify() == []
    memory = remembered(folder / "registry/versions/2")
    assert memory is not None and len(memory) == 30
    assert "untrained/accuracy.json" not in found.files
    assert any(name.startswith("untrained/") for name in found.files)  # so that the comparison goes on
    feed(folder, "b", ["politics", "sport"], n=60)
    assert updater(folder).run().status == "promoted"
    assert registry.version(3).manifest.classes == ["business", "sport", "politics"]
    assert n_layers(folder, 3) == 1


def test_a_student_that_is_worse_is_not_published(folder: Path) -> None:
    outcome = updater(folder, gate=lenient_gate(min_accuracy=1.0)).distil(ONE_LAYER)
    assert (outcome.status, outcome.code, outcome.version) == ("refused", 4, None)
    assert "the student of version 1 is refused, and not published: on 'all slices'" in outcome.words
    registry = Registry(folder / "registry")
    assert [version.number for version in registry.versions()] == [1]
    assert registry.aliases == {"production": 1}
    assert not (folder / "registry/staging/student").exists()
    assert updater(folder).run().status == "nothing"


def test_an_interrupted_student_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("evertune.live.distilling.judge", killed)
        with pytest.raises(KeyboardInterrupt):
            updater(folder).distil(ONE_LAYER)
    weights = folder / "registry/staging/student/version/model/model.safetensors"
    trained = weights.read_bytes()
    monkeypatch.setattr("evertune.live.distilling.train", killed)  # it is trained already
    assert (
        updater(folder).distil(ONE_LAYER, dry_run=True).words.startswith("the student of version 1 would be promoted")
    )
    assert trained and not weights.exists()


def test_what_a_rollback_gave_up_is_not_learned(folder: Path) -> None:
    registry = Registry(folder / "registry")
    for name, n in (("b", 50), ("c", 40)):
        feed(folder, name, ["politics", "sport"], n=n)
        assert updater(folder).run().status == "promoted"
        if name == "b":
            registry.rollback(discard=True)
    assert updater(folder).distil(ONE_LAYER).status == "promoted"
    assert registry.version(4).manifest.records["train"] == 48 + 32
    memory = remembered(folder / "registry/versions/4")
    assert memory is not None and not any(name.startswith("b-") for name in memory.ids)


def test_a_student_can_be_narrower(folder: Path) -> None:
    outcome = updater(folder).distil(StudentSettings(prune=0.25, prune_heads=0.5))
    assert outcome.status == "promoted", outcome.words
    found = Registry(folder / "registry").version(2).manifest
    assert found.reason == (
        "version 1 is distilled into all of its 2 layers, without 25% of their feed-forward neurons and 50% of their "
        "attention heads"
    )
    assert sizes(folder) == (2, 48, 1)
    feed(folder, "b", ["politics", "sport"], n=60)
    assert updater(folder).run().status == "promoted"
    assert Registry(folder / "registry").version(3).manifest.classes == ["business", "sport", "politics"]
    assert sizes(folder) == (2, 48, 1)


def sizes(folder: Path) -> tuple[int, int, int]:
    """Numbers of layers, neurons and heads of the version that is served."""
    with load(folder / "registry") as served:
        layers = encoder_layers(served.module.backbone)[1]
        attention = layers[0].attention.self
        heads = attention.query.out_features // attention.attention_head_size
        assert heads == served.module.backbone.config.num_attention_heads
        return len(layers), layers[0].intermediate.dense.out_features, heads


@pytest.mark.parametrize("name", ["question answering", "answers to prompts"])
def test_a_student_answers_questions_and_prompts(tmp_path: Path, name: str) -> None:
    row = ROWS[name]
    row.pretrained(str(tmp_path / "pretrained"))
    (tmp_path / "inbox").mkdir()
    lines = [json.dumps({**record, "id": str(number)}) for number, record in enumerate([*row.records] * 4)]
    (tmp_path / "inbox" / "a.jsonl").write_text("\n".join(lines) + "\n")
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    live = Updater(
        tmp_path / "registry",
        FolderSource(str(tmp_path / "inbox")),
        row.module(str(tmp_path / "pretrained")),
        ContinualTrainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[Replay(20, id="id")], **quiet),  # type: ignore[arg-type]
        schema=RecordSchema(**row.schema, id="id"),
        data={"batch_size": 8, "max_length": 24},
        trigger=Volume(5),
        gate=lenient_gate(min_new_agreement=None, max_drop=None),
    )
    first = live.run()
    assert first.status == "promoted", first.words
    outcome = live.distil(StudentSettings(layers=1, prune=0.25 if name == "question answering" else 0))
    assert (outcome.status, outcome.version) == ("promoted", 2), outcome.words
    with load(tmp_path / "registry") as served:
        assert len(encoder_layers(served.module.backbone)[1]) == 1


def killed(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


def test_students_that_cannot_be_made_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer, and fewer than the 2 of its teacher, got layers=2"):
        updater(folder).distil(StudentSettings(layers=2))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        StudentSettings(layers=1, temperature=0)
    with pytest.raises(ValueError, match="a student is smaller than its teacher: set layers, prune, prune_heads, or"):
        StudentSettings()
    with pytest.raises(ValueError, match=r"prune_heads must be from 0 to below 1, got 1\.0"):
        StudentSettings(prune_heads=1.0)
    with pytest.raises(ValueError, match=r"heads=0\.9 removes 2 of the 2 heads of a layer"):
        updater(folder).distil(StudentSettings(layers=1, prune_heads=0.9))
    feed(folder, "b", ["politics", "sport"], n=60)
    assert updater(folder).run(dry_run=True).status == "promoted"
    with pytest.raises(ValueError, match="update 2 is not finished: run `evertune update` first"):
        updater(folder).distil(ONE_LAYER)
    prepare(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no version in production"):
        updater(tmp_path / "empty").distil(ONE_LAYER)


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "live.yaml").write_text(CONFIG)
    monkeypatch.chdir(folder)
    asked: list[StudentSettings] = []

    def distil(self: Updater, student: StudentSettings, dry_run: bool) -> Any:
        asked.append(student)
        return self_distil(self, student, dry_run)

    self_distil = Updater.distil
    monkeypatch.setattr(Updater, "distil", distil)
    command = ["distil", "--config", "live.yaml", "--student.layers", "1", "--student.temperature", "3"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert asked == [StudentSettings(layers=1, temperature=3.0)]
    assert "version 2 is in production" in capsys.readouterr().out
    assert Registry("registry").version(2).manifest.config["student"]["layers"] == 1
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    assert "fewer than the 1 of its teacher, got layers=1" in capsys.readouterr().err
