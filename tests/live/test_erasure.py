"""Erasing records: no file of the registry holds them afterwards, and everything else goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evertune.cli import main as cli
from evertune.live.erasure import _Edits, erase, finish
from evertune.memory.view import MemoryView
from evertune.registry.journal import Journal
from evertune.registry.registry import Registry
from evertune.sources.masking import Masker, masked_id
from tests.helpers.live_worker import feed, prepare, updater


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions, quarantined records, and a file of pending records."""
    folder = tmp_path_factory.mktemp("erasure")
    prepare(folder)
    for name in ("a", "b"):
        feed(folder, name, ["business", "sport"], n=40, n_bad=2)
        assert updater(folder).run().status == "promoted"
    feed(folder, "c", ["business", "sport"], n=6)
    assert updater(folder).run().status == "nothing"
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def held(root: Path) -> dict[str, set[str]]:
    """The ids of records by the place that holds them."""
    found: dict[str, set[str]] = {"memory": set(), "pending": set(), "quarantine": set(), "slices": set()}
    for path in (root / "versions").rglob("*.arrow"):
        found["memory"].update(MemoryView.open(path).ids)
    for place in ("pending", "quarantine", "slices"):
        for path in (root / place).glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[place].update(row["id"] for row in rows if "id" in row)
    return found


def holding(root: Path, id: str) -> list[str]:
    """The files that hold an id, in whatever way."""
    return [str(path) for path in root.rglob("*") if path.is_file() and f'"{id}"'.encode() in path.read_bytes()]


@pytest.mark.parametrize("place", ["memory", "pending", "quarantine", "slices"])
def test_no_file_holds_an_erased_record(folder: Path, place: str) -> None:
    registry = Registry(folder / "registry")
    before = held(folder / "registry")
    id = sorted(before[place])[-1]
    assert holding(folder / "registry", id)
    erasure = erase(registry, [id])
    assert erasure.found[place] >= 1
    assert f"in {place}" in erasure.words
    assert holding(folder / "registry", id) == []
    after = held(folder / "registry")
    assert after == {name: ids - {id} for name, ids in before.items()}
    assert registry.verify() == []


def test_updates_go_on_without_erased_records(folder: Path) -> None:
    registry = Registry(folder / "registry")
    before = held(folder / "registry")
    ids = [sorted(ids)[0] for ids in before.values()]
    erase(registry, ids)
    feed(folder, "d", ["business", "sport"], n=40)
    outcome = updater(folder).run()
    assert outcome.status == "promoted", outcome.words
    assert not any(ids_now & set(ids) for ids_now in held(folder / "registry").values())
    assert registry.verify() == []


def test_an_update_that_was_refused_or_interrupted_starts_again_without_the_record(folder: Path) -> None:
    feed(folder, "d", ["business", "sport"], n=40)
    assert updater(folder).run(dry_run=True).status == "promoted"
    staged = folder / "registry" / "staging"
    assert staged.exists()
    erase(Registry(folder / "registry"), ["d-3"])
    assert not staged.exists()
    assert updater(folder).run().status == "promoted"
    assert holding(folder / "registry", "d-3") == []


def test_an_erasure_that_was_killed_is_finished_by_the_next_update(folder: Path) -> None:
    registry = Registry(folder / "registry")
    id = sorted(held(folder / "registry")["memory"])[0]
    edits = _Edits(registry.store, {id})
    edits.plan()
    edits.commit()
    todo = json.loads(registry.store.read("erasing/todo.json"))
    name = next(name for name, part in todo.items() if part is not None)
    registry.store.write(name, registry.store.read(f"erasing/{todo[name]}"))  # killed after the first file
    assert holding(folder / "registry", id)
    updater(folder).run()
    assert holding(folder / "registry", id) == []
    assert not registry.store.exists("erasing")
    assert registry.verify() == []


def test_what_a_repair_has_set_aside_is_deleted(folder: Path) -> None:
    registry = Registry(folder / "registry")
    name = sorted(name for name in registry.store.list("pending") if name[:-6].isdecimal())[-1]
    content = registry.store.read(f"pending/{name}")
    registry.store.write(f"pending/{name}", content[:-9])
    registry.repair()
    assert registry.store.list("damaged")
    erasure = erase(registry, [json.loads(content.splitlines()[0])["id"]])
    assert erasure.found["damaged"] == 1
    assert registry.store.list("damaged") == []
    assert registry.verify() == []


def test_half_of_a_plan_changes_nothing(folder: Path) -> None:
    registry = Registry(folder / "registry")
    registry.store.write("erasing/0", b"half")
    before = held(folder / "registry")
    finish(registry)
    assert held(folder / "registry") == before
    assert not registry.store.exists("erasing")


def test_hashes_of_personal_ids_and_unreadable_lines_are_found(tmp_path: Path) -> None:
    class Shouting(Masker):
        def mask(self, text: str) -> str:
            return text.replace("ann@example.com", "<EMAIL>")

    journal = Journal(Registry(tmp_path / "registry").store)
    kept = {"id": "ann", "origin": "a:1", "record": {"text": "x"}}
    row = {"id": Shouting().mask_id("ann@example.com"), "origin": "a:2", "record": {"text": "y"}}
    assert row["id"] == masked_id("ann@example.com")
    bad: list[dict[str, Any]] = [
        {"origin": "a:3", "kind": "unreadable", "reason": "cut", "raw": '{"id": "ann@example.com", "te'},
        {"origin": "a:4", "kind": "unreadable", "reason": "cut", "raw": '{"id": "joann@example.com.uk"'},
    ]
    journal.append([kept, row], bad, [], offset={"line": 4})
    erasure = erase(Registry(tmp_path / "registry"), ["ann@example.com"])
    assert erasure.found == {"pending": 1, "quarantine": 1}
    assert journal.records(journal.segments()) == [kept]
    assert [row["origin"] for row in journal.quarantined()] == ["a:4"]
    assert journal.segments()[0].records == 1


def test_a_withdrawn_record_is_erased_from_its_sealed_list(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    journal = Journal(registry.store)
    kept, gone = ({"id": id, "origin": "a:1", "record": {"text": "é \ud800"}} for id in ("ann", "bob"))
    segment = journal.append([kept, gone], [], [], offset={"line": 2})
    withdrawn = {"segment": segment.number, "kind": "dropped", "reason": "by hand"}
    journal.withdraw([row | withdrawn for row in (kept, gone)])
    assert erase(registry, ["bob"]).found == {"pending": 2}
    (left,) = journal.quarantined()
    assert {**left, "withdrawn": ""} == kept | withdrawn | {"withdrawn": ""}
    assert journal.counts(journal.segments()).pending == 0
    assert registry.verify() == []


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(folder / "registry")
    (tmp_path / "ids").write_text("a-1\na-2\n\n")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["forget", root, "--ids", str(tmp_path / "ids"), "--id", "nobody"])
    assert capsys.readouterr().out.startswith("erased 3 ids: ")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["forget", root, "--id", "a-1", "--json"])
    assert json.loads(capsys.readouterr().out) == {"ids": 1, "found": {}, "versions": []}
    for arguments, message in [
        ([root], "erasing needs at least one id"),
        ([str(tmp_path / "none"), "--id", "a"], "there is no registry at"),
    ]:
        with pytest.raises(SystemExit, match="1"):
            cli.main(["forget", *arguments])
        assert message in capsys.readouterr().err
