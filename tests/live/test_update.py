"""What becomes of an update: promoted, refused, stopped, nothing to do; and of its records."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evertune.callbacks import Replay
from evertune.gate.gate import Gate
from evertune.live.outcome import Outcome
from evertune.live.planning import PlannedUpdate
from evertune.live.settings import UpdateSettings
from evertune.live.training import remembered
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.registry.manifest import Manifest
from evertune.registry.registry import LeaseHeld, Registry, RegistryError
from evertune.registry.slice_index import INDEX
from evertune.registry.store import Store
from evertune.registry.version import Version
from evertune.sources.base import SourceError
from evertune.sources.labels import LabelJoin
from evertune.sources.masking import PatternMasker
from evertune.sources.schema import RecordSchema
from evertune.utils.clock import PARTS
from evertune.utils.files import empty
from tests.helpers.distributed import run_ranks
from tests.helpers.live_worker import feed, lenient_gate, updater

REFUSE = {"min_accuracy": 1.0}
"""More than the tiny model reaches."""


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    target = tmp_path / "live"
    shutil.copytree(first, target, ignore=shutil.ignore_patterns("inbox"))
    (target / "inbox").mkdir()
    for path in (first / "inbox").iterdir():
        os.link(path, target / "inbox" / path.name)
    return target


def production(folder: Path) -> int:
    version = Registry(folder / "registry").production
    assert version is not None
    return version.number


def manifest(folder: Path, number: int) -> Manifest:
    return Registry(folder / "registry").version(number).manifest


def test_first_version(first: Path) -> None:
    found = manifest(first, 1)
    assert found.kind == "first"
    assert found.parent is None
    assert found.classes == ["business", "sport"]
    assert found.records == {"train": 48, "held_out": 12, "quarantined": 0}
    assert {"model/model.safetensors", "learning/Replay/memory.json", "evaluation.json"} <= found.files.keys()
    assert not (first / "registry/staging").exists()
    assert updater(first).run() == Outcome(
        "nothing", "nothing to do: version 1 has learned every record that has arrived"
    )


def test_promoted_update_learns_a_new_class(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    outcome = updater(folder).run()
    assert (outcome.status, outcome.code, outcome.version) == ("promoted", 0, 2)
    found = manifest(folder, 2)
    assert (found.kind, found.parent, found.consumed) == ("update", 1, 2)
    assert found.classes == ["business", "sport", "politics"]
    assert [entry.name for entry in Registry(folder / "registry").version(2).slices()] == ["update-1", "update-2"]
    assert set(found.metrics.accuracy) == {"update-1", "update-2"}
    assert Registry(folder / "registry").verify() == []
    memory = remembered(folder / "registry/versions/2")
    assert memory is not None
    assert (len(memory), memory.settings["seen"]) == (30, 96)
    spent = found.seconds
    total = spent["plan"] + spent["train"] + spent["evaluate"]
    assert sum(spent[part] for part in PARTS) == pytest.approx(total)
    assert min(spent[part] for part in PARTS) > 0
    assert spent["evaluation"] >= spent["evaluate"]
    assert outcome.seconds["training"] == spent["training"]


def test_trigger_decides(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    outcome = updater(folder, trigger=Volume(100)).run()
    assert outcome.status == "nothing"
    assert outcome.words == "60 records are pending: 60 new records (100 asked for)"
    feed(folder, "c", ["politics", "sport"], n=40)
    outcome = updater(folder, trigger=Volume(100)).run()
    assert (outcome.status, manifest(folder, 2).reason) == ("promoted", "100 new records (100 asked for)")


def test_refused_update_keeps_its_records_and_is_not_repeated(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    refused = updater(folder, gate=lenient_gate(**REFUSE)).run()
    assert (refused.status, refused.code) == ("refused", 4)
    assert refused.words.startswith("version 2 is refused: ")
    assert Registry(folder / "registry").aliases == {"production": 1, "refused": 2}
    again = updater(folder, gate=lenient_gate(**REFUSE)).run()
    assert again.status == "nothing"
    assert again.words.startswith("60 records are pending, and an update was tried on all of them, last at ")
    feed(folder, "c", ["politics", "sport"], n=20)
    outcome = updater(folder).run()
    assert (outcome.status, outcome.version) == ("promoted", 3)
    assert manifest(folder, 3).records == {"train": 64, "held_out": 16, "quarantined": 0}
    assert manifest(folder, 3).parent == 1


def test_rebuild_after_refusals(folder: Path) -> None:
    for part in ("b", "c"):
        feed(folder, part, ["politics", "sport"], n=40)
        assert updater(folder, gate=lenient_gate(**REFUSE)).run().status == "refused"
    feed(folder, "d", ["politics", "business"], n=40)
    settings = UpdateSettings(checkpoint_every_n_steps=4, rebuild_after=2)
    outcome = updater(folder, settings=settings).run()
    assert outcome.status == "promoted"
    found = manifest(folder, 4)
    assert (found.kind, found.parent) == ("rebuild", 1)
    assert found.classes == ["business", "sport", "politics"]
    memory = remembered(folder / "registry/versions/4")
    assert memory is not None
    assert memory.settings["seen"] == found.records["train"] + 30  # what is pending, and all that was remembered


def test_what_was_lost_long_ago_counts_until_it_is_accepted(folder: Path) -> None:
    """Version 2 is promoted by a gate that looks away; version 3 is no worse, but far from version 1, which is gone."""
    feed(folder, "b", ["business", "sport"], n=200)
    lines = [json.loads(line) for line in (folder / "inbox/b.jsonl").read_text().splitlines()]
    turned = [{**line, "label": "sport" if line["label"] == "business" else "business"} for line in lines]
    (folder / "inbox/b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in turned))
    settings = {"gate": lenient_gate(alpha=0.4), "trainer": {"callbacks": [Replay(memory_size=30, id="id")]}}
    assert updater(folder, **settings).run().status == "promoted"
    before, after = (manifest(folder, number).metrics.accuracy["update-1"] for number in (1, 2))
    assert before is not None and after is not None and before - after > 0.3
    stored = json.loads((folder / "registry/versions/2/evaluation.json").read_bytes())
    assert {name: one["version"] for name, one in stored["best"].items()} == {"update-1": 1}
    shutil.rmtree(folder / "registry/versions/1")

    feed(folder, "c", ["politics"], n=40)
    strict = {**settings, "gate": lenient_gate(alpha=0.4, max_total_forgetting=0.05)}
    refused = updater(folder, **strict).run()
    assert refused.status == "refused"
    assert "the best so far, version 1, on " in refused.words
    accepting = {**settings, "gate": lenient_gate(alpha=0.4, max_total_forgetting=0.05, accepted={"update-1": 2})}
    outcome = updater(folder, **accepting, config={"accepted": 2}).run()
    assert outcome.status == "promoted" and outcome.verdict is not None
    assert [check.slice for check in outcome.verdict.checks if check.name == "accepted"] == ["update-1"]
    stored = json.loads((folder / "registry/versions/4/evaluation.json").read_bytes())
    assert {name: one["version"] for name, one in stored["best"].items()} == {"update-1": 2, "update-2": 2}


def test_remembered_records_show_a_class_of_which_few_are_held_out(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    outcome = updater(folder, gate=lenient_gate(max_class_drop=0.3)).run()
    assert outcome.verdict is not None
    classes = {check.slice: check for check in outcome.verdict.checks if check.name == "class"}
    assert set(classes) == {"business", "sport"}
    assert "of them trained on)" in classes["business"].words


def test_bad_data_stop_an_update_before_training(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60, n_bad=20)
    outcome = updater(folder).run()
    assert (outcome.status, outcome.code) == ("stopped", 5)
    assert "20 of 80 records do not fit the schema" in outcome.words
    assert production(folder) == 1
    assert updater(folder).run().status == "nothing"
    feed(folder, "c", ["politics", "sport"], n=200)
    assert updater(folder).run().status == "promoted"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (RecordSchema(id="id", time="when"), "has no time zone"),
        (RecordSchema(id="id", label="lable"), "field 'lable' is missing; did you mean 'label'?"),
        (RecordSchema(id="id", text="body"), "field 'body' is missing; the record has 'text', 'when' instead"),
    ],
)
def test_all_records_bad_stop_the_run_although_nothing_is_due(
    folder: Path, schema: RecordSchema, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("b", "c"):
        rows = [{"id": f"{part}{i}", "text": "a", "label": "sport", "when": "2026-01-01T00:00"} for i in range(30)]
        (folder / f"inbox/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        n = 30 if part == "b" else 60
        outcome = updater(folder, schema=schema).run()
        assert (outcome.status, outcome.code) == ("stopped", 5)
        assert f"{n} of {n} records do not fit the schema" in outcome.words
        assert f"{n} of {n} records went to quarantine: field" in outcome.words
        assert reason in outcome.words
        assert f"evertune quarantine list --registry {folder / 'registry'}" in outcome.words
        assert "30 of 30 records went to quarantine" in caplog.text
        caplog.clear()
    again = updater(folder, schema=schema).run()
    assert again.status == "nothing"
    assert "60 of 60 records went to quarantine" in again.words


def test_mended_schema_brings_the_records_back(folder: Path) -> None:
    rows = [{"id": f"b{i}", "text": "the team goal", "label": "sport", "when": "2026-01-01T00:00"} for i in range(30)]
    (folder / "inbox/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "x", "text": "a"}]))
    assert updater(folder, schema=RecordSchema(id="id", time="when")).run().code == 5
    live = updater(folder, schema=RecordSchema(id="id", time="when", time_zone="UTC"), config={"mended": True})
    released, reasons = live.retry()
    assert len(released) == 30
    assert list(reasons.values()) == ["field 'label' is missing; field 'when' is missing"]
    assert live.situation().n_new == 30
    outcome = live.run()
    assert outcome.status == "promoted"
    assert "1 of 31 records went to quarantine" in outcome.words
    assert manifest(folder, 2).records["train"] + manifest(folder, 2).records["held_out"] == 30
    assert [row["id"] for row in live.journal.quarantined()] == ["x"]
    assert live.retry() == ([], reasons)


def test_old_record_does_not_come_back_over_a_newer_one(folder: Path) -> None:
    (folder / "inbox/b.jsonl").write_text(json.dumps({"id": "b-0", "text": "a"}) + "\n")
    live = updater(folder)
    live.intake()
    (folder / "inbox/c.jsonl").write_text(json.dumps({"id": "b-0", "text": "the newer", "label": "sport"}) + "\n")
    live.intake()
    released, reasons = updater(
        folder, schema=RecordSchema(id="id", fields={"id": "str", "text": "str", "label": "str"})
    ).retry()
    assert (released, list(reasons.values())) == ([], ["superseded by c.jsonl:1"])
    with pytest.raises(ValueError, match="there is no 000009:1 in quarantine"):
        live.retry(["000009:1"])


def test_batch_that_was_refused_twice_does_not_block_those_behind_it(folder: Path) -> None:
    for part in ("b", "c"):
        feed(folder, part, ["politics", "sport"], n=40)
        assert updater(folder, gate=lenient_gate(**REFUSE)).run().status == "refused"
    live = updater(folder)
    outcome = live.run()  # although nothing is new
    assert (outcome.status, outcome.version) == ("promoted", 4)
    assert "40 of 80 records went to quarantine: refused twice, in versions 2 and 3: " in outcome.words
    assert manifest(folder, 4).records == {"train": 32, "held_out": 8, "quarantined": 0}
    quarantined = live.journal.quarantined()
    assert {row["id"] for row in quarantined} == {f"b-{number}" for number in range(40)}
    assert updater(folder).run().status == "nothing"
    released, _ = live.retry()
    assert len(released) == 40
    assert updater(folder).run().status == "promoted"
    assert manifest(folder, 5).records["train"] == 32


def test_settings_that_are_tried_in_turn_do_not_count_as_refused_twice(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=40)
    for number in range(2):
        assert updater(folder, gate=lenient_gate(**REFUSE), config={"try": number}).run().status == "refused"
    assert updater(folder, config={"try": 2}).run().status == "promoted"
    assert manifest(folder, 4).records["train"] == 32


def test_labels_that_look_like_one_class_are_named_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": "1", "text": "a", "label": "Sport"}, {"id": "2", "text": "b", "label": "law"}]
    (folder / "inbox/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    live = updater(folder)
    assert list(live.intake().labels) == ["Sport", "law"]
    (folder / "inbox/c.jsonl").write_text(json.dumps({"id": "3", "text": "c", "label": "Law "}) + "\n")
    live.intake()
    live.intake()
    words = [record.getMessage() for record in caplog.records if "different classes" in record.getMessage()]
    assert len(words) == 2
    assert "'sport' and 'Sport'" in words[0]
    assert "'law' and 'Law '" in words[1]


def test_dry_run_publishes_nothing_and_is_gone_on_with(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    outcome = updater(folder).run(dry_run=True)
    assert outcome.words.startswith("dry run: version 2 would be promoted")
    assert outcome.seconds["training"] > 0
    assert [version.number for version in Registry(folder / "registry").versions()] == [1]
    weights = (folder / "registry/staging/version/model/model.safetensors").read_bytes()
    assert updater(folder).run().status == "promoted"
    assert (folder / "registry/versions/2/model/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("place", ["work_dir", "staging"])
def test_a_staging_folder_behind_a_link_is_emptied(folder: Path, place: str) -> None:
    """What an update under other settings has left there is not published as the next one's."""
    (folder / "scratch").mkdir()
    link = folder / "work" if place == "work_dir" else folder / "registry/staging"
    empty(link)
    link.symlink_to(folder / "scratch")
    work_dir = link if place == "work_dir" else None
    feed(folder, "b", ["business", "sport"], n=40)
    assert updater(folder, config={"lr": 1}, work_dir=work_dir).run(dry_run=True).status == "promoted"
    old = (folder / "scratch/version/model/model.safetensors").read_bytes()
    feed(folder, "c", ["politics", "sport"], n=60)
    assert updater(folder, config={"lr": 2}, work_dir=work_dir).run().status == "promoted"
    assert link.is_symlink()
    assert list((folder / "scratch").iterdir()) == []
    assert manifest(folder, 2).classes == ["business", "sport", "politics"]
    assert (folder / "registry/versions/2/model/model.safetensors").read_bytes() != old


def test_a_staging_folder_that_cannot_be_emptied_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(folder, "b", ["business", "sport"], n=40)
    updater(folder, config={"lr": 1}).run(dry_run=True)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "staging")

    monkeypatch.setattr("evertune.utils.files.shutil.rmtree", fail)
    with pytest.raises(OSError, match="Input/output error"):
        updater(folder, config={"lr": 2}).run()
    monkeypatch.undo()
    assert updater(folder, config={"lr": 2}).run().status == "promoted"


def test_results_of_another_plan_are_never_taken(folder: Path) -> None:
    """Weights, checkpoints and verdict carry the plan that they belong to."""
    feed(folder, "b", ["business", "sport"], n=40)
    updater(folder, config={"lr": 1}).run(dry_run=True)
    staging = folder / "registry/staging"
    old = (staging / "version/model/model.safetensors").read_bytes()
    feed(folder, "c", ["politics", "sport"], n=60)
    (staging / "plan.json").unlink()
    left = folder / "left"
    shutil.copytree(staging, left)
    later = updater(folder, config={"lr": 2})
    with later.registry.lease():
        assert isinstance(later._planner.plan(), PlannedUpdate)
    shutil.copytree(left, staging, dirs_exist_ok=True)
    assert later.run().status == "promoted"
    assert manifest(folder, 2).classes == ["business", "sport", "politics"]
    assert (folder / "registry/versions/2/model/model.safetensors").read_bytes() != old


def test_rollback_gives_the_records_back(folder: Path) -> None:
    weights = (folder / "registry/versions/1/model/model.safetensors").read_bytes()
    feed(folder, "b", ["politics", "sport"], n=60)
    updater(folder).run()
    registry = Registry(folder / "registry")
    assert registry.rollback("worse").number == 1
    assert (registry.version("production").folder() / "model/model.safetensors").read_bytes() == weights
    assert updater(folder).situation().n_pending == 60
    assert updater(folder).run().status == "nothing"  # the same records would give the same version
    feed(folder, "c", ["politics", "sport"], n=20)
    assert updater(folder).run().version == 3
    assert manifest(folder, 3).records["train"] == 64


def test_rollback_can_give_the_records_up(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    updater(folder).run()
    Registry(folder / "registry").rollback("poisoned", discard=True)
    feed(folder, "c", ["politics", "sport"], n=40)
    assert updater(folder).run().version == 3
    assert sum(manifest(folder, 3).records.values()) == 40
    quarantined = updater(folder).journal.quarantined()
    assert {row["reason"] for row in quarantined} == {"learned by version 2, which was rolled back"}
    assert len(quarantined) == 60


def test_newer_record_with_the_same_id_wins(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    correction = {"id": "b-0", "text": "the law of the party", "label": "sport"}
    live = updater(folder)
    live.intake()
    (folder / "inbox/c.jsonl").write_text(json.dumps(correction) + "\n")
    outcome = live.run()
    assert outcome.status == "promoted"
    assert manifest(folder, 2).records["quarantined"] == 1
    assert [row["id"] for row in live.journal.quarantined()] == ["b-0"]


def test_other_settings_are_another_attempt(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    assert updater(folder, gate=lenient_gate(**REFUSE), config={"a": 1}).run().status == "refused"
    assert updater(folder, config={"a": 1}).run().status == "nothing"
    assert updater(folder, config={"a": 2}).run().status == "promoted"


def test_masked_before_anything_is_stored(folder: Path) -> None:
    rows = [{"id": str(i), "text": f"the bank of anna.k{i}@example.org", "label": "business"} for i in range(30)]
    rows.append({"id": "x", "text": 5, "label": "mail me: anna.k77@example.org"})
    (folder / "inbox/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert updater(folder, masker=PatternMasker()).run().status == "promoted"
    for path in (folder / "registry").rglob("*"):
        assert not path.is_file() or b"anna.k" not in path.read_bytes(), path


def test_late_labels(folder: Path) -> None:
    texts = [{"id": f"t{i}", "text": "the party law vote"} for i in range(30)]
    (folder / "inbox/b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    join = {"label_join": LabelJoin(id="id", window=1_000)}
    assert updater(folder, **join).run().words == (
        "nothing to do: version 1 has learned every record that has arrived; 30 texts are waiting for their labels"
    )
    labels = [{"id": f"t{i}", "label": "politics"} for i in range(30)]
    (folder / "inbox/c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    assert updater(folder, **join).run().status == "promoted"
    assert manifest(folder, 2).records == {"train": 24, "held_out": 6, "quarantined": 0}


def test_source_that_is_gone_changes_nothing(folder: Path) -> None:
    (folder / "inbox").rename(folder / "elsewhere")
    with pytest.raises(SourceError, match="inbox"):
        updater(folder).run()
    assert production(folder) == 1
    (folder / "elsewhere").rename(folder / "inbox")
    feed(folder, "b", ["politics", "sport"], n=60)
    assert updater(folder).run().status == "promoted"


def test_reading_on_from_another_offset(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    read = folder / "inbox/a.jsonl"
    lines = read.read_text()
    read.unlink()
    read.write_text(lines.replace("a", "e"))  # what has been read must not change
    live = updater(folder)
    with pytest.raises(SourceError, match=r"a\.jsonl"):
        live.run()
    offset = live.journal.offset(live.journal.last)
    assert offset is not None
    del offset["files"]["a.jsonl"]
    read.unlink()
    live.read_on_from(offset)
    assert live.run().status == "promoted"
    assert manifest(folder, 2).records == {"train": 48, "held_out": 12, "quarantined": 0}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evaluation.json", "does not match its sha256"),
        ("model/evertune.json", "does not match its sha256"),
        ("learning/Replay/memory.json", "does not match its sha256"),
        ("learning/EWC/added.json", "is not in its manifest"),
        ("learning/Replay/memory.json", "is missing"),
    ],
)
def test_production_is_verified_before_anything_is_learned_from_it(folder: Path, name: str, words: str) -> None:
    path = folder / "registry/versions/1" / name
    if words == "is missing":
        path.unlink()
    else:
        path.write_bytes((path.read_bytes() if path.exists() else b"{}") + b" ")  # valid JSON still
    feed(folder, "b", ["politics", "sport"], n=60)
    with pytest.raises(RegistryError, match=f"version 1 of .* is damaged: {name} {words}"):
        updater(folder).run()
    assert production(folder) == 1
    assert not (folder / "registry/versions/2").exists()


def test_production_is_verified_once_in_an_update(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    verify = Version.verified_folder

    def counted(version: Version) -> Path:
        hashed.append(version.number)
        return verify(version)

    monkeypatch.setattr(Version, "verified_folder", counted)
    feed(folder, "b", ["politics", "sport"], n=60)
    assert updater(folder).run().status == "promoted"
    assert hashed == [1]


def test_the_records_of_an_update_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(folder, "b", ["business", "sport"], n=40)
    read = Counter[str]()
    usual = Store.read

    def counting(store: Store, name: str) -> bytes:
        read[name] += 1
        return usual(store, name)

    monkeypatch.setattr(Store, "read", counting)
    assert updater(folder).run().status == "promoted"
    del read[INDEX]  # lists the slices, and holds no records
    rows = {name: n for name, n in read.items() if name.startswith(("pending/0", "slices/")) and name.endswith("l")}
    assert len(rows) == 2 and set(rows.values()) == {1}, rows


def test_one_updater_at_a_time(folder: Path) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    with Registry(folder / "registry").lease("somebody else"), pytest.raises(LeaseHeld, match="somebody else"):
        updater(folder).run()
    assert production(folder) == 1


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "evertune_deepspeed_stage_2"])
def test_ranks_of_a_launcher_update_together(folder: Path, strategy: str) -> None:
    feed(folder, "b", ["politics", "sport"], n=60)
    settings = {"trainer": {"strategy": strategy, "devices": 2}, "data": {"batch_size": 4, "max_length": 16}}
    outcomes = run_ranks("tests.helpers.live_worker:run", 2, folder=str(folder), **settings)
    assert [outcome["status"] for outcome in outcomes] == ["promoted", "trained"]
    assert Registry(folder / "registry").verify() == []
    assert manifest(folder, 2).records == {"train": 48, "held_out": 12, "quarantined": 0}
    outcomes = run_ranks("tests.helpers.live_worker:run", 2, folder=str(folder), **settings)
    assert [outcome["status"] for outcome in outcomes] == ["nothing", "trained"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)  # weights may still be mapped


def test_full_disk_changes_nothing(folder: Path, small_disk: Path) -> None:
    """The disk is full at first, then has a little more room each time: production stands until there is enough."""
    shutil.copytree(folder / "registry", small_disk / "registry")
    feed(folder, "b", ["politics", "sport"], n=60)
    filler, failures = small_disk / "filler", 0
    room = 4_096
    while True:
        free = shutil.disk_usage(small_disk).free + (filler.stat().st_size if filler.exists() else 0)
        filler.write_bytes(b"x" * max(free - room, 0))
        live = updater(folder, registry=small_disk / "registry")
        try:
            outcome = live.run()
        except OSError as error:
            failures += 1
            assert "disk is full" in str(error) or "No space left" in str(error)
            standing = live.registry.production
            assert standing is not None
            assert standing.number == 1
            assert live.registry.verify("production") == []
            room *= 2
            continue
        break
    assert outcome.status == "promoted"
    assert failures > 2
    assert live.registry.verify() == []
    assert manifest_of(live) == {"train": 48, "held_out": 12, "quarantined": 0}


def manifest_of(live: Updater) -> dict[str, int]:
    version = live.registry.production
    assert version is not None
    return version.manifest.records


def test_settings_are_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match="holdout must be between 0 and 1, got 1\\.5"):
        UpdateSettings(holdout=1.5)
    with pytest.raises(ValueError, match="max_records must be positive, got 0"):
        UpdateSettings(max_records=0)
    with pytest.raises(ValueError, match="needs the field that holds them"):
        updater(folder, schema=RecordSchema(label=None))
    with pytest.raises(ValueError, match="data must not set seed, task: an update takes them"):
        updater(folder, data={"batch_size": 8, "task": None, "seed": 1})
    with pytest.raises(ValueError, match="is not on this machine: pass work_dir"):
        updater(folder, registry="memory://far/away")


def test_gate_of_its_own_refuses_flipped_labels(folder: Path) -> None:
    """The gate as it is, not the lenient one: half of the labels are of another class."""
    torch.manual_seed(0)  # else what tests before it have drawn decides how well a few steps learn
    feed(folder, "b", ["business", "sport"], n=400)
    outcome = updater(folder, gate=Gate()).run()
    assert outcome.status == "promoted", outcome.words
    feed(folder, "c", ["business", "sport"], n=400)
    lines = [json.loads(line) for line in (folder / "inbox/c.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        if number % 10 in (0, 3, 5):
            line["label"] = "sport" if line["label"] == "business" else "business"
    (folder / "inbox/c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = updater(folder, gate=Gate()).run()
    assert outcome.status == "refused", outcome.words
    assert production(folder) == 2
