"""Every file of a registry, damaged: verify finds it, and no command ends in a traceback."""

from __future__ import annotations

import argparse
import random
import shutil
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from evertune.cli.quarantine import quarantine
from evertune.cli.registry import add_registry_commands, run_registry
from evertune.live.triggers import Volume
from evertune.registry.registry import Registry, RegistryError
from evertune.sources.base import SourceError
from tests.helpers.live_worker import feed, prepare, updater

CLEAN = (RegistryError, SourceError, OSError, ValueError)
"""The errors that `evertune update` reports in one line."""
UNSEEN = ("lease/", "pending/schema.json")
"""Files whose damage has no effect: the next lease has another number, and pending records are checked again."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two versions, their memory and importance, slices, pending records and a quarantine."""
    folder = tmp_path_factory.mktemp("sound")
    prepare(folder)
    for name, n_bad in (("a", 2), ("b", 0)):
        feed(folder, name, ["business", "sport"], n=40, n_bad=n_bad)
        assert updater(folder).run().status == "promoted"
    feed(folder, "c", ["business", "sport"], n=40, n_bad=1)
    assert updater(folder, trigger=Volume(1000)).run().status == "nothing"
    assert Registry(folder / "registry").verify() == []
    return folder


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "truncate": lambda content, draw: content[: draw.randrange(len(content))],
    "empty": lambda content, draw: b"",
    "zeros": lambda content, draw: bytes(len(content)),
    "noise": lambda content, draw: draw.randbytes(len(content)),
    "deep": lambda content, draw: b"[" * 100_000,
    "null": lambda content, draw: b"null\n",
    "a list": lambda content, draw: b"[1e400]\n",
    "an object": lambda content, draw: b"{}\n",
    "a pickle": lambda content, draw: b"\x80\x04N.",
}


def files(folder: Path) -> list[str]:
    registry = folder / "registry"
    names = (path.relative_to(registry).as_posix() for path in registry.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("."))


def commands(root: Path) -> None:
    """Commands that only read, each with an exit code and no traceback."""
    parser = argparse.ArgumentParser()
    add_registry_commands(parser.add_subparsers())
    for line in ("list", "list --events", "show", "show 1", "diff 1 2", "verify", "gc --keep 1 --dry_run"):
        action, *rest = line.split()
        assert run_registry(parser.parse_args(["registry", action, str(root), *rest])) in (0, 1)
    assert quarantine(["list", "--registry", str(root)]) in (0, 1)


def damage(folder: Path, name: str, kind: str) -> None:
    path = folder / "registry" / name
    old = path.read_bytes()
    draw = random.Random(f"{name}-{kind}")
    new = CHANGES[kind](old, draw)
    while new == old:
        new = flip(old, draw)
    path.unlink()  # it may share its content with that of another version
    path.write_bytes(new)


def check(folder: Path, name: str, kind: str) -> None:
    damage(folder, name, kind)
    problems = Registry(folder / "registry").verify()
    if not name.startswith(UNSEEN):
        assert any(name in words for words in problems), (name, kind, problems)
    commands(folder / "registry")
    try:
        with warnings.catch_warnings(action="ignore"):
            updater(folder, trigger=Volume(1000)).run()
            Registry(folder / "registry").gc(keep=1)
            Registry(folder / "registry").repair()
    except CLEAN:
        pass


def copied(sound: Path, target: Path) -> Path:
    shutil.copytree(sound, target, copy_function=shutil.copy)
    return target


def test_every_kind_of_file_is_there(sound: Path) -> None:
    found = " ".join(files(sound))
    for part in ("aliases.json", "pending/", "quarantine/", "slices/", "lease/", "/manifest.json", "/evaluation.json"):
        assert part in found
    for part in (
        "/model/model.safetensors",
        "/model/config.json",
        "/Replay/memory",
        "/EWC/index.json",
        "/verdict.json",
    ):
        assert part in found


def test_a_damaged_file_is_found_and_breaks_no_command(sound: Path, tmp_path: Path) -> None:
    # Every second file of one version, and one change each, are enough here; the slow tests change all in every way.
    names = [name for name in files(sound) if not name.startswith("versions/1/") or name.endswith("manifest.json")]
    for number, (name, kind) in enumerate(zip(names[::2], cycle(CHANGES), strict=False)):
        check(copied(sound, tmp_path / str(number)), name, kind)
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_every_damaged_file_is_found_and_breaks_no_command(sound: Path, tmp_path: Path, kind: str) -> None:
    for number, name in enumerate(files(sound)):
        check(copied(sound, tmp_path / str(number)), name, kind)
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["learning", "model", "evaluation.json", "slices", "pending"])
def test_an_update_from_a_damaged_registry_is_refused_or_sound(sound: Path, tmp_path: Path, part: str) -> None:
    """Whatever an update does with a damaged file, it never puts a version into production that learned from it."""
    names = [name for name in files(sound) if part in name and not name.startswith("versions/1/")]
    for number, name in enumerate(names):
        folder = copied(sound, tmp_path / str(number))
        damage(folder, name, "flip")
        feed(folder, "d", ["politics", "sport"], n=20)
        try:
            updater(folder, trigger=Volume(1)).run()
        except CLEAN:
            production = Registry(folder / "registry").aliases["production"]
            assert production == 2, name
        shutil.rmtree(folder)
