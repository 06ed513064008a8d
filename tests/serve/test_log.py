"""The request log: masked, complete, and the loop that it closes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from evertune.registry.registry import Registry
from evertune.serve import LimitSettings, LogSettings, RequestLog, Service, TrafficSettings, application
from evertune.serve.log import share_of
from evertune.sources import LabelJoin, PatternMasker, RequestLogSource
from tests.helpers.lightning_modules import TEXTS
from tests.helpers.live_worker import feed, prepare, updater
from tests.helpers.served import Echo, echoes


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    Echo.gate.set()
    return echoes(tmp_path, ["old", "new"])


@contextmanager
def client(registry: Any, path: Path | None, **settings: Any) -> Iterator[TestClient]:
    log = {name: settings.pop(name) for name in ("share", "keep_days", "max_bytes") if name in settings}
    made = None if path is None else RequestLog(LogSettings(path=str(path), **log), settings.pop("masker", None))
    service = Service(registry, log=made, **{"module_class": Echo, "poll": 0.02, **settings})
    with TestClient(application(service), "http://localhost", raise_server_exceptions=False) as http:
        yield http


def lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for file in sorted(path.glob("*.jsonl")):
        with suppress(FileNotFoundError):  # an old one that has just been deleted
            found += [json.loads(line) for line in file.read_text().splitlines()]
    return found


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def test_requests_answers_and_labels_are_logged_masked(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "requests"
    with client(registry, path) as http:
        records = [{"text": "write to ann@example.com", "id": "ann@example.com"}, {"text": ["a", "+49 30 901820"]}]
        answers = http.post("/predict", json={"records": records}).json()["answers"]
        taken = http.post("/feedback", json={"id": "ann@example.com", "label": "of bob@example.com"})
        assert (taken.status_code, taken.json()) == (202, {"accepted": 1, "ignored": 0})
        several = {"feedback": [{"id": answers[1]["id"], "label": "x"}] * 2}
        assert http.post("/feedback", json=several).json()["accepted"] == 2
        page = http.get("/metrics").text
    first, second, label, *_ = lines(path)
    assert first["text"] == "write to <EMAIL>" and second["text"] == ["a", "<PHONE>"]
    assert (first["kind"], first["label"], first["version"], first["role"]) == ("request", "old", 1, "production")
    assert first["id"] == label["id"] and first["id"].startswith("masked-")
    assert (label["kind"], label["label"]) == ("feedback", "of <EMAIL>")
    whole = "".join(file.read_text() for file in path.iterdir())
    assert "example.com" not in whole and "901820" not in whole
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}
    assert "evertune_serve_log_lines_total" in page


class Broken(PatternMasker):
    def mask(self, text: str) -> str:
        if "secret" in text:
            raise RuntimeError(f"cannot mask {text}")
        return super().mask(text)


def test_what_cannot_be_masked_is_not_written(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with client(registry, tmp_path / "requests", masker=Broken()) as http, caplog.at_level(logging.DEBUG):
        for text in ("a secret", "fine"):
            assert http.post("/predict", json={"text": text}).status_code == 200
    assert [line["text"] for line in lines(tmp_path / "requests")] == ["fine"]
    assert "a secret" not in caplog.text and "RuntimeError" in caplog.text


def test_a_log_that_cannot_be_written_stops_no_request(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "requests"
    with client(registry, path, max_bytes=1) as http:
        path.rmdir()  # as if the disk had gone
        for _ in range(3):
            assert http.post("/predict", json={"text": "a"}).status_code == 200
            time.sleep(0.05)
        failed = 'evertune_serve_log_lines_total{result="failed"} 3.0'
        until(lambda: failed in http.get("/metrics").text)
        path.mkdir()
        http.post("/predict", json={"text": "b"})
    assert [line["text"] for line in lines(path)] == ["b"]
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1


def test_a_share_is_chosen_by_id_so_that_labels_follow(registry: Registry, tmp_path: Path) -> None:
    ids = [f"t-{n}" for n in range(200)]
    with client(registry, tmp_path / "requests", share=0.25) as http:
        http.post("/predict", json={"records": [{"text": "a", "id": id} for id in ids]})
        taken = http.post("/feedback", json={"feedback": [{"id": id, "label": "x"} for id in ids]}).json()
    logged = {
        kind: {line["id"] for line in lines(tmp_path / "requests") if line["kind"] == kind}
        for kind in ("request", "feedback")
    }
    assert logged["request"] == logged["feedback"] and 25 < taken["accepted"] == len(logged["request"]) < 75
    assert taken["accepted"] + taken["ignored"] == 200


def test_files_have_an_end_and_old_ones_are_deleted(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "requests"
    path.mkdir()
    (path / "2020.jsonl").write_text("{}")
    import os

    os.utime(path / "2020.jsonl", (0, 0))
    with client(registry, path, max_bytes=1, keep_days=30) as http:
        for n in range(3):
            http.post("/predict", json={"text": str(n)})
            until(lambda: len(lines(path)) > n)  # noqa: B023
    assert [line["text"] for line in lines(path)] == ["0", "1", "2"]
    assert len(list(path.iterdir())) == 3


def test_without_a_log_no_labels_are_taken(registry: Registry) -> None:
    with client(registry, None) as http:
        answer = http.post("/feedback", json={"id": "a", "label": "x"})
        assert answer.status_code == 404 and "keeps no log" in answer.json()["error"]
        assert http.post("/feedback", json={"id": "a"}).status_code == 422


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, "share must be between 0 and 1, got 0"),
        ({"keep_days": -1}, "keep_days must be positive, got -1"),
        ({"max_bytes": 0}, "max_bytes must be positive, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogSettings(**settings)


# --- several versions


def test_a_canary_answers_its_share_and_production_the_rest(registry: Registry) -> None:
    ids = [f"t-{n}" for n in range(100)]
    with client(registry, None, traffic=TrafficSettings(canary="2", canary_share=0.3)) as http:
        until(lambda: http.get("/ready").json()["canary"]["version"] == 2)
        versions = {id: http.post("/predict", json={"text": "a", "id": id}).json()["version"] for id in ids}
        page = http.get("/metrics").text
    assert versions == {id: 2 if share_of(id, "canary") < 0.3 else 1 for id in ids}
    n_canary = sum(version == 2 for version in versions.values())
    assert 15 < n_canary < 45
    assert f'evertune_serve_answers_total{{label="new",role="canary"}} {float(n_canary)}' in page


class Fragile(Echo):
    def predict(self, texts: Any, /) -> Any:
        if self.label == "new" and "a text" not in texts:
            raise RuntimeError("not today")
        return super().predict(texts)


def test_who_the_canary_or_the_shadow_fails_gets_the_answer_of_production(registry: Registry) -> None:
    traffic = TrafficSettings(canary="2", canary_share=1.0, shadow="2")
    with client(registry, None, module_class=Fragile, traffic=traffic) as http:
        until(lambda: http.get("/ready").json()["shadow"]["version"] == 2)
        for _ in range(5):
            answer = http.post("/predict", json={"text": "a"})
            assert (answer.status_code, answer.json()["version"]) == (200, 1)
        until(lambda: 'evertune_serve_shadow_total{result="failed"} 5.0' in http.get("/metrics").text)
        assert 'evertune_serve_canary_failures_total{error="RuntimeError"} 5.0' in http.get("/metrics").text


def test_a_shadow_answers_nobody_and_is_compared(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "requests"
    with client(registry, path, traffic=TrafficSettings(shadow="refused")) as http:
        ready = http.get("/ready")
        assert ready.status_code == 200 and "no refused version" in ready.json()["shadow"]["problem"]
        assert http.post("/predict", json={"text": "early"}).json()["label"] == "old"
        registry.set_refused(2)
        until(lambda: http.get("/ready").json()["shadow"]["version"] == 2)
        for n in range(4):
            assert http.post("/predict", json={"text": "a", "id": str(n)}).json()["label"] == "old"
        until(lambda: 'evertune_serve_shadow_total{result="differs"} 4.0' in http.get("/metrics").text)
    shadows = [line for line in lines(path) if line["kind"] == "shadow"]
    assert {(line["id"], line["label"], line["version"]) for line in shadows} == {(str(n), "new", 2) for n in range(4)}
    assert all("text" not in line for line in shadows)
    assert [record.value["text"] for record in RequestLogSource(str(path)).read(None, 100).records if record.value] == [
        "early",
        "a",
        "a",
        "a",
        "a",
    ]


# --- the loop


def test_the_server_learns_from_its_own_requests(tmp_path: Path) -> None:
    """Serve, get labels, update, promote; and the server answers with the new version, which knows the new class."""
    prepare(tmp_path)
    feed(tmp_path, "begin", ["business", "sport"], n=60)
    inbox = tmp_path / "inbox"
    settings = {"source": RequestLogSource(str(inbox)), "label_join": LabelJoin(window=1_000)}
    assert updater(tmp_path, **settings).run().status == "promoted"
    limits = LimitSettings(max_records=100)
    with client(str(tmp_path / "registry"), inbox, module_class=None, device="cpu", limits=limits) as http:
        texts = TEXTS["politics"] * 12
        answers = http.post("/predict", json={"records": [{"text": text} for text in texts]}).json()["answers"]
        assert {answer["version"] for answer in answers} == {1}
        assert "politics" not in answers[0]["probabilities"]
        wrong = http.post("/feedback", json={"id": "x", "label": ["politics"]})
        assert wrong.status_code == 422 and "one label is expected" in wrong.json()["error"]
        labels = [{"id": answer["id"], "label": "politics"} for answer in answers[:-2]]
        assert http.post("/feedback", json={"feedback": labels}).json()["accepted"] == len(labels)
        until(lambda: len(lines(inbox)) == 60 + len(answers) + len(labels))
        outcome = updater(tmp_path, **settings).run()
        assert (outcome.status, outcome.version) == ("promoted", 2), outcome.words
        until(lambda: http.get("/ready").json()["production"]["version"] == 2)
        answer = http.post("/predict", json={"text": TEXTS["politics"][0]}).json()
    assert (answer["version"], answer["label"]) == (2, "politics")
    manifest = Registry(tmp_path / "registry").version(2).manifest
    assert manifest.records["train"] + manifest.records["held_out"] == len(labels)
