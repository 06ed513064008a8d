"""The service: real processes, real signals, a real lease, and a small updater in place of one that trains."""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evertune.cli.update import updater_from
from evertune.cli.watch import watch as watch_command
from evertune.live.alerts import Alert, Webhook
from evertune.live.telemetry import log_to
from evertune.live.triggers import Drift, Situation, Volume
from evertune.live.watch import Watch, WatchSettings, _drifting, _understood
from evertune.registry.lease import LeaseHeld
from evertune.registry.manifest import Manifest, Metrics, VerdictSummary
from evertune.registry.registry import Registry
from evertune.sources.base import SourceError

LIVE = Path(__file__).resolve().parents[2] / "examples" / "live"
WORKER = Path(__file__).resolve().parents[1] / "helpers" / "watch_worker.py"
FAST = {"poll": 0.05, "max_backoff": 0.2, "grace": 20.0}
PATIENCE = 120.0  # for a busy machine


class SmallUpdater:
    """Records are lines of FOLDER/arrived; ``gone``, ``broken`` and ``block`` in the folder make it fail so."""

    def __init__(self, root: Path, trigger: Any = None) -> None:
        self.root = root
        self.registry = Registry(root / "registry")
        self.trigger = trigger or Volume(3)
        self.students = SimpleNamespace(registry=Registry(root / "students")) if (root / "students").exists() else None
        self.read = 0

    def lines(self, name: str) -> int:
        path = self.root / name
        return len(path.read_text().splitlines()) if path.exists() else 0

    def intake(self) -> Any:
        if (self.root / "gone").exists():
            raise SourceError("redis://feed:hunter2@broker:6379 does not answer")
        while (self.root / "block").exists():
            time.sleep(0.01)
        (self.root / "journal").write_text("taken in")  # the test may lead it to a full disk
        before, self.read = self.read, self.lines("arrived")
        bad = self.lines("bad") if self.read > before else 0
        words = f"{bad} of {self.read} records went to quarantine: no text" if bad else ""
        return SimpleNamespace(read=self.read - before, bad=bad, words=words)

    def situation(self) -> Situation:
        pending = self.lines("arrived") - self.lines("learned")
        return Situation(
            records=list,
            n_pending=pending,
            n_new=self.lines("arrived") - self.lines("attempted"),
            production=self.registry.production,
            memory_texts=list,
            last_update=None,
            now=datetime.now(UTC),
        )

    def due(self) -> str | None:
        if (self.root / "broken").exists():
            raise RuntimeError("the trigger is broken")
        return "an update was interrupted" if (self.root / "plan").exists() else self.trigger.reason(self.situation())


class FileAlert(Alert):
    """Appends to a file what it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def send(self, event: str, text: str, **facts: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "text": text, **facts}) + "\n")


class BrokenAlert(Alert):
    def send(self, event: str, text: str, **facts: Any) -> None:
        raise RuntimeError("no alert today")


class Running:
    """A watch in a process of its own."""

    def __init__(self, root: Path, trigger: Any = None, **settings: Any) -> None:
        self.root = root
        self.log = root / f"log-{len(list(root.glob('log-*')))}"
        self.log.touch()
        settings = {**FAST, "port": 0, "alerts": [BrokenAlert(), FileAlert(root / "alerts")], **settings}
        self.process: BaseProcess = multiprocessing.get_context("fork").Process(
            target=self._serve, args=(trigger, WatchSettings(**settings))
        )
        self.process.start()

    def _serve(self, trigger: Any, settings: WatchSettings) -> None:
        with self.log.open("w") as stream:
            log_to(stream, as_json=True)
            updater = SmallUpdater(self.root, trigger)
            code = Watch(updater, [sys.executable, str(WORKER), str(self.root)], settings).run()
        os._exit(code)

    @property
    def lines(self) -> list[dict[str, Any]]:
        content = self.log.read_text()
        return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]

    def until(self, name: str, n: int = 1) -> list[dict[str, Any]]:
        """Wait for the n-th event of this name."""
        until(lambda: len(self.events(name)) >= n, lambda: f"no {name!r} in {self.log.read_text()}")
        return self.events(name)

    def get(self, path: str) -> tuple[int, str]:
        port = self.until("serving")[0]["port"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        status, text = self.get("/metrics")
        assert status == 200
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self) -> int | None:
        self.process.join(PATIENCE)
        return self.process.exitcode


def until(condition: Callable[[], bool], why: Callable[[], str] = lambda: "it never happened") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.01)


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def root(tmp_path: Path) -> Path:
    arrives(tmp_path, 1)
    mode(tmp_path, "promote")
    (tmp_path / "version").mkdir()
    registry = Registry(tmp_path / "registry")
    metrics = Metrics({"sports": 0.875}, 0.875)
    manifest = Manifest(version=7, verdict=VerdictSummary(True, "sports got better"), metrics=metrics)
    registry.promote(registry.publish(tmp_path / "version", manifest).number)
    return tmp_path


@pytest.fixture
def watch(root: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(**settings: Any) -> Running:
        started.append(Running(root, **settings))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.join()
    pids = (root / "starts").read_text().split() if (root / "starts").exists() else []
    for pid in filter(runs, pids):
        os.killpg(int(pid), signal.SIGKILL)


def arrives(root: Path, n: int) -> None:
    with (root / "arrived").open("a") as file:
        file.write("record\n" * n)


def mode(root: Path, name: str) -> None:
    draft = root / "mode.tmp"
    draft.write_text(name)
    draft.replace(root / "mode")


def alerts(root: Path) -> list[dict[str, Any]]:
    path = root / "alerts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def told(root: Path, event: str, n: int = 1) -> dict[str, Any]:
    """Wait for the n-th alert of an event."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [alert for alert in alerts(root) if alert["event"] == event]
        return len(found) >= n

    until(look, lambda: f"no alert {event!r} in {alerts(root)}")
    return found[n - 1]


def test_an_update_runs_when_it_is_due_and_the_service_goes_on(watch: Callable[..., Running], root: Path) -> None:
    running = watch()
    until(lambda: running.metric("evertune_pending_records") == 1)
    assert running.events("intake") and not running.events("update")
    arrives(root, 2)
    assert running.until("update")[0]["reason"] == "3 new records (3 asked for)"
    first = running.until("promotion")[0]
    assert first["outcome"] == "promoted" and first["version"] == 7 and first["seconds"] >= 0
    assert [line["message"] for line in running.events("output")] == ["updating é promote"]
    (verdict,) = running.events("verdict")
    assert verdict["passed"] and [check["slice"] for check in verdict["checks"]] == ["sports"]
    assert running.metric('evertune_gate_value{check="accuracy",of="new",slice="sports"}') == 0.95
    assert running.metric("evertune_production_accuracy") == 0.875
    arrives(root, 5)
    running.until("promotion", 2)
    until(lambda: running.metric("evertune_pending_records") == 0)
    assert running.metric('evertune_updates_total{outcome="promoted"}') == 2
    assert running.metric("evertune_update_seconds_count") == 2
    assert running.metric("evertune_read_records_total") == 8
    assert running.metric("evertune_production_version") == 7
    assert running.metric("evertune_updating") == 0 and running.metric("evertune_healthy") == 1
    status, text = running.get("/healthz")
    assert status == 200
    health = json.loads(text)
    assert all(isinstance(value, float | int) for value in health.pop("readings").values())
    assert health == {
        "healthy": True,
        "why": [],
        "production": 7,
        "pending": 0,
        "updating": False,
        "source": "ok",
    }
    assert {"time", "level", "event", "message"} <= set.intersection(*(set(line) for line in running.lines))
    assert told(root, "promotion")["registry"] == str(root / "registry")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_idle_ends_it_and_gives_the_lease_back(
    watch: Callable[..., Running], root: Path, number: int
) -> None:
    running = watch(poll=600)
    running.until("intake")
    running.signal(number)
    assert running.ended() == 0
    with Registry(root / "registry").lease("the next") as lease:
        lease.check()
    assert running.events("ended")


def test_a_signal_ends_it_while_the_source_blocks(watch: Callable[..., Running], root: Path) -> None:
    (root / "block").touch()
    running = watch()
    until(lambda: running.get("/healthz")[0] == 503)
    assert "the loop has stood still for" in running.get("/healthz")[1]
    assert running.metric("evertune_healthy") == 0
    running.signal(signal.SIGTERM)
    assert running.ended() == 0


def test_it_is_healthy_again_when_the_loop_turns_again(watch: Callable[..., Running], root: Path) -> None:
    (root / "block").touch()
    running = watch()
    until(lambda: running.get("/healthz")[0] == 503)
    (root / "block").unlink()
    until(lambda: running.get("/healthz")[0] == 200)


def test_a_refused_update_is_told_and_not_repeated(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "refuse")
    arrives(root, 2)
    running = watch()
    assert told(root, "refusal")["text"] == "the new version was refused: sports got better"
    turns = running.metric("evertune_read_records_total")
    arrives(root, 1)
    until(lambda: running.metric("evertune_read_records_total") > turns)
    assert running.metric('evertune_updates_total{outcome="refused"}') == 1
    assert running.metric("evertune_pending_records") == 4 and running.metric("evertune_new_records") == 1
    assert (root / "starts").read_text().count("\n") == 1
    assert running.get("/healthz")[0] == 200


def test_records_that_were_all_tried_are_named_once(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "refuse")
    arrives(root, 2)
    running = watch()
    (waiting,) = running.until("waiting")
    assert waiting["message"].startswith("3 records are pending, and an update was tried on all of them")
    turns = running.metric("evertune_read_records_total")
    arrives(root, 1)
    until(lambda: running.metric("evertune_read_records_total") > turns)
    assert len(running.events("waiting")) == 1


def test_old_versions_are_deleted_after_a_promotion(watch: Callable[..., Running], root: Path) -> None:
    registry = Registry(root / "registry")
    for number in (8, 9, 10):
        (root / "version").mkdir()
        registry.promote(registry.publish(root / "version", Manifest(version=number)).number)
    arrives(root, 2)
    running = watch(retention=1)
    (deleted,) = running.until("gc")
    assert deleted["deleted"] == ["versions/7", "versions/8"], "production and previous stay"
    assert [version.number for version in registry.versions()] == [9, 10]


def test_a_student_is_reported_and_old_ones_are_deleted(watch: Callable[..., Running], root: Path) -> None:
    students = Registry(root / "students")
    for number in (1, 2, 3):
        (root / "version").mkdir()
        students.promote(students.publish(root / "version", Manifest(version=number)).number)
    mode(root, "student")
    arrives(root, 2)
    running = watch(retention=1)
    promotion = told(root, "promotion")
    assert (promotion["text"], promotion["student"]) == ("student of version 7: it is in production", 3)
    assert running.until("gc")[0]["deleted"] == ["versions/1"]
    assert not running.events("updated"), "it has found something to do"


def test_an_update_stopped_before_training_says_why(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "stop")
    arrives(root, 2)
    watch()
    alert = told(root, "refusal")
    assert alert["outcome"] == "stopped"
    assert alert["text"] == "the update was stopped before training: updating é stop"


def test_an_update_that_dies_is_tried_again_until_it_works(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "die")
    arrives(root, 2)
    running = watch()
    first = told(root, "error")
    assert first["text"] == "the update was killed by signal 9 (Killed): updating é die"
    assert first["where"] == "update" and first["output"] == "updating é die"
    again = told(root, "error", 2)  # the last of three failures
    assert again["failures"] == 3
    assert running.until("update", 2)[1]["reason"] == "an update was interrupted"
    until(lambda: running.get("/healthz")[0] == 503)
    health = json.loads(running.get("/healthz")[1])
    assert health["why"][0].startswith("the last ") and health["why"][0].endswith(" updates failed")
    mode(root, "promote")
    assert "updating works again" in told(root, "recovery")["text"]
    assert running.get("/healthz")[0] == 200
    failures = running.metric('evertune_updates_total{outcome="error"}')
    assert failures >= 3 and failures == running.metric('evertune_errors_total{where="update"}')


@pytest.mark.parametrize(
    "line",
    [
        "plain",
        "{",
        "[" * 100_000,
        "{" * 100_000,
        "{}",
        '{"event": "x", "level": "info"}',
        '{"time": 1, "message": "m"}',
    ],
)
def test_other_output_is_a_line_of_text(line: str) -> None:
    assert _understood(line) == (logging.INFO, line, {"event": "output"})


@pytest.mark.parametrize(
    ("level", "number"), [("warning", logging.WARNING), ("getLogger", logging.INFO), (3, logging.INFO)]
)
def test_a_log_line_keeps_its_level_and_fields(level: Any, number: int) -> None:
    line = json.dumps({"event": "verdict", "level": level, "message": "m", "name": "clashes", "checks": [1]})
    assert _understood(line) == (number, "m", {"event": "verdict", "checks": [1]})


def test_a_preempted_update_is_started_again_and_is_no_error(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "preempt")
    arrives(root, 2)
    running = watch()
    assert {event["outcome"] for event in running.until("updated", 4)} == {"interrupted"}
    mode(root, "promote")
    told(root, "promotion")
    assert not running.events("error")
    assert [alert["event"] for alert in alerts(root)] == ["promotion"]


def test_pauses_between_failures_grow_to_the_limit(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "fail")
    arrives(root, 2)
    (root / "plan").touch()
    running = watch(poll=0.02, max_backoff=0.1)
    (root / "broken").touch()
    errors = running.until("error", 5)
    pauses = [line["pause"] for line in errors if line["where"] == "watch"]
    assert pauses[:4] == [0.02, 0.04, 0.08, 0.1]
    (root / "broken").unlink()


def test_a_due_update_that_finds_nothing_to_do_is_no_error(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "nothing")
    arrives(root, 2)
    running = watch()
    assert running.until("updated")[0]["outcome"] == "nothing"
    mode(root, "promote")
    arrives(root, 3)
    told(root, "promotion")
    assert [alert["event"] for alert in alerts(root)] == ["promotion"]


def test_a_source_that_is_gone_is_told_once_and_told_when_it_is_back(watch: Callable[..., Running], root: Path) -> None:
    (root / "gone").touch()
    running = watch(max_errors=1_000)
    assert told(root, "error")["where"] == "source"
    running.until("error", 3)
    assert running.metric("evertune_source_up") == 0
    status, text = running.get("/healthz")
    assert status == 200
    assert json.loads(text)["source"] == "the source cannot be read: redis://feed:***@broker:6379 does not answer"
    (root / "gone").unlink()
    assert told(root, "recovery")["text"].startswith("taking records in works again, after ")
    assert running.metric("evertune_source_up") == 1
    arrives(root, 2)
    running.until("promotion")
    assert [alert["event"] for alert in alerts(root)][:2] == ["error", "recovery"]
    assert "hunter2" not in running.log.read_text() + (root / "alerts").read_text()


def test_pending_records_are_learnt_while_the_source_is_gone(watch: Callable[..., Running], root: Path) -> None:
    (root / "gone").touch()
    arrives(root, 2)
    watch().until("promotion")


def test_a_full_disk_is_survived(watch: Callable[..., Running], root: Path) -> None:
    (root / "journal").symlink_to("/dev/full")
    running = watch()
    alert = told(root, "error")
    assert alert["where"] == "storage" and "No space left on device" in alert["text"]
    assert running.metric("evertune_source_up") == 1
    (root / "journal").unlink()
    told(root, "recovery")
    arrives(root, 2)
    running.until("promotion")


def test_an_error_that_nobody_foresaw_is_told_with_its_traceback(watch: Callable[..., Running], root: Path) -> None:
    (root / "broken").touch()
    running = watch()
    error = running.until("error")[0]
    assert "RuntimeError: the trigger is broken" in error["message"] and "Traceback" in error["traceback"]
    (root / "broken").unlink()
    arrives(root, 2)
    running.until("promotion")


def test_too_many_bad_records_are_told_once(watch: Callable[..., Running], root: Path) -> None:
    (root / "bad").write_text("bad\n" * 3)
    arrives(root, 29)
    mode(root, "refuse")
    running = watch()
    alert = told(root, "quarantine")
    assert (alert["bad"], alert["read"]) == (3, 30)
    assert alert["text"].endswith("records since the last update are bad. 3 of 30 records went to quarantine: no text")
    running.until("refusal")
    assert running.metric("evertune_quarantined_records_total") == 3
    assert [alert["event"] for alert in alerts(root)].count("quarantine") == 1


class Drifting(Drift):
    def reason(self, situation: Situation) -> str | None:
        self.readings = {"drift_score": 0.5, "drift_threshold": 0.1 if situation.n_new >= 3 else 0.9}
        self.explanation = "drift: score 0.5 above 0.1 at record 3"
        return self.explanation if situation.n_new >= 3 else None


def test_drift_is_told_and_shown(watch: Callable[..., Running], root: Path) -> None:
    running = watch(trigger=Drifting())
    running.until("intake")
    until(lambda: "evertune_drift_score 0.5" in running.get("/metrics")[1])
    assert running.metric("evertune_drift_threshold") == 0.9
    assert not alerts(root)
    arrives(root, 2)
    assert told(root, "drift")["text"] == "drift: score 0.5 above 0.1 at record 3"
    running.until("promotion")


def test_a_signal_reaches_the_update_which_saves_and_goes_on_at_the_next_start(
    watch: Callable[..., Running], root: Path
) -> None:
    mode(root, "save")
    arrives(root, 2)
    running = watch()
    until((root / "ready").exists)
    assert running.metric("evertune_updating") == 1
    running.signal(signal.SIGTERM)
    assert running.ended() == 0
    assert (root / "saved").exists()
    assert running.events("updated")[0]["outcome"] == "interrupted"
    assert not runs((root / "helper").read_text())
    assert not [alert for alert in alerts(root) if alert["event"] == "error"]
    mode(root, "promote")
    again = watch()
    assert again.until("update")[0]["reason"] == "an update was interrupted"
    again.until("promotion")


def test_an_update_that_does_not_end_is_killed_after_the_grace(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "ignore")
    arrives(root, 2)
    running = watch(grace=0.2)
    until((root / "ready").exists)
    running.signal(signal.SIGTERM)
    assert running.ended() == 0
    assert not runs((root / "starts").read_text().strip())
    until(lambda: not runs((root / "helper").read_text()))


def test_a_second_signal_kills_the_update_at_once(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "ignore")
    arrives(root, 2)
    running = watch(grace=3_600)
    until((root / "ready").exists)
    running.signal(signal.SIGTERM)
    time.sleep(0.2)
    assert runs((root / "starts").read_text().strip())
    running.signal(signal.SIGTERM)
    assert running.ended() == 0
    assert not runs((root / "starts").read_text().strip())


def test_an_update_ends_with_a_watch_that_is_killed(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "follow")
    arrives(root, 2)
    running = watch()
    until((root / "ready").exists)
    update, helper = (root / "starts").read_text().strip(), (root / "helper").read_text()
    assert runs(update) and runs(helper)
    running.signal(signal.SIGKILL)
    assert running.ended() == -signal.SIGKILL
    until(lambda: not runs(update) and not runs(helper))
    mode(root, "promote")
    watch().until("promotion")  # the lease of the dead is taken over at once


def test_a_second_watch_is_turned_away(watch: Callable[..., Running], root: Path) -> None:
    running = watch()
    running.until("intake")
    with pytest.raises(LeaseHeld, match=f"evertune watch \\(process {running.process.pid} on "):
        Watch(SmallUpdater(root), ["true"], WatchSettings(**FAST)).run()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    arrives(root, 2)
    running.until("promotion")


def test_a_lost_lease_ends_the_update_and_the_watch(watch: Callable[..., Running], root: Path) -> None:
    mode(root, "ignore")
    arrives(root, 2)
    running = watch()
    until((root / "ready").exists)
    store = Registry(root / "registry").store
    store.create("lease/2.json", json.dumps({"owner": "another", "token": "x", "released": False}).encode())
    assert running.ended() == 1
    assert "has lost its lease" in told(root, "error")["text"]
    assert not runs((root / "starts").read_text().strip())


def test_a_command_that_cannot_be_started_is_an_error_like_another(root: Path) -> None:
    arrives(root, 2)
    alert = FileAlert(root / "alerts")
    settings = WatchSettings(**FAST, alerts=[alert])
    process = multiprocessing.get_context("fork").Process(
        target=Watch(SmallUpdater(root), ["/nowhere/python"], settings).run
    )
    process.start()
    assert "could not be started: [Errno 2] No such file or directory" in told(root, "error")["text"]
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_a_port_that_is_taken_is_told_by_name(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            Watch(SmallUpdater(root), ["true"], WatchSettings(**FAST, port=port)).run()
    with Registry(root / "registry").lease("the next") as lease:
        lease.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poll": 0}, "poll must be positive, got 0"),
        ({"grace": -1}, "grace must not be negative, got -1"),
        ({"max_backoff": 0}, "max_backoff must be positive"),
        ({"max_errors": 0}, "max_errors must be positive"),
        ({"max_bad_share": 5}, "max_bad_share must be between 0 and 1, got 5"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WatchSettings(**settings)


def test_the_alerts_of_a_configuration_are_made_once_and_only_for_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inbox").mkdir()
    # As in a real configuration, which sets alerts by `class_path`; the example shows them commented out.
    config = (LIVE / "live.yaml").read_text().replace("  # alerts:", "  alerts:").replace("  #   ", "    ")
    (tmp_path / "live.yaml").write_text(config)
    arguments = ["--config", "live.yaml", "--watch.max_errors", "5"]
    monkeypatch.delenv("SLACK_WEBHOOK", raising=False)
    updater_from(arguments, "evertune update")  # needs no secret of the watch
    with pytest.raises(ValueError, match="the environment variable SLACK_WEBHOOK is not set"):
        updater_from(arguments, "evertune watch")
    monkeypatch.setenv("SLACK_WEBHOOK", "https://hooks.example/s3cret")
    updater, options = updater_from(arguments, "evertune watch")
    settings = options.watch
    assert (settings.poll, settings.port, settings.grace, settings.max_errors) == (5.0, 9090, 60.0, 5)
    assert [(type(alert), alert.host) for alert in settings.alerts] == [(Webhook, "hooks.example")]
    assert "drift" in settings.alerts[0].events and "promotion" not in settings.alerts[0].events
    assert "s3cret" not in json.dumps(updater.config)


@pytest.mark.parametrize("program", ["evertune update", "evertune watch"])
def test_a_misspelt_setting_of_the_watch_is_refused_by_every_command(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        updater_from(["--config", str(LIVE / "live.yaml"), "--watch", '{"pol": 5}'], program)
    assert end.value.code == 2 and "did you mean 'poll'?" in capsys.readouterr().err


# --- examples/live


def test_the_example_feeds_the_same_lines_however_often_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("feed", LIVE / "feed.py")
    assert spec is not None and spec.loader is not None
    feed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(feed)
    for limit in (["--limit", "300"], ["--limit", "700"], []):
        monkeypatch.setattr(sys, "argv", ["feed.py", "--out", str(tmp_path), "--tick", "0", *limit])
        feed.main()
    files = sorted(tmp_path.glob("*.jsonl"))
    written = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    assert written == list(feed.lines())
    records = [json.loads(line) for _, line in written if line not in feed.BROKEN]
    texts = {record["id"]: record["time"] for record in records if "text" in record}
    labels = {record["id"]: record["label"] for record in records if "label" in record}
    assert len(texts) == 2_225 and labels.keys() == texts.keys()
    assert sum("text" in record and "label" not in record for record in records) > 100
    topics = [labels[id] for id in sorted(texts, key=lambda id: texts[id])]
    first = {topic: topics.index(topic) for topic in feed.FIRST_MONTH}
    assert max(first["business"], first["sports"]) < 20
    assert first["politics"] > 100 and first["tech"] > 400 and first["entertainment"] > 800


def test_the_example_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    updater, options = updater_from(["--config", str(LIVE / "live.yaml"), "--watch.port", "0"], "evertune watch")
    assert options.watch == WatchSettings(poll=5, port=0)
    assert [type(trigger) for trigger in updater.trigger.triggers] == [Volume, Drift]
    (tmp_path / "inbox").mkdir()
    assert updater.due() is None
    again, _ = updater_from(["--config", str(LIVE / "live.yaml"), "--watch.poll", "1"], "evertune update")
    assert again.config == updater.config


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    """In a process of its own: it takes over all logs."""
    log = tmp_path / "log"

    def start() -> None:
        with log.open("w") as sys.stderr:
            code = watch_command(
                ["--config", str(LIVE / "live.yaml"), f"--registry={tmp_path}", "--watch", '{"poll": 0}']
            )
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 1
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["message"] == "evertune watch: poll must be positive, got 0.0" and last["level"] == "error"


@pytest.mark.parametrize(
    ("readings", "drifting"),
    [
        ({}, False),
        ({"drift_score": 2.0}, False),
        ({"drift_score": 2.0, "drift_threshold": 1.0}, True),
        ({"label_drift_score": 2.0, "label_drift_threshold": 3.0, "drift_score": 0.1, "drift_threshold": 1.0}, False),
        ({"accuracy": 0.8, "accuracy_loss": 0.1, "accuracy_loss_threshold": 0.05}, True),
    ],
)
def test_what_a_trigger_measures_is_told_when_it_is_above_its_limit(readings: dict[str, float], drifting: bool) -> None:
    assert _drifting(readings) is drifting
