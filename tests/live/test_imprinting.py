"""New classes that production learns to name between two updates, without training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from evertune.callbacks import Imprinting, Replay
from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.registry.registry import Registry
from tests.helpers.lightning_modules import TEXTS
from tests.helpers.live_worker import feed, lenient_gate, prepare, updater

COSINE = {"head": "cosine"}


def imprinting(folder: Path, **changes: Any) -> Updater:
    """An updater that trains from 100 records on, and imprints a class from 5 on."""
    settings = UpdateSettings(checkpoint_every_n_steps=4, imprint_after=5)
    callbacks = [Replay(memory_size=30, id="id"), Imprinting()]
    return updater(
        folder,
        **{"model": dict(COSINE), "settings": settings, "trigger": Volume(100), "trainer": {"callbacks": callbacks}}
        | changes,
    )


@pytest.fixture(scope="module")
def cosine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cosine")
    prepare(folder)
    feed(folder, "a", ["business", "sport"], n=100)
    assert imprinting(folder).run().status == "promoted"
    return folder


@pytest.fixture
def folder(cosine: Path, tmp_path: Path) -> Path:
    target = tmp_path / "live"
    shutil.copytree(cosine, target)
    return target


def right(folder: Path, version: int, label: str) -> float:
    module = SequenceClassificationModule.from_pretrained(folder / f"registry/versions/{version}/model")
    said = module.predict(list(TEXTS[label]))
    return sum(max(one, key=one.get) == label for one in said) / len(said)


def test_a_new_class_is_named_before_it_is_trained_on(folder: Path) -> None:
    registry = Registry(folder / "registry")
    feed(folder, "b", ["politics", "sport"], n=8)
    one = imprinting(folder)
    assert one.run().status == "nothing"  # four records of politics
    assert one.due() is None
    feed(folder, "c", ["politics"], n=6)
    with registry.lease():
        one.intake()
    assert one.due() == "new classes, imprinted until an update trains them: 'politics' (8 records)"
    outcome = imprinting(folder).run()
    assert (outcome.status, outcome.version) == ("promoted", 2), outcome.words

    before, after = registry.version(1), registry.version(2)
    found = after.manifest
    assert (found.kind, found.parent, found.consumed) == ("imprinting", 1, before.manifest.consumed)
    assert found.classes == ["business", "sport", "politics"]
    assert found.records == {"train": 8, "held_out": 0, "quarantined": 0}
    assert [entry.name for entry in after.slices()] == ["update-1"]
    assert registry.verify() == []
    folders = [folder / f"registry/versions/{number}/model" for number in (1, 2)]
    weights = [load_file(one / "model.safetensors") for one in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    heads = [load_file(one / "head.safetensors")["head.weight"] for one in folders]
    assert heads[0][:2].equal(heads[1][:2])
    learning = {name: digest for name, digest in before.manifest.files.items() if name.startswith("learning/")}
    assert learning
    assert learning == {name: digest for name, digest in found.files.items() if name.startswith("learning/")}
    assert right(folder, 2, "politics") > 0.5
    assert imprinting(folder).run().status == "nothing"  # the class is known now

    feed(folder, "d", ["politics", "sport"], n=90)  # 104 records: they are trained on, those before included
    assert imprinting(folder).run().status == "promoted"
    update = registry.version(3).manifest
    assert (update.kind, update.parent) == ("update", 2)
    assert update.records["train"] + update.records["held_out"] == 104
    assert right(folder, 3, "politics") > 0.5


def test_a_version_that_is_worse_is_not_published_and_not_made_again_at_once(folder: Path) -> None:
    def strict() -> Updater:
        return imprinting(folder, gate=lenient_gate(min_accuracy=1.0))

    feed(folder, "b", ["politics"], n=6)
    outcome = strict().run()
    assert (outcome.status, outcome.version) == ("refused", None)
    assert outcome.words.startswith(
        "new classes, imprinted until an update trains them: 'politics' (5 records): the version is refused, and not "
        "published: "
    )
    registry = Registry(folder / "registry")
    assert [version.number for version in registry.versions()] == [1]
    feed(folder, "c", ["politics"], n=2)
    assert strict().run().status == "nothing"
    feed(folder, "d", ["politics"], n=6)  # more than twice as many as were refused
    assert strict().run().status == "refused"
    assert imprinting(folder, gate=lenient_gate(min_accuracy=1.0)).due() is None


def test_records_of_a_refused_update_are_not_imprinted(folder: Path) -> None:
    feed(folder, "b", ["politics"], n=100)
    assert imprinting(folder, gate=lenient_gate(min_accuracy=1.0)).run().status == "refused"
    feed(folder, "c", ["politics"], n=20)
    assert imprinting(folder, gate=lenient_gate(min_accuracy=1.0)).run().status == "nothing"


def killed(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["publish", "finish"])
def test_killed_it_is_made_again(folder: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(folder, "b", ["politics"], n=8)
    with monkeypatch.context() as patched:
        patched.setattr(f"evertune.live.publishing.{at}", killed)
        with pytest.raises(KeyboardInterrupt):
            imprinting(folder).run()
    registry = Registry(folder / "registry")
    assert registry.production is not None
    assert registry.production.number == 1
    outcome = imprinting(folder).run()
    assert outcome.status == "promoted"
    assert registry.production.manifest.classes == ["business", "sport", "politics"]
    assert registry.verify() == []


def test_a_dry_run_publishes_nothing(folder: Path) -> None:
    feed(folder, "b", ["politics"], n=8)
    outcome = imprinting(folder).run(dry_run=True)
    assert outcome.status == "promoted"
    assert ": the version would be promoted: " in outcome.words
    assert [version.number for version in Registry(folder / "registry").versions()] == [1]


def test_what_a_rollback_gave_up_is_not_imprinted(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=100)
    assert imprinting(folder).run().status == "promoted"
    Registry(folder / "registry").rollback(discard=True)
    feed(folder, "c", ["politics"], n=4)  # too few without those that were given up
    assert imprinting(folder).run().status == "nothing"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: imprinting(folder, model={}), "which SequenceClassificationModule does not have here"),
        (
            lambda folder: imprinting(folder, model=COSINE | {"multi_label": True}),
            "leave imprint_after out",
        ),
        (lambda folder: UpdateSettings(imprint_after=0), "imprint_after must be positive or None, got 0"),
    ],
)
def test_what_cannot_work_is_refused_at_setup(folder: Path, make: Callable[[Path], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(folder)
