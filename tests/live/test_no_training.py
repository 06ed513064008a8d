"""What no training would give, beside every version of a registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from evertune.callbacks import Replay
from evertune.lightning_modules import AnalyticClassificationModule
from evertune.live.no_training import NoTraining
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.registry.registry import Registry
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.training.trainer import ContinualTrainer
from tests.helpers.live_worker import feed, lenient_gate, prepare, updater


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two versions, the second with a class more."""
    folder = tmp_path_factory.mktemp("live")
    prepare(folder)
    for name, classes in (("a", ["business", "sport"]), ("b", ["sport", "politics"])):
        feed(folder, name, classes, n=40)
        assert updater(folder).run().status == "promoted"
    return folder


def test_each_version_has_the_sums_of_all_records_so_far(folder: Path) -> None:
    registry = Registry(folder / "registry")
    versions = [registry.version(number) for number in (1, 2)]
    counts = []
    for version in versions:
        sums = load_file(folder / "registry/versions" / str(version.number) / "untrained/head.safetensors")
        about = json.loads(version.read("untrained/head.json"))
        counts.append(dict(zip(about["classes"], sums["counts"].tolist(), strict=True)))
    assert sum(counts[0].values()) == versions[0].manifest.records["train"]
    assert sum(counts[1].values()) == sum(version.manifest.records["train"] for version in versions)
    assert set(counts[1]) == {"business", "sport", "politics"}
    assert counts[1]["business"] == counts[0]["business"]


def test_the_outcome_says_what_no_training_would_give(folder: Path, tmp_path: Path) -> None:
    registry = Registry(folder / "registry")
    stored = json.loads(registry.version(2).read("untrained/accuracy.json"))
    assert stored["records"] == sum(entry.examples for entry in registry.version(2).slices())
    assert 0 <= stored["accuracy"] <= 1
    words = NoTraining(0.875, 0.9, 40).words
    assert words == (
        "without training (LDA over the pretrained encoder), 87.5 % of 40 held-out records are right; with it, 90.0 %"
    )
    feed(folder, "c", ["politics"], n=20)
    outcome = updater(folder).run(dry_run=True)
    assert outcome.untrained.startswith("without training (LDA over the pretrained encoder), ")
    settings = UpdateSettings(checkpoint_every_n_steps=4, untrained=False)
    assert updater(folder, settings=settings, work_dir=tmp_path).run(dry_run=True).untrained == ""


def test_a_model_without_training_is_kept_up_to_date(tmp_path: Path) -> None:
    prepare(tmp_path)

    def run() -> str:
        trainer = ContinualTrainer(
            max_epochs=2,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Replay(memory_size=30, id="id")],
        )
        return (
            Updater(
                tmp_path / "registry",
                FolderSource(str(tmp_path / "inbox")),
                AnalyticClassificationModule(str(tmp_path / "bert")),
                trainer,
                schema=RecordSchema(id="id"),
                data={"batch_size": 8, "max_length": 16},
                trigger=Volume(10),
                gate=lenient_gate(),
            )
            .run()
            .status
        )

    for name, classes in (("a", ["business", "sport"]), ("b", ["sport", "politics"])):
        feed(tmp_path, name, classes, n=40)
        assert run() == "promoted"
    registry = Registry(tmp_path / "registry")
    module = AnalyticClassificationModule.from_pretrained(tmp_path / "registry/versions/2/model")
    trained_on = sum(registry.version(number).manifest.records["train"] for number in (1, 2))
    assert module.head.statistics.n.tolist() == [trained_on]
    assert "untrained/accuracy.json" not in registry.version(2).manifest.files
    assert registry.version(2).manifest.metrics.average_accuracy > 0.5
