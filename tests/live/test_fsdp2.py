"""Live updates whose weights FSDP2 divides among two real ranks: promoted, refused, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import evertune
from evertune.registry.registry import Registry
from tests.helpers.distributed import run_ranks
from tests.helpers.live_worker import feed, poison, prepare
from tests.live.test_no_half_update import bits, copy

TRAINER = {"strategy": "evertune_fsdp2", "max_epochs": 4}
SHARDED = {"trainer": {**TRAINER, "devices": 2}, "data": {"batch_size": 4, "max_length": 16}}


def update(folder: Path, **settings: Any) -> str:
    """One update on two ranks; returns what became of it."""
    outcomes = run_ranks("tests.helpers.live_worker:run", 2, 300, folder=str(folder), **{**SHARDED, **settings})
    assert outcomes[1]["status"] == "trained"
    return str(outcomes[0]["status"])


def kill(folder: Path, landmark: str) -> None:
    """Start an update, and kill both ranks when a file appears."""
    with pytest.raises(RuntimeError, match="ended with -9"):
        update(folder, until=landmark)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose version 1 two ranks have trained."""
    folder = tmp_path_factory.mktemp("fsdp2") / "first"
    prepare(folder)
    feed(folder, "a", ["business", "sport"], n=120)
    assert update(folder) == "promoted"
    return folder


def with_news(first: Path, folder: Path) -> Path:
    """The same registry, whose inbox has a new class."""
    copy(first, folder)
    inbox = (folder / "inbox").readlink()
    (folder / "inbox").unlink()
    (folder / "inbox").mkdir()
    for file in inbox.iterdir():
        (folder / "inbox" / file.name).hardlink_to(file)
    feed(folder, "b", ["politics", "sport"], n=60)
    return folder


def test_a_poisoned_update_is_refused_and_a_killed_one_resumes_and_is_promoted(first: Path, tmp_path: Path) -> None:
    poisoned = with_news(first, tmp_path / "poisoned")
    (poisoned / "inbox/b.jsonl").unlink()
    poison(poisoned, "c", n=120)
    assert update(poisoned, limits={"max_forgetting": 0.1}) == "refused"
    registry = Registry(poisoned / "registry")
    assert registry.aliases == {"production": 1, "refused": 2} and registry.verify() == []

    folder = with_news(first, tmp_path / "killed")
    start = copy(folder, tmp_path / "start")
    kill(folder, "staging/checkpoints/step-8")
    registry = Registry(folder / "registry")
    assert registry.aliases == {"production": 1} and registry.verify("production") == []
    assert update(folder) == "promoted"
    assert Registry(folder / "registry").aliases == {"production": 2, "previous": 1}
    assert update(start) == "promoted"  # undisturbed
    assert bits(folder, 2) == bits(start, 2)
    with evertune.load(folder / "registry") as served:
        assert set(served.predict(["the party vote"])[0]) == {"business", "sport", "politics"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "landmark",
    [
        "pending/000002.json",
        "staging/plan.json",
        "staging/checkpoints/step-4",
        "staging/version/model/model.safetensors",
        "staging/trained.json",
        "staging/version/verdict.json",
    ],
)
def test_it_may_be_killed_at_any_moment(first: Path, tmp_path: Path, landmark: str) -> None:
    folder = with_news(first, tmp_path / "killed")
    start = copy(folder, tmp_path / "start")
    kill(folder, landmark)
    assert Registry(folder / "registry").verify("production") == []
    assert update(folder) == "promoted"
    assert update(start) == "promoted"
    assert bits(folder, 2) == bits(start, 2)


@pytest.mark.slow
def test_one_process_resumes_what_two_ranks_have_begun(first: Path, tmp_path: Path) -> None:
    folder = with_news(first, tmp_path / "killed")
    kill(folder, "staging/checkpoints/step-8")
    settings = {**SHARDED, "trainer": {**TRAINER, "devices": 1}}
    [outcome] = run_ranks("tests.helpers.live_worker:run", 1, 300, folder=str(folder), **settings)
    assert outcome["status"] == "promoted"
    assert Registry(folder / "registry").verify() == []
