"""``evertune registry``, as a shell runs it."""

from __future__ import annotations

import argparse
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from evertune.cli.registry import add_registry_commands, run_registry
from evertune.registry.journal import Journal
from evertune.registry.lease import TOKEN
from evertune.registry.manifest import Manifest, Metrics, VerdictSummary
from evertune.registry.registry import Registry

Said = tuple[int, str, str]
DASH = "\N{EN DASH}"


def squeezed(out: str) -> list[str]:
    """The lines of a table, one space between two words."""
    return [" ".join(line.split()) for line in out.splitlines()]


class Shell:
    """Runs a command on one registry, and gives its exit code and what it wrote."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        self.parser = argparse.ArgumentParser(prog="evertune")
        add_registry_commands(self.parser.add_subparsers(dest="command", required=True))

    def __call__(self, action: str, *arguments: str) -> Said:
        code = run_registry(self.parser.parse_args(["registry", action, str(self.root), *arguments]))
        return code, *self.capsys.readouterr()

    def json(self, action: str, *arguments: str) -> Any:
        code, out, err = self(action, *arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Four versions: 3 in production, 2 before it, 4 refused."""
    registry = Registry(tmp_path / "registry")
    for number in (1, 2, 3, 4):
        (tmp_path / "staging").mkdir()
        (tmp_path / "staging/weights.bin").write_bytes(b"w" * number)
        passed, parent = number != 4, min(number - 1, 3) or None
        manifest = Manifest(
            version=number,
            parent=parent,
            created=datetime(2026, 1, number, 10, 30, tzinfo=UTC),
            kind="update" if parent else "first",
            reason=f"{number}00 [new] records",
            records={"train": 100 * number},
            classes=["sport", "news"][: min(number, 2)],
            metrics=Metrics({"update-1": (80 + number) / 100}, (80 + number) / 100),
            verdict=VerdictSummary(passed, "well" if passed else "it forgets update-1"),
            config={"trainer": {"max_epochs": number}},
        )
        registry.publish(tmp_path / "staging", manifest)
        if passed:
            registry.promote(number, f"{number} is due", by="me")
        else:
            registry.set_refused(number, by="me")
    return registry


@pytest.fixture
def shell(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv(TOKEN, raising=False)
    return Shell(tmp_path / "registry", capsys)


def test_list(shell: Shell) -> None:
    code, out, err = shell("list")
    assert (code, err) == (0, "")
    assert squeezed(out) == [
        "version alias created (UTC) records accuracy change verdict reason",
        f"1 2026-01-01 10:30 100 81.0 % {DASH} passed 100 [new] records",
        "2 previous 2026-01-02 10:30 200 82.0 % +1.0 passed 200 [new] records",
        "3 production 2026-01-03 10:30 300 83.0 % +1.0 passed 300 [new] records",
        "4 refused 2026-01-04 10:30 400 84.0 % +1.0 refused it forgets update-1",
        "",
        "change: in points, from the version it was trained from, on the slices of both",
    ]
    found = shell.json("list")
    assert found["aliases"] == {"production": 3, "previous": 2, "refused": 4}
    assert [version["version"] for version in found["versions"]] == [1, 2, 3, 4]
    assert found["versions"][3] == {
        "version": 4,
        "aliases": ["refused"],
        "created": "2026-01-04T10:30:00+00:00",
        "parent": 3,
        "kind": "update",
        "experience": "",
        "records": {"train": 400},
        "average_accuracy": 0.84,
        "change": pytest.approx(0.01),
        "passed": False,
        "reason": "it forgets update-1",
    }


@pytest.mark.parametrize("width", [30, 60, 80, 100, 150])
@pytest.mark.parametrize(
    "command",
    [["list"], ["list", "--events"], ["show", "4"], ["show", "4", "--config"], ["diff", "3", "4"], ["verify"]],
)
def test_a_narrow_terminal_loses_nothing(
    width: int, command: list[str], shell: Shell, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.store.write("versions/2/weights.bin", b"")
    _, wide, _ = shell(*command)
    monkeypatch.setenv("COLUMNS", str(width))
    _, narrow, _ = shell(*command)
    assert max(map(len, narrow.splitlines())) <= width
    assert sorted("".join(narrow.split())) == sorted("".join(wide.split()))


def test_accuracies_of_different_slices_are_compared_like_with_like(shell: Shell, registry: Registry) -> None:
    manifest = Manifest(version=5, parent=3, metrics=Metrics({"update-1": 0.85, "update-5": 0.35}, 0.6))
    (shell.root.parent / "staging").mkdir()
    registry.publish(shell.root.parent / "staging", manifest)
    (line,) = [line for line in squeezed(shell("list")[1]) if line.startswith("5 ")]
    assert "60.0 % +2.0 passed" in line


def test_show_sums_up_a_long_offset(shell: Shell, registry: Registry) -> None:
    offset = {"files": {f"inbox/{number}.jsonl": {"size": number} for number in range(300)}, "run": 7}
    (shell.root.parent / "staging").mkdir()
    registry.publish(shell.root.parent / "staging", Manifest(version=5, offset=offset))
    assert "offset files: 300 entries, run: 7" in squeezed(shell("show", "5")[1])
    assert shell.json("show", "5")["offset"] == offset


@pytest.mark.parametrize(
    ("arguments", "fate"),
    [
        ([], "are pending again: the next update learns them, once more arrive"),
        (["--discard"], "go to quarantine before the next update"),
    ],
)
def test_rollback_says_what_becomes_of_the_records(
    arguments: list[str], fate: str, shell: Shell, registry: Registry
) -> None:
    journal = Journal(registry.store)
    for number in (1, 2, 3):
        journal.append([{"id": f"{number}-{i}", "origin": "", "record": {}} for i in range(10 * number)], [], [], None)
    for number, consumed in ((5, 1), (6, 2)):
        (shell.root.parent / "staging").mkdir()
        registry.promote(
            registry.publish(
                shell.root.parent / "staging", Manifest(version=number, parent=number - 1, consumed=consumed)
            ).number
        )
    _, out, _ = shell("rollback", *arguments)
    assert out == (f"version 5 is in production again, in place of 6; the 20 records that it had not learned {fate}\n")


def test_list_shows_the_newest(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evertune.cli.registry._SHOWN", 1)
    _, out, _ = shell("list")
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["2", "3", "4"]  # what has an alias always
    assert "1 older versions are not shown: --all" in out
    assert len(shell("list", "--all")[1].splitlines()) == 7
    assert len(shell.json("list")["versions"]) == 4


def test_events(shell: Shell) -> None:
    _, out, _ = shell("list", "--events")
    assert [line.partition(" ")[2] for line in squeezed(out)[1:]] == [
        f"promote {DASH} 1 1 is due me",
        "promote 1 2 2 is due me",
        "promote 2 3 3 is due me",
        f"refused {DASH} 4 me",
    ]
    assert shell.json("list", "--events")[-1]["to"] == 4


def test_show(shell: Shell) -> None:
    code, out, _ = shell("show")
    assert code == 0
    lines = squeezed(out)
    for line in (
        "version 3",
        "aliases production",
        "verdict passed: well",
        "train records 300",
        f"update-1 {DASH} 83.0 %",
    ):
        assert line in lines
    assert "configuration --config shows it" in lines
    assert "trainer:\n  max_epochs: 3\n" in shell("show", "--config")[1]
    found = shell.json("show", "refused")
    assert (found["version"], found["aliases"], found["size"] > 0) == (4, ["refused"], True)
    assert [event["action"] for event in found["events"]] == ["refused"]


def test_promote_and_rollback(shell: Shell, registry: Registry) -> None:
    assert shell("promote", "1", "--reason", "better") == (0, "version 1 is in production\n", "")
    assert registry.events[-1]["reason"] == "better"
    assert shell("promote", "1") == (0, "version 1 is already in production\n", "")
    assert shell("rollback", "--discard") == (0, "version 3 is in production again, in place of 1\n", "")
    assert registry.events[-1]["discard"] == 1
    assert shell.json("rollback", "--reason", "worse")["aliases"] == {"production": 2, "previous": 1}
    code, out, err = shell("promote", "4")
    assert (code, out) == (1, "")
    assert err.startswith("evertune registry promote: version 4 was refused: it forgets update-1.")
    assert err.count("\n") == 1
    assert shell.json("promote", "4", "--force")["aliases"] == {"production": 4, "previous": 2}


def test_diff(shell: Shell) -> None:
    code, out, _ = shell("diff")
    assert code == 0
    lines = squeezed(out)
    for line in (
        "config version 2 version 3 change",
        "trainer.max_epochs 2 3 +1",
        "average_accuracy 0.82 0.83 +0.01",
        "weights.bin 2 B 3 B changed",
    ):
        assert line in lines
    assert shell.json("diff", "1", "2")["classes"] == {"added": ["news"], "removed": []}
    assert "added news" in " ".join(shell("diff", "1", "2")[1].split())


def test_verify(shell: Shell, registry: Registry) -> None:
    assert shell("verify") == (0, "the registry is sound\n", "")
    assert shell("verify", "refused") == (0, "version refused is sound\n", "")
    registry.store.write("versions/2/weights.bin", b"")
    code, out, err = shell("verify")
    assert (code, err) == (1, "")
    assert "2 no versions/2/weights.bin is damaged or cut short" in " ".join(out.split())
    code, out, _ = shell("verify", "2", "--json")
    assert code == 1
    assert [(one["version"], one["usable"]) for one in json.loads(out)["problems"]] == [(2, False)]
    assert shell("verify", "3")[0] == 0


def test_gc_beside_a_watch_says_how(shell: Shell, registry: Registry) -> None:
    with registry.lease("evertune watch"):
        code, _, err = shell("gc", "--keep", "1")
    assert code == 1
    assert "watch: {retention: 5}" in err


def test_gc(shell: Shell, registry: Registry) -> None:
    registry.store.write("slices/left.jsonl", b"{}\n" * 700)
    code, out, _ = shell("gc", "--keep", "1", "--dry_run")
    assert code == 0
    assert "would be deleted" in out
    assert len(registry.versions()) == 4
    found = shell.json("gc", "--keep", "1", "--dry_run")
    assert [(entry["name"], entry["why"]) for entry in found["deleted"]] == [
        ("versions/1", "old"),
        ("slices/left.jsonl", "no version needs it"),
    ]
    assert found["deleted"][1]["size"] == 2_100
    assert found["size"] == sum(registry.store.sizes("versions/1").values()) + 2_100
    code, out, _ = shell("gc", "--keep", "1")
    assert code == 0
    assert "versions/1" in out
    assert "freed" in out
    assert [version.number for version in registry.versions()] == [2, 3, 4]
    assert shell("gc") == (0, "nothing to delete\n", "")
    assert shell("gc", "--keep", "0") == (
        1,
        "",
        "evertune registry gc: keep must be positive, got 0: the newest version is never deleted\n",
    )


@pytest.mark.parametrize("action", ["list", "show", "rollback", "diff", "verify", "gc"])
def test_no_registry_there(action: str, shell: Shell) -> None:
    shutil.rmtree(shell.root)
    words = (
        f"evertune registry {action}: there is no registry at {shell.root}: check the path, and that it is mounted\n"
    )
    assert shell(action) == (1, "", words)


def test_a_version_that_is_not_there(shell: Shell) -> None:
    for arguments in (["show", "9"], ["promote", "9"], ["diff", "9", "1"], ["verify", "9"]):
        code, out, err = shell(*arguments)
        assert (code, out) == (1, "")
        assert err == f"evertune registry {arguments[0]}: {shell.root} has no version 9; it has 1, 2, 3, 4\n"


def test_list_helps_where_the_aliases_are_damaged(shell: Shell, registry: Registry) -> None:
    registry.store.write("aliases.json", b"{")
    registry.store.write("versions/2/manifest.json", b"")
    code, out, err = shell("list")
    assert code == 1
    words = [line.split()[0] for line in out.splitlines() if line]
    assert [word for word in words if word == "version" or word.isdecimal()] == ["version", "1", "2", "3", "4"]
    assert f"make a new one with `evertune registry promote {shell.root} N --force`" in err
    assert shell("promote", "3", "--force")[0] == 0
    code, out, err = shell("list")
    assert code == 0
    assert "production" in out
    assert err == ""
    assert "versions/2/manifest.json is damaged" in " ".join(out.split())
    assert [one["version"] for one in shell.json("list")["damaged"]] == [2]
