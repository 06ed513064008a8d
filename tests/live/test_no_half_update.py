"""Killed at any moment, an update leaves production whole, and running it again ends in the same version."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import evertune
from evertune.registry.journal import Journal
from evertune.registry.registry import Registry
from tests.helpers import live_worker
from tests.helpers.live_worker import feed, prepare
from tests.helpers.processes import FORKS

LANDMARKS = [
    "quarantine/000002.jsonl",
    "pending/000002.jsonl",
    "pending/000002.json",
    "staging/plan.json",
    "staging/checkpoints/step-4",
    "staging/checkpoints/step-16",
    "staging/version/model/model.safetensors",
    "staging/version/learning/Replay/memory.json",
    "staging/trained.json",
    "staging/version/evaluation.json",
    "staging/version/verdict.json",
    "versions/2",
]
"""Files of the registry, in the order in which an update writes them: it is killed when one of them appears."""


def test_no_half_update(tmp_path: Path) -> None:
    check_no_half_update(tmp_path, n_random=3, landmarks=LANDMARKS[1::3])


@pytest.mark.slow
def test_no_half_update_at_30_moments(tmp_path: Path) -> None:
    check_no_half_update(tmp_path, n_random=30, landmarks=LANDMARKS)


def check_no_half_update(tmp_path: Path, n_random: int, landmarks: list[str]) -> None:
    start = tmp_path / "start"
    ids = set(first_version(start))
    ids |= set(feed(start, "b", ["business", "sport", "politics"], n=90, n_bad=3))
    ids |= set(feed(start, "c", ["politics", "sport"], n=10))
    ids |= {f"{name}-bad-{number}" for name, n in (("a", 2), ("b", 3)) for number in range(n)}
    began = time.monotonic()
    undisturbed = update(copy(start, tmp_path / "undisturbed"))
    seconds = time.monotonic() - began
    reference = bits(undisturbed, 2)
    assert where_records_are(undisturbed) == {**dict.fromkeys(ids, 1)}

    draw = random.Random(0)
    moments: list[float | str] = [*landmarks, *(draw.uniform(0, seconds) for _ in range(n_random))]
    survived = Counter[int]()
    for number, moment in enumerate(moments):
        folder = copy(start, tmp_path / f"killed-{number}")
        kill(folder, moment)
        registry = Registry(folder / "registry")
        production = registry.production
        assert production is not None, moment
        survived[production.number] += 1
        assert registry.verify("production") == [], moment
        with evertune.load(folder / "registry") as served:
            assert served.predict(["the team goal"])[0], moment
        assert where_records_are(folder, pending=True) == dict.fromkeys(ids, 1), moment
        update(folder)
        assert bits(folder, 2) == reference, moment
        assert where_records_are(folder) == dict.fromkeys(ids, 1), moment
        assert Registry(folder / "registry").aliases == {"production": 2, "previous": 1}, moment
        shutil.rmtree(folder)
    assert survived[1] >= len(moments) // 2  # most kills hit before the version was published


def first_version(folder: Path) -> list[str]:
    """A folder whose registry has version 1 in production."""
    prepare(folder)
    ids = feed(folder, "a", ["business", "sport"], n=60, n_bad=2)
    update(folder)
    return ids


def update(folder: Path) -> Path:
    """One update, in a process of its own."""
    process = FORKS.Process(target=run, args=(str(folder),))
    process.start()
    process.join(120)
    assert process.exitcode == 0, (folder / "log").read_text()[-3000:]
    return folder


def kill(folder: Path, moment: float | str) -> None:
    """Start an update and kill it after so many seconds, or as soon as a file of its registry appears."""
    process = FORKS.Process(target=run, args=(str(folder),))
    process.start()
    end = time.monotonic() + (moment if isinstance(moment, float) else 120)
    while time.monotonic() < end and process.is_alive():
        if isinstance(moment, str) and (folder / "registry" / moment).exists():
            break
        time.sleep(0.001)
    process.kill()
    process.join()


def run(folder: str) -> None:
    with (Path(folder) / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        assert live_worker.run(folder)["status"] in ("promoted", "nothing")


def copy(source: Path, target: Path) -> Path:
    """The same registry once more, over the same inbox: a copied file would be another one to the source."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("inbox"))
    (target / "inbox").symlink_to(source / "inbox")
    return target


def bits(folder: Path, number: int) -> dict[str, Any]:
    """What a version is: the hash of each file (the verdict tells times), and what its manifest says of its data."""
    manifest = Registry(folder / "registry").version(number).manifest
    files = {name: value for name, value in manifest.files.items() if not name.endswith("verdict.json")}
    return {name: getattr(manifest, name) for name in ("consumed", "offset", "records", "slices_digest", "metrics")} | {
        "files": files
    }


def where_records_are(folder: Path, pending: bool = False) -> dict[str, int]:
    """In how many places each record is: in the journal, learned or pending; in quarantine; or still to be read."""
    registry = Registry(folder / "registry")
    journal, production = Journal(registry.store), registry.production
    assert production is not None
    consumed = production.manifest.consumed
    found = Counter(row["id"] for row in journal.records(journal.segments()))
    if not pending:
        assert journal.segments(after=consumed) == []
    found.update(record_id(line) for line in journal.quarantined())
    unread = live_worker.updater(folder).source.read(journal.offset(journal.last), 10_000)
    found.update((record.value or {}).get("id", record.origin) for record in unread.records)
    return dict(found)


def record_id(line: dict[str, Any]) -> str:
    record = line.get("record") or json.loads(line.get("raw") or "{}")
    return str(record.get("id", line.get("id")))
