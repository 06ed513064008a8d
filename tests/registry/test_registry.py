"""Versions, aliases, the way back, and what a kill at any moment leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest

from evertune.registry.aliases import GivenUp
from evertune.registry.journal import Journal
from evertune.registry.lease import TOKEN, LeaseHeld, LeaseLost
from evertune.registry.manifest import Kind, Manifest, Metrics, VerdictSummary
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.slice_index import SliceEntry

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _no_lease_of_a_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


@pytest.fixture(params=["disk", "bucket"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    root = tmp_path / "registry" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/registry"
    return Registry(root, cache=tmp_path / "cache")


@pytest.fixture
def disk(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def stage(path: Path, number: int) -> Path:
    (path / "model").mkdir(parents=True)
    (path / "model/weights.bin").write_bytes(b"weights of %d" % number)
    (path / "learning/Replay").mkdir(parents=True)
    (path / "learning/Replay/memory.json").write_text("{}")
    return path


def publish(registry: Registry, passed: bool = True, slices: Sequence[SliceEntry] | None = None, **entries: Any) -> int:
    """The next version, trained from production, with the slices of its parent and one more."""
    number = registry.next_number()
    production = registry.production
    if slices is None:
        content = b'{"text": "slice of %d"}\n' % number
        file = f"slices/update-{number}-0000.jsonl"
        registry.store.write(file, content)
        new = SliceEntry(f"update-{number}", file, 1, registry.store.sha256(file))
        slices = [*(production.slices() if production else []), new]
    manifest = Manifest(
        version=number,
        parent=production.number if production else None,
        experience=f"update-{number}",
        consumed=number,
        verdict=VerdictSummary(passed, "all is well" if passed else "it forgets update-1"),
    )
    staging = Path(registry.store.root if registry.store.is_local else tempfile.mkdtemp()) / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    folder = stage(staging, number)
    return registry.publish(folder, replace(manifest, **entries), slices).number


def release(registry: Registry, **entries: Any) -> int:
    number = publish(registry, **entries)
    production = registry.production
    registry.promote(number, reason=f"{number} is due", expected=production.number if production else None)
    return number


# --- versions and aliases


def test_an_empty_registry(registry: Registry) -> None:
    assert registry.versions() == registry.verify() == registry.events == registry.gc() == []
    assert (registry.aliases, registry.production, registry.next_number()) == ({}, None, 1)
    with pytest.raises(RegistryError, match="has no version 1; it has none"):
        registry.version(1)
    with pytest.raises(RegistryError, match="has no production version: name one by its number, of none"):
        registry.version("production")
    with pytest.raises(RegistryError, match="by its number or one of production, previous, refused, got 'champion'"):
        registry.version("champion")
    with pytest.raises(RegistryError, match=r"there is no previous version of .* to go back to"):
        registry.rollback()


def test_what_a_version_says(registry: Registry) -> None:
    assert [release(registry), release(registry)] == [1, 2]
    version = registry.version("production")
    assert version == registry.version(2) == registry.version("2") == registry.production
    assert (version.number, version.parent, version.passed, version.experience) == (2, 1, True, "update-2")
    assert version.created.tzinfo is not None
    assert (version.folder() / "model/weights.bin").read_bytes() == b"weights of 2"
    assert version.manifest.files.keys() == {"learning/Replay/memory.json", "model/weights.bin"}
    assert json.loads((version.folder() / "manifest.json").read_bytes()) == version.manifest.to_dict()
    assert version.manifest.to_dict()["format"] == 1
    assert [version.number for version in registry.versions()] == [1, 2]
    assert registry.verify() == registry.verify(2) == registry.verify("previous") == []


def test_versions_are_sorted_by_number(registry: Registry) -> None:
    for _ in range(11):
        publish(registry)
    assert [version.number for version in registry.versions()] == list(range(1, 12))
    assert registry.next_number() == 12


def test_promotions_are_events(registry: Registry) -> None:
    for _ in range(3):
        release(registry)
    refused = publish(registry, passed=False)
    registry.set_refused(refused, reason="refused", by="the gate")
    registry.set_refused(refused)  # once more: nothing
    assert registry.aliases == {"production": 3, "previous": 2, "refused": 4}
    event = registry.events[-1]
    assert event.pop("time").endswith("+00:00")
    assert event == {"action": "refused", "from": None, "to": 4, "reason": "refused", "by": "the gate"}
    assert [(event["action"], event["from"], event["to"]) for event in registry.events] == [
        ("promote", None, 1),
        ("promote", 1, 2),
        ("promote", 2, 3),
        ("refused", None, 4),
    ]
    assert "@" in registry.events[0]["by"]
    release(registry)
    assert registry.aliases == {"production": 5, "previous": 3}  # one that another champion beat is not


def test_events_are_bounded(disk: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evertune.registry.aliases._EVENTS", 3)
    for _ in range(5):
        release(disk)
    assert [event["to"] for event in disk.events] == [3, 4, 5]


def test_promoting_the_same_again_changes_nothing(registry: Registry) -> None:
    release(registry), release(registry)
    before = registry.store.read("aliases.json")
    registry.promote(2, expected=1)  # as when it was killed right after
    assert registry.store.read("aliases.json") == before


def test_a_promotion_that_another_has_overtaken(registry: Registry) -> None:
    for _ in range(2):
        release(registry)
    third = publish(registry)
    registry.rollback()
    before = registry.store.read("aliases.json")
    message = "version 3 is not promoted: it was compared with version 2, but version 1 is in production by now"
    with pytest.raises(RegistryError, match=message):
        registry.promote(third, expected=2)
    with pytest.raises(RegistryError, match="compared with version None, but version 1"):
        registry.promote(third, expected=None)
    assert registry.store.read("aliases.json") == before
    assert registry.promote(third).number == 3
    assert registry.aliases == {"production": 3, "previous": 1}


def promote_at_once(root: str, number: int, start: Any, answers: Any) -> None:
    registry = Registry(root)
    start.wait()
    try:
        registry.promote(number, expected=1, verify=False)
        answers.put(("promoted", number))
    except RegistryError:
        answers.put(("overtaken", number))


def test_of_two_promotions_at_once_one_is_made(disk: Registry) -> None:
    release(disk)
    numbers = [publish(disk) for _ in range(4)]
    for _ in range(10):
        start, answers = FORK.Barrier(len(numbers)), FORK.Queue()
        processes = [
            FORK.Process(target=promote_at_once, args=(disk.store.root, number, start, answers)) for number in numbers
        ]
        for process in processes:
            process.start()
        said = sorted(answers.get() for _ in numbers)
        for process in processes:
            process.join()
        assert [word for word, _ in said] == ["overtaken"] * 3 + ["promoted"]
        assert disk.aliases == {"production": said[-1][1], "previous": 1}
        disk.promote(1)


def test_a_refused_version_needs_force(registry: Registry) -> None:
    release(registry)
    refused = publish(registry, passed=False)
    assert not registry.version(refused).passed
    with pytest.raises(
        RegistryError, match=r"version 2 was refused: it forgets update-1\. To promote it all the same:"
    ):
        registry.promote(refused)
    assert registry.aliases == {"production": 1}
    registry.promote(refused, force=True)
    assert registry.aliases == {"production": 2, "previous": 1}


def test_a_damaged_version_is_not_promoted(registry: Registry) -> None:
    release(registry), publish(registry)
    registry.store.write("versions/2/model/weights.bin", b"weights of X")
    before = registry.store.read("aliases.json")
    message = "version 2 is damaged and not promoted: versions/2/model/weights.bin is damaged or cut short"
    for force in (False, True):
        with pytest.raises(RegistryError, match=message):
            registry.promote(2, force=force)
    with pytest.raises(RegistryError, match="has no version 3; it has 1, 2"):
        registry.promote(3)
    assert registry.store.read("aliases.json") == before
    registry.promote(2, verify=False)
    assert registry.aliases["production"] == 2


def test_publish_refuses(registry: Registry, tmp_path: Path) -> None:
    release(registry)
    before = registry.version(1)
    with pytest.raises(RegistryError, match="has a version 1, and versions never change"):
        registry.publish(stage(tmp_path / "one", 1), Manifest(version=1))
    with pytest.raises(ValueError, match="versions are counted from 1, got 0"):
        registry.publish(stage(tmp_path / "zero", 0), Manifest(version=0))
    with pytest.raises(ValueError, match=r"created must have a time zone, got 2026-01-01T00:00:00"):
        registry.publish(stage(tmp_path / "two", 2), Manifest(version=2, created=datetime(2026, 1, 1)))
    assert (tmp_path / "one/model/weights.bin").exists()
    assert registry.versions() == [before]


def test_numbers_without_a_value_are_null(registry: Registry) -> None:
    publish(registry, metrics=Metrics({"a": float("nan")}), config={"list": [float("inf"), 1.0]})
    manifest = registry.version(1).manifest
    assert (manifest.metrics.accuracy, manifest.config) == ({"a": None}, {"list": [None, 1.0]})


# --- the way back


def test_rollback_goes_back_step_by_step(registry: Registry) -> None:
    for _ in range(3):
        release(registry)
    publish(registry, passed=False)
    bits = registry.version(2).folder() / "model/weights.bin"
    assert registry.rollback("answers are worse", by="me").number == 2
    assert registry.aliases == {"production": 2, "previous": 1}
    assert bits.read_bytes() == b"weights of 2"
    event = registry.events[-1]
    assert (event["action"], event["from"], event["to"], event["reason"], event["by"]) == (
        "rollback",
        3,
        2,
        "answers are worse",
        "me",
    )
    assert "discard" not in event
    assert registry.rollback(discard=True).number == 1
    assert registry.events[-1]["discard"] == 2
    assert registry.aliases == {"production": 1}
    with pytest.raises(RegistryError, match=r"no previous version .* promote one by its number, of 1, 2, 3, 4"):
        registry.rollback()
    registry.promote(3)  # forth again, by number
    assert registry.aliases == {"production": 3, "previous": 1}


def test_rollback_when_the_grandparent_is_gone(registry: Registry) -> None:
    for _ in range(3):
        release(registry)
    registry.store.delete("versions/1")
    assert registry.rollback().number == 2
    assert registry.aliases == {"production": 2}


def test_rollback_to_what_is_not_whole_is_refused(registry: Registry) -> None:
    for _ in range(2):
        release(registry)
    registry.store.delete("versions/1/model/weights.bin")
    with pytest.raises(RegistryError, match=r"version 1 is damaged: versions/1/model/weights\.bin is missing"):
        registry.rollback()
    assert registry.aliases == {"production": 2, "previous": 1}


# --- whether it is sound


def test_verify(registry: Registry) -> None:
    for _ in range(7):
        release(registry)
    store = registry.store
    store.delete("versions/1/model/weights.bin")
    store.write("versions/2/model/weights.bin", b"weights of X")
    store.write("versions/3/model/weights.bin", b"weights")
    store.write("versions/4/model/pytorch_model.bin", b"pickle")
    store.write(
        "versions/5/manifest.json", store.read("versions/5/manifest.json").replace(b'"format": 1', b'"format": 9')
    )
    store.write("versions/6/manifest.json", store.read("versions/6/manifest.json")[:-40])
    store.write("slices/update-7-0000.jsonl", b"")
    store.write("versions/8/model/weights.bin", b"never published whole")
    said = {finding.version: finding for finding in registry.inspect()}
    expected = {
        1: "versions/1/model/weights.bin is missing",
        2: "versions/2/model/weights.bin is damaged or cut short",
        3: "versions/3/model/weights.bin is damaged or cut short",
        4: "versions/4/model/pytorch_model.bin is not in the manifest",
        5: "versions/5/manifest.json is of format 9, and this evertune reads format 1",
        6: "versions/6/manifest.json is damaged or cut short",
        7: "slices/update-7-0000.jsonl is damaged or cut short: no update can start from this version",
    }
    assert said.keys() == expected.keys()
    for number, words in expected.items():
        assert words in said[number].words
        assert registry.verify(number) == [said[number].words]
        assert said[number].usable == (number == 7)
    store.delete("slices/update-7-0000.jsonl")
    assert registry.verify("production") == [
        "slices/update-7-0000.jsonl is missing: no update can start from this version"
    ]
    with pytest.warns(UserWarning, match=r"left out: .*versions/[56]/manifest\.json") as caught:
        assert [version.number for version in registry.versions()] == [1, 2, 3, 4, 7]
    assert len(caught) == 2
    with pytest.raises(RegistryError, match="has no version 9"):
        registry.verify(9)


def test_a_slice_outside_the_registry(disk: Registry) -> None:
    publish(disk, slices=[SliceEntry("update-1", "../../etc/passwd", 1, "")])
    [finding] = disk.inspect(1)
    assert "names the file '../../etc/passwd' as a slice" in finding.words
    assert finding.usable


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("slices_digest", ["x"], "'slices_digest' must be a string, got ['x']"),
        ("consumed", "7", "'consumed' must be a whole number, got '7'"),
        ("consumed", True, "'consumed' must be a whole number, got True"),
        ("parent", 1.0, "'parent' must be a whole number, got 1.0"),
        ("kind", "repair", f"'kind' must be one of {[*get_args(Kind)]}, got 'repair'"),
        ("created", "2026-01-01T00:00:00", "created must have a time zone, got 2026-01-01T00:00:00"),
        ("files", ["model"], "'files' must be an object, got ['model']"),
        ("files", ..., "'files' is missing"),
        ("format", ..., "'format' is missing"),
        ("verdict", {"summary": "well"}, "'verdict.passed' is missing"),
        ("metrics", {"accuracy": {"update-1": "high"}}, "'metrics.accuracy.update-1' must be a number, got 'high'"),
        ("version", 2, "it is of version 2, not 1"),
    ],
)
def test_a_manifest_with_a_wrong_field(disk: Registry, field: str, value: Any, words: str) -> None:
    release(disk)
    content = json.loads(disk.store.read("versions/1/manifest.json"))
    content |= {field: value}
    if value is ...:
        del content[field]
    disk.store.write("versions/1/manifest.json", json.dumps(content).encode())
    [finding] = disk.inspect(1)
    assert words in finding.words
    assert not finding.usable
    with pytest.raises(RegistryError, match=r"manifest\.json is damaged or cut short"):
        disk.version(1)


def test_a_manifest_of_a_later_version_may_say_more(disk: Registry) -> None:
    release(disk)
    content = json.loads(disk.store.read("versions/1/manifest.json"))
    disk.store.write("versions/1/manifest.json", json.dumps(content | {"mood": "good"}).encode())
    assert disk.version(1).manifest.to_dict() == content


def test_aliases_that_are_damaged_at_any_byte(disk: Registry) -> None:
    for _ in range(2):
        release(disk)
    whole = disk.store.read("aliases.json")
    command = f"evertune registry promote {disk.store.root} N --force"
    repair = rf"aliases\.json is .* Restore it from a backup, or make a new one with `{command}`"
    others = [
        b"[]",
        b"null",
        b'{"production": "2", "events": []}',
        b'{"production": 2, "events": 3}',
        b"\x80\x04K\x01.",
    ]
    for content in [*(whole[:keep] for keep in range(0, len(whole), 7)), *others]:
        disk.store.write("aliases.json", content)
        for read in (lambda: disk.production, lambda: disk.events, disk.rollback, lambda: disk.set_refused(1)):
            with pytest.raises(RegistryError, match=repair):
                read()
        assert len(disk.verify()) == 1
    with pytest.raises(RegistryError, match=repair):
        disk.gc()
    damaged = disk.store.read("aliases.json")
    disk.promote(2, "repaired", force=True)
    assert disk.aliases == {"production": 2}
    assert disk.store.read("aliases.json.damaged") == damaged
    assert disk.verify() == []


def test_aliases_that_are_lost(registry: Registry) -> None:
    release(registry)
    registry.store.delete("aliases.json")
    with pytest.raises(RegistryError, match=r"aliases\.json is missing, though there are versions"):
        _ = registry.production
    registry.promote(1, force=True)
    assert registry.aliases == {"production": 1}


def test_an_alias_of_nothing(registry: Registry) -> None:
    for _ in range(2):
        release(registry)
    registry.store.delete("versions/1")
    assert registry.verify() == ["previous names version 1, which does not exist"]


def test_diff(registry: Registry) -> None:
    release(
        registry,
        classes=["sport"],
        config={"trainer": {"max_epochs": 3, "devices": 1}, "seed": 0},
        metrics=Metrics({"update-1": 0.9}, 0.9),
        records={"train": 100},
    )
    release(
        registry,
        classes=["sport", "news"],
        config={"trainer": {"max_epochs": 5, "devices": 1}, "lr": 0.1},
        metrics=Metrics({"update-1": 0.8, "update-2": 1.0}, 0.9),
        records={"train": 100},
    )
    diff = registry.diff("previous", "production")
    assert (diff["a"], diff["b"]) == (1, 2)
    assert diff["config"] == {"trainer.max_epochs": [3, 5], "seed": [0, None], "lr": [None, 0.1]}
    assert diff["metrics"] == {
        "accuracy.update-1": [0.9, 0.8],
        "average_accuracy": [0.9, 0.9],
        "accuracy.update-2": [None, 1.0],
    }
    assert diff["records"] == {"train": [100, 100]}
    assert diff["classes"] == {"added": ["news"], "removed": []}
    assert diff["files"] == {"added": {}, "removed": {}, "changed": {"model/weights.bin": [12, 12]}, "unchanged": 1}
    assert diff["manifest"]["parent"] == [None, 1]
    assert diff["size"] == [sum(registry.store.sizes(f"versions/{number}").values()) for number in (1, 2)]
    assert registry.diff(1, 1)["config"] == {}


# --- what is no longer needed


def segments(registry: Registry, count: int) -> None:
    journal = Journal(registry.store)
    for number in range(1, count + 1):
        row = {"id": f"{number}", "origin": f"inbox:{number}", "record": {"text": "goal"}}
        bad = {"origin": "inbox", "kind": "refused", "reason": "no label", "raw": "{}"}
        journal.append([row], [bad], [], {"line": number})


def test_gc_keeps_what_is_needed(registry: Registry) -> None:
    segments(registry, 9)
    for _ in range(6):
        release(registry)
    publish(registry, passed=False)
    registry.store.write("slices/lost-0000.jsonl", b"")
    registry.store.write("versions/9/model/weights.bin", b"never published whole")
    expected = [
        "versions/1",
        "versions/2",
        "versions/3",
        "versions/4",
        "versions/9",
        "slices/lost-0000.jsonl",
        *(f"pending/{number:06d}.{kind}" for number in range(1, 6) for kind in ("json", "jsonl")),
    ]
    assert registry.gc(keep=1, dry_run=True) == [entry.name for entry in registry.garbage(keep=1)] == expected
    assert registry.garbage(keep=1)[0].size == sum(registry.store.sizes("versions/1").values())
    assert len(registry.versions()) == 7
    assert registry.gc(keep=1) == expected
    assert [version.number for version in registry.versions()] == [5, 6, 7]
    assert registry.store.list("slices") == ["index.jsonl", *(f"update-{number}-0000.jsonl" for number in range(1, 8))]
    assert registry.store.list("pending")[0] == "000006.json"
    assert len(registry.store.list("quarantine")) == 9
    assert registry.gc(keep=1) == registry.verify() == []
    assert registry.rollback().number == 5  # its records are pending again: 6 and later are there
    assert registry.next_number() == 8


def test_gc_keeps_the_last_segment(registry: Registry) -> None:
    segments(registry, 2)
    release(registry, consumed=2)
    assert registry.gc() == ["pending/000001.json", "pending/000001.jsonl"]


def test_gc_keeps_the_last_segment_beside_what_a_killed_writer_left(registry: Registry) -> None:
    segments(registry, 2)
    registry.store.write("pending/000003.jsonl", b"no segment: its .json was never written")
    release(registry, consumed=2)
    assert registry.gc() == ["pending/000001.json", "pending/000001.jsonl"]


def test_gc_sweeps_what_is_stale(disk: Registry) -> None:
    release(disk)
    root = Path(disk.store.root)
    stale = [".aliases.json.00ff00ff.tmp", "versions/.3.00ff00ff.tmp", "staging"]
    for name in stale[1:]:
        (root / name).mkdir()
        (root / name / "model").write_bytes(b"half")
    (root / stale[0]).write_bytes(b"{")
    assert disk.gc() == []
    for path in (*map(root.joinpath, stale), *(root / name / "model" for name in stale[1:])):
        os.utime(path, (time.time() - 8 * 86_400,) * 2)
    assert disk.gc(stale_days=9) == []
    os.utime(root / "staging/model", None)  # somebody is going on with it
    assert disk.gc() == stale[:2]
    assert disk.gc(stale_days=0) == ["staging"]
    assert disk.verify() == []


@pytest.mark.parametrize("act", ["promote", "roll back", "roll back twice", "refused"])
@pytest.mark.parametrize("when", ["decided", "deleting"])
def test_gc_keeps_what_was_promoted_meanwhile(registry: Registry, act: str, when: str) -> None:
    for number in range(1, 7):
        registry.store.write(f"pending/{number:06d}.jsonl", b"{}\n")
        release(registry)
    other = Registry(registry.store.root)
    changes: dict[str, Callable[[], Any]] = {
        "promote": lambda: other.promote(2),
        "roll back": other.rollback,
        "roll back twice": lambda: (other.rollback(), other.rollback()),
        "refused": lambda: other.set_refused(2),
    }
    calls = iter([changes[act]])
    name = "garbage" if when == "decided" else "check_lease"
    before = getattr(registry, name)

    def meanwhile(*arguments: Any) -> Any:
        """Between the decision and the first deletion, or right before it."""
        found = before(*arguments)
        next(calls, lambda: None)()
        return found

    if when == "deleting" and registry.store.is_local:  # the lock keeps others out there
        with pytest.raises(RegistryError, match="another process has held"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("evertune.registry.store._PATIENCE", 0.02)
            registry.check_lease = meanwhile  # type: ignore[method-assign]
            registry.gc(keep=1)
        return
    setattr(registry, name, meanwhile)
    registry.gc(keep=1)
    assert other.verify() == []
    assert set(other.aliases.values()) <= {version.number for version in other.versions()}


@pytest.mark.parametrize("act", ["promote", "set_refused"])
def test_what_gc_deletes_meanwhile_is_not_promoted(registry: Registry, act: str) -> None:
    for _ in range(4):
        release(registry)
    other = Registry(registry.store.root)
    before = other._aliases.changing

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        registry.gc(keep=1)
        return before(*arguments, **named)

    other._aliases.changing = meanwhile  # type: ignore[method-assign]
    with pytest.raises(RegistryError, match=r"version 1 was deleted meanwhile; .* has 3, 4"):
        getattr(other, act)(1)
    assert registry.verify() == []


def test_aliases_are_changed_while_another_process_holds_the_lease(registry: Registry) -> None:
    for _ in range(3):
        release(registry)
    with registry.lease("a watch", ttl=1e6):
        other = Registry(registry.store.root)
        assert other.rollback().number == 2
        assert other.promote(1).number == 1


def test_gc_and_the_lease(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evertune.registry.lease._GRACE", 0.02)
    for _ in range(3):
        release(registry)
    with registry.lease("an update", ttl=1e6):
        with pytest.raises(LeaseHeld, match="an update"):
            Registry(registry.store.root).gc(keep=1)
        assert Registry(registry.store.root).gc(keep=1, dry_run=True) == ["versions/1"]
        assert registry.gc(keep=1) == ["versions/1"]
    with pytest.raises(ValueError, match="keep must be positive, got 0"):
        registry.gc(keep=0)


def test_gc_does_nothing_where_it_cannot_tell(registry: Registry) -> None:
    for _ in range(3):
        release(registry)
    registry.store.write("versions/2/manifest.json", b"{")
    with pytest.raises(RegistryError, match=r"versions/2/manifest\.json is damaged"):
        registry.gc(keep=1)
    assert len(registry.store.list("versions")) == 3


# --- killed


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is one: a process that is killed loses nothing of it, and syncing takes no time."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_a_lost_lease_stops_every_write(registry: Registry, tmp_path: Path) -> None:
    release(registry), publish(registry)
    with registry.lease("slow", ttl=1e6) as lease:
        registry.store.write(f"lease/{lease.number + 1}.json", b'{"owner": "quick"}')
        before = registry.store.read("aliases.json")
        folder = stage(tmp_path / "three", 3)
        actions: list[Callable[[], Any]] = [
            lambda: registry.promote(2),
            lambda: registry.set_refused(2),
            registry.rollback,
            lambda: registry.publish(folder, Manifest(version=3)),
        ]
        for action in actions:
            with pytest.raises(LeaseLost, match=r"slow has lost its lease on .*, and quick"):
                action()
        assert registry.store.read("aliases.json") == before
        assert len(registry.versions()) == 2


def update(root: Path) -> None:
    """What an updater writes at the end, good to repeat: version 3, published and promoted, and old ones deleted."""
    registry = Registry(root)
    with registry.lease("update"):
        if not registry.store.exists("versions/3/manifest.json"):
            staging = root / "staging"
            shutil.rmtree(staging, ignore_errors=True)
            manifest = Manifest(version=3, parent=2, created=datetime(2026, 1, 1, tzinfo=UTC))
            slices = registry.version(2).slices()
            registry.publish(stage(staging, 3), manifest, [*slices, replace(slices[-1], name="update-3")])
        registry.promote(3, expected=2)
        registry.gc(keep=1)


def killed_at(operation: int, root: Path) -> bool:
    """Run :func:`update` in a process that dies in the given file operation; whether it did."""
    process = os.fork()
    if process == 0:
        seen = 0

        def count(event: str, _: Any) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            update(root)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_in_any_file_operation(ram: Path) -> None:
    """At every one of them: production loads and verifies, and running again ends in the same registry."""
    base = Registry(ram / "base")
    for _ in range(2):
        release(base)
    shutil.copytree(ram / "base", ram / "undisturbed")
    assert not killed_at(10**9, ram / "undisturbed")
    expected = Registry(ram / "undisturbed").store.sizes("versions")
    operation, promoted = 0, set()
    while True:
        operation += 1
        root = ram / "killed"
        shutil.copytree(ram / "base", root)
        was_killed = killed_at(operation, root)
        registry = Registry(root)
        assert registry.verify() == []
        assert [version.number for version in registry.versions()] in ([1, 2], [1, 2, 3], [2, 3])
        production = registry.production
        assert production is not None
        promoted.add(production.number)
        assert (production.folder() / "model/weights.bin").read_bytes() == b"weights of %d" % production.number
        update(root)
        assert Registry(root).aliases == {"production": 3, "previous": 2}
        Registry(root).gc(keep=1, stale_days=-1)
        assert Registry(root).store.sizes("versions") == expected
        assert Registry(root).store.leftovers() == []
        shutil.rmtree(root)
        if not was_killed:
            break
    assert promoted == {2, 3}
    assert operation > 50


def churn(root: str) -> None:
    registry = Registry(root)
    while True:
        with registry.lease("churn"):
            release(registry)
            if registry.production is not None and registry.production.number % 3 == 0:
                registry.rollback()
            registry.gc(keep=2)


def test_killed_at_random_moments(ram: Path) -> None:
    disk = Registry(ram / "registry")
    release(disk), release(disk)
    moments = random.Random(0)
    last = 2
    for _ in range(25):
        process = FORK.Process(target=churn, args=(disk.store.root,))
        process.start()
        time.sleep(moments.uniform(0.01, 0.1))
        process.kill()
        process.join()
        assert disk.verify() == []
        production = disk.production
        assert production is not None
        assert (production.folder() / "model/weights.bin").read_bytes() == b"weights of %d" % production.number
        newest = disk.next_number() - 1
        assert newest >= last  # a number never comes again
        last = newest
    assert last > 2


# --- files that somebody else has written or damaged

FOREIGN = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b"[" * 200_000,
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    b"\xff\xfe",
    b"1e400",
    b"9" * 10_000,
    rb'{"format": "\ud800"}',
]
"""What a file may hold that should have been an object of known entries."""

ALIASES_FILES = [
    b'{"events": []}'.replace(b"[]", content) for content in (b"{}", b"1", b"[1]", b"[{}]", b"null", b'[{"time": 1}]')
] + [
    b'{"production": %s, "events": []}' % content
    for content in (b"1e400", b'"1"', b"true", b"1.0", b"[1]", b"{}", b"NaN")
]


@pytest.mark.parametrize("content", [*FOREIGN[:3], *FOREIGN[5:], *ALIASES_FILES])
def test_foreign_aliases_are_named(disk: Registry, content: bytes) -> None:
    release(disk)
    disk.store.write("aliases.json", content)
    for act in (lambda: disk.aliases, lambda: disk.events, disk.rollback, disk.gc, lambda: disk.production):
        with pytest.raises(RegistryError, match=r"aliases\.json is damaged or cut short"):
            act()
    assert len(disk.versions()) == 1
    assert any("aliases.json is damaged" in words for words in disk.verify())
    assert disk.promote(1, force=True).number == 1


MANIFEST_ENTRIES: list[dict[str, Any]] = [
    {"version": True},
    {"version": 10**400},
    {"created": "0001-01-01T00:00:00+14:00"},
    {"created": 5},
    {"parent": "1"},
    {"parent": 9},
    {"slices_digest": 1},
    {"files": ["a"]},
    {"files": {"a": None}},
    {"metrics": {"average_accuracy": 10**400}},
    {"verdict": "passed"},
    {"classes": {"a": 1}},
    {"seconds": {"train": "1"}},
    {"records": {"train": 1.5}},
]


@pytest.mark.parametrize("change", [*FOREIGN, *MANIFEST_ENTRIES])
def test_one_foreign_manifest_breaks_no_list(registry: Registry, change: Any) -> None:
    for _ in range(3):
        release(registry)
    name = "versions/2/manifest.json"
    content = change
    if isinstance(change, dict):
        content = json.dumps(json.loads(registry.store.read(name)) | change).encode()
    registry.store.write(name, content)
    with pytest.warns(UserWarning, match=r"left out: .*versions/2/manifest\.json"):
        assert [version.number for version in registry.versions()] == [1, 3]
    assert list(registry.damaged()) == [2]
    assert any("versions/2/manifest.json" in words for words in registry.verify())
    with pytest.raises(RegistryError, match=r"versions/2/manifest\.json"):
        registry.promote(2)


@pytest.mark.parametrize("entry", ["consumed", "reason", "experience", "config_digest", "classes"])
def test_a_manifest_that_was_changed_later_is_found(registry: Registry, entry: str) -> None:
    release(registry, classes=["a"])
    name = "versions/1/manifest.json"
    values = json.loads(registry.store.read(name))
    values[entry] = {"consumed": 9, "classes": ["b"]}.get(entry, "changed")
    registry.store.write(name, json.dumps(values).encode())
    assert registry.verify() == [
        f"{name} is damaged: it does not match its own digest: it was changed after it was written"
    ]


def test_versions_are_read_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        release(registry)
    assert len(registry.versions()) == 3
    read: list[str] = []
    before = registry.store.read_all
    monkeypatch.setattr(registry.store, "read_all", lambda names: before([read.append(n) or n for n in names]))
    assert len(registry.versions()) == 3
    assert read == []
    release(Registry(registry.store.root))
    assert [version.number for version in registry.versions()] == [1, 2, 3, 4]
    assert read == ["versions/4/manifest.json"]
    Registry(registry.store.root).gc(keep=1)
    assert [version.number for version in registry.versions()] == [3, 4]


def test_what_a_rollback_gave_up_outlives_its_event(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evertune.registry.aliases._EVENTS", 3)
    for _ in range(3):
        release(registry)
    registry.rollback(discard=True)
    third = [GivenUp(version=3, after=2, upto=3)]
    assert registry.given_up == third
    for number in (1, 2, 1, 2, 1):
        registry.set_refused(number)
    assert all("discard" not in event for event in registry.events)
    assert registry.given_up == third
    registry.rollback(discard=True)
    both = [*third, GivenUp(version=2, after=1, upto=2)]
    assert registry.given_up == both
    release(registry)
    assert registry.given_up == both  # it learned none of them
    registry.clear_given_up(third)
    assert registry.given_up == both[1:]


# --- equal files


def test_files_equal_to_the_parents_are_stored_once(disk: Registry) -> None:
    for _ in range(3):
        release(disk)
    folders = [disk.version(number).folder() for number in (1, 2, 3)]
    equal = "learning/Replay/memory.json"
    assert len({(folder / equal).stat().st_ino for folder in folders}) == 1
    assert len({(folder / "model/weights.bin").stat().st_ino for folder in folders}) == 3
    assert len({(folder / "manifest.json").stat().st_ino for folder in folders}) == 3
    assert disk.verify() == []
    disk.gc(keep=1)
    assert not folders[0].exists()
    assert disk.verify() == []


def test_a_damaged_file_of_the_parent_is_not_shared(disk: Registry) -> None:
    release(disk)
    disk.store.write("versions/1/learning/Replay/memory.json", b"[]")
    release(disk)
    assert (disk.version(2).folder() / "learning/Replay/memory.json").read_bytes() == b"{}"
    assert [finding.version for finding in disk.inspect()] == [1]
