"""Students that follow each promoted update, in a registry of their own: made, refused, caught up, rolled back."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from evertune.cli.check import check
from evertune.cli.distil import distil
from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.erasure import erase
from evertune.live.settings import StudentSettings
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.registry.registry import Registry
from tests.cli.test_update import CONFIG
from tests.helpers.live_worker import feed, updater
from tests.helpers.processes import Command

PATIENCE = 120.0  # for a busy machine
_REPORTED = '"student": 2'
_EVENTS = ("promotion", "refusal", "error")


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    target = tmp_path / "live"
    shutil.copytree(first, target)
    return target


def follow(folder: Path, **changes: Any) -> Updater:
    """An updater whose students have a registry beside its own."""
    students = {"layers": 1, "epochs": 1, "registry": str(folder / "students"), **changes.pop("student", {})}
    return updater(folder, student=StudentSettings(**students), **changes)


def test_a_student_follows_each_promoted_update(folder: Path) -> None:
    live = follow(folder, student={"gate": {"max_forgetting": 1.0}})
    assert live.due() == "version 1 has no student yet"
    outcome = live.run()
    assert (outcome.status, outcome.code, outcome.student and outcome.student.version) == ("nothing", 0, 1)
    teachers, students = Registry(folder / "registry"), Registry(folder / "students")
    assert (teachers.aliases, students.aliases) == ({"production": 1}, {"production": 1})
    found = students.version(1).manifest
    assert (found.teacher, found.parent, found.kind, found.experience) == (1, None, "distillation", "student-of-1")
    assert found.config["student"]["gate"] == {"max_forgetting": 1.0}
    assert live.due() is None and live.run().student is None
    feed(folder, "b", ["politics", "sport"], n=60)
    outcome = live.run()
    assert (outcome.status, outcome.code, outcome.student and outcome.student.version) == ("promoted", 0, 2)
    assert outcome.student is not None and "student of version 2: version 2 of " in outcome.student.words
    assert "student" not in teachers.version(2).manifest.config  # other students do not make it another update
    found = students.version(2).manifest
    assert (found.teacher, found.parent, found.classes) == (2, 1, ["business", "sport", "politics"])
    assert students.verify() == []
    assert [entry.name for entry in students.version(2).slices()] == ["update-1", "update-2"]
    checks = {check["name"] for check in json.loads(students.version(2).read("verdict.json"))["checks"]}
    assert {"forgetting", "forgetting, version 1"} <= checks  # against its teacher, and the student before
    erased = erase(students, ["a-0", "b-0"])
    assert set(erased.found) <= {"slices", "memory", "predictions"} and erased.found
    assert students.verify() == []
    module = SequenceClassificationModule.from_pretrained(folder / "students/versions/2/model")
    assert module.backbone.config.num_hidden_layers == 1


def test_a_student_that_is_refused_leaves_the_one_that_is_served(folder: Path) -> None:
    assert follow(folder).run().code == 0
    feed(folder, "b", ["politics", "sport"], n=60)
    strict = {"gate": {"min_accuracy": 1.0}, "strength": 0.5}
    outcome = follow(folder, student=strict).run()
    assert (outcome.status, outcome.code) == ("promoted", 4)
    students = Registry(folder / "students")
    assert students.aliases == {"production": 1, "refused": 2}
    assert outcome.student is not None and "version 2 of " in outcome.student.words, outcome.student
    assert "is refused: on 'all slices'" in outcome.student.words
    live = follow(folder, student=strict)
    assert live.due() is None  # it would be refused again
    assert follow(folder).due() == "version 2 has no student yet"  # under other settings it may pass


def test_a_kill_between_teacher_and_student_is_made_up_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, students = follow(folder), Registry(folder / "students")
    for place in ("evertune.live.distilling.judge", "evertune.live.students.Students._settle"):
        with monkeypatch.context() as patched:
            patched.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                live.run()
        assert students.production is None
    assert [version.number for version in students.versions()] == [1]
    assert live.due() == f"version 1 of {folder / 'students'}, its student, is not in production yet"
    monkeypatch.setattr("evertune.live.distilling.train", killed)  # it is trained and published already
    outcome = live.run()
    assert outcome.student is not None and (outcome.student.status, outcome.student.version) == ("promoted", 1)
    assert students.aliases == {"production": 1}


def killed(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


def test_students_follow_a_rollback_of_the_teacher_and_obey_their_own(folder: Path) -> None:
    live = follow(folder)
    live.run()
    feed(folder, "b", ["politics", "sport"], n=60)
    live.run()
    teachers, students = Registry(folder / "registry"), Registry(folder / "students")
    assert students.aliases == {"production": 2, "previous": 1}
    time.sleep(1.1)  # the events tell seconds
    students.rollback()
    assert live.due() is None
    students.promote(2)
    time.sleep(1.1)
    teachers.rollback()
    updates = follow(folder, trigger=Volume(1000))  # what version 2 has learned is pending again
    assert updates.due() == f"version 1 of {folder / 'students'}, its student, is not in production yet"
    outcome = updates.run()
    assert outcome.student is not None and outcome.student.status == "promoted"
    assert students.aliases == {"production": 1, "previous": 2}


def test_students_that_cannot_follow_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="need a registry of their own"):
        updater(folder, student=StudentSettings(layers=1))
    with pytest.raises(ValueError, match="the registry of the teacher"):
        follow(folder, student={"registry": str(folder / "registry")})
    with pytest.raises(ValueError, match="the gate has no setting max_forgeting"):
        follow(folder, student={"gate": {"max_forgeting": 0.1}})
    monkeypatch.setattr("evertune.live.update.started_together", lambda: True)
    with pytest.raises(ValueError, match="a student is trained by one process"):
        follow(folder)


def test_the_commands_know_the_students(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "live.yaml").write_text(f"{CONFIG}student: {{registry: students, layers: 1, epochs: 1}}\n")
    monkeypatch.chdir(folder)
    assert check(["--config", "live.yaml"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "an update is due: version 1 has no student yet" in said
    assert "student ok: 0.0 million parameters; " in said and "students: no version yet" in said
    assert check(["--config", "live.yaml", "--student.layers", "2"]) == 1
    assert "FAILED: a student has at least one layer, and fewer than the 2 of its teacher" in capsys.readouterr().out
    assert check(["--config", "live.yaml", "--student.prune_heads", "0.2"]) == 1
    assert "FAILED: heads=0.2 removes 0 of the 2 heads of a layer" in capsys.readouterr().out
    assert distil(["--config", "live.yaml"]) == 0
    assert "student of version 1: version 1 of " in capsys.readouterr().out
    assert distil(["--config", "live.yaml", "--dry_run"]) == 1
    assert "leave student.registry out" in capsys.readouterr().err
    assert Registry("students").aliases == {"production": 1} and Registry("registry").aliases == {"production": 1}


def test_the_watch_reports_a_student_that_is_refused_and_the_old_one_stays(folder: Path) -> None:
    assert follow(folder).run().code == 0
    student = "{registry: students, layers: 1, epochs: 1, gate: {min_accuracy: 1.0}}"
    (folder / "live.yaml").write_text(CONFIG.replace("watch: {poll: 5}", f"watch: {{poll: 0.2}}\nstudent: {student}"))
    feed(folder, "b", ["politics", "sport"], n=60)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["-m", "evertune", "watch", "--config", "live.yaml", "--watch.log", "json"]
    watch = Command(folder, *arguments, environment=environment)
    try:
        end = time.monotonic() + PATIENCE
        while _REPORTED not in watch.errors and watch.process.is_alive() and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        watch.process.terminate()
    done = watch.wait(60)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    told = [(line["event"], line["message"].partition(":")[0]) for line in lines if line["event"] in _EVENTS]
    assert told == [("promotion", "a new version is in production"), ("refusal", "student of version 2")]
    students = Registry(folder / "students")
    assert students.aliases == {"production": 1, "refused": 2}
    assert Registry(folder / "registry").aliases == {"production": 2, "previous": 1}
