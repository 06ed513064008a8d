"""Damaged records: found by verify, named by the update, set aside by repair with what can be read."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from evertune.cli.registry import add_registry_commands, run_registry
from evertune.registry.journal import Journal
from evertune.registry.registry import Registry
from evertune.registry.store import Store


def row(name: str) -> dict[str, object]:
    return {"id": name, "origin": f"inbox:{name}", "record": {"text": "a goal", "label": "sport"}}


def bad(name: str) -> dict[str, object]:
    return {"id": name, "origin": f"inbox:{name}", "reason": "no label", "kind": "refused", "record": {"text": "a"}}


def half(name: str) -> dict[str, object]:
    return {"id": name, "origin": f"texts:{name}", "value": {"text": "a goal"}, "has_text": True, "since": 1}


@pytest.fixture(params=["disk", "bucket"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    root = tmp_path / "registry" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/registry"
    registry = Registry(root, cache=tmp_path / "cache")
    journal = Journal(registry.store)
    for number in (1, 2, 3):
        names = [f"{number}{letter}" for letter in "abc"]
        journal.append([*map(row, names)], [bad(f"{number}x")], [half(f"{number}w")], {"line": number})
    return registry


FILES = {
    f"{folder}/00000{number}{ending}"
    for number in (1, 2, 3)
    for folder, ending in (("pending", ".json"), ("pending", ".jsonl"), ("quarantine", ".jsonl"))
} | {"pending/000003.waiting.jsonl"}

CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda content: bytes([*content[:10], content[10] ^ 1, *content[11:]]),
    "a bit in the middle": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
    ),
    "cut short": lambda content: content[:-7],
    "emptied": lambda content: b"",
    "of something else": lambda content: b"\xff\xfe\x00",
    "nested too deep": lambda content: b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", sorted(FILES))
def test_a_damaged_file_is_found_and_set_aside(registry: Registry, file: str, change: str) -> None:
    content = registry.store.read(file)
    registry.store.write(file, CHANGES[change](content))
    (problem,) = registry.verify()
    assert registry.store.address(file) in problem
    assert "`evertune registry repair` sets it aside" in problem
    done = registry.repair()
    assert any(file in words for words in done)
    assert registry.verify() == registry.repair() == []
    aside = registry.store.list("damaged")
    assert CHANGES[change](content) in [registry.store.read(f"damaged/{name}") for name in aside]
    journal = Journal(registry.store)
    segments = journal.segments()
    kept = [one["id"] for one in journal.records(segments)]
    held = [one.get("id") for one in journal.quarantined()]
    if file == "pending/000003.json":  # the source is read again from the offset before it
        assert journal.last is not None
        assert (journal.last.number, journal.offset(journal.last)) == (2, {"line": 2})
    else:
        assert [segment.number for segment in segments] == [1, 2, 3]
        assert journal.last is not None
        assert journal.offset(journal.last) == {"line": 3}
    damaged = int(file.partition("/")[2][:6])
    sound = [f"{number}{letter}" for number in (1, 2, 3) for letter in "abc" if number != damaged]
    assert set(sound) <= set(kept)
    if change == "a bit" and file.startswith("pending") and file.endswith("000002.jsonl"):
        assert {"2b", "2c"} <= set(held)  # the lines that can be read
    journal.append([row("4a")], [], [], {"line": 4})
    assert "4a" in [one["id"] for one in journal.records(journal.segments())]
    assert registry.verify() == []


def test_a_missing_file_is_found(registry: Registry) -> None:
    registry.store.delete("pending/000002.jsonl")
    (problem,) = registry.verify()
    assert "pending/000002.jsonl is missing, with 3 lines of the journal" in problem
    registry.repair()
    assert registry.verify() == []


def test_a_quarantine_file_that_somebody_has_dealt_with_is_not_damage(registry: Registry) -> None:
    registry.store.delete("quarantine/000002.jsonl")
    assert registry.verify() == []


@pytest.mark.parametrize("step", range(4))
def test_a_repair_that_dies_is_repeated(registry: Registry, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    registry.store.write("pending/000002.jsonl", CHANGES["a bit"](registry.store.read("pending/000002.jsonl")))
    left, write = iter(range(step)), Store.write

    def dies(store: Store, name: str, data: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(store, name, data)

    with registry.lease(), monkeypatch.context() as patch:
        patch.setattr(Store, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            registry.repair()
    registry.repair()
    assert registry.verify() == []
    held = [one["id"] for one in Journal(registry.store).quarantined() if "id" in one]
    assert {"2b", "2c"} <= set(held)
    assert len(held) == len(set(held))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry(tmp_path / "registry")
    journal = Journal(registry.store)
    journal.append([row("a"), row("b")], [], [], {"line": 1})
    content = registry.store.read("pending/000001.jsonl")
    registry.store.write("pending/000001.jsonl", CHANGES["a bit"](content))
    run = partial(call, capsys, str(tmp_path / "registry"))
    code, out = run("verify")
    assert (code, "journal" in out) == (1, True)
    words = "pending/000001.jsonl is set aside; 2 records can be read and are in quarantine"
    code, out = run("repair")
    assert (code, words in out) == (0, True)
    assert run("verify")[0] == 0
    assert run("repair") == (0, "the journal is sound")


def call(capsys: pytest.CaptureFixture[str], root: str, action: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    add_registry_commands(parser.add_subparsers())
    code = run_registry(parser.parse_args(["registry", action, root]))
    return code, " ".join(capsys.readouterr().out.split())


def test_no_count_falls_below_zero_when_a_segment_with_withdrawn_records_is_repaired(registry: Registry) -> None:
    journal = Journal(registry.store)
    rows = journal.records(journal.segments(after=2), numbered=True)
    journal.withdraw([{**row, "kind": "unlearnable", "reason": "too odd"} for row in rows])
    registry.store.write("pending/000003.jsonl", b"")
    registry.repair()
    assert journal.counts(journal.segments(after=2)).pending == 0
    assert registry.verify() == []


@pytest.mark.parametrize("change", [*CHANGES, "lost"])
def test_a_lost_offset_is_replaced_by_the_one_before(registry: Registry, change: str) -> None:
    journal = Journal(registry.store)
    offset = {"files": {f"{number:06d}.jsonl": number for number in range(1_000)}}
    for number in (4, 5):
        journal.append([row(f"{number}a")], [], [half("w")], {**offset, "n": number})
    name = "pending/000004.offset.json"
    if change == "lost":
        registry.store.delete(name)
    else:
        registry.store.write(name, CHANGES[change](registry.store.read(name)))
    (problem,) = registry.verify()
    assert registry.store.address(name) in problem
    with pytest.raises(ValueError, match=r"000004\.offset\.json is .*registry repair"):
        Journal(registry.store).offset(journal.last)
    (words,) = registry.repair()
    assert f"{name} is set aside; the source is read again from after segment 3" in words
    assert registry.verify() == registry.repair() == []
    again = Journal(registry.store)
    assert again.offset(again.last) == {"line": 3}
    assert [one["id"] for one in again.records(again.segments(after=3))] == ["4a", "5a"]
    again.append([row("6a")], [], [], {**offset, "n": 6})
    assert Journal(registry.store).offset(again.last) == {**offset, "n": 6}
    assert registry.verify() == []
