"""The endpoints, in this process: answers, refusals, readiness, and versions that change."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from evertune.lightning_modules import SequenceClassificationModule
from evertune.registry.registry import Registry, RegistryError
from evertune.serve import BatchSettings, DriftSettings, LimitSettings, LogSettings, Service, application
from evertune.serve.log import RequestLog
from evertune.sources import RequestLogSource
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.served import Echo, echoes, publish

JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def open_gate() -> Iterator[None]:
    Echo.gate.set()
    yield
    Echo.gate.set()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return echoes(tmp_path, ["old", "new"])


@contextmanager
def client(registry: Registry | str, **settings: Any) -> Iterator[TestClient]:
    service = Service(registry, **{"module_class": Echo, "poll": 0.02, **settings})
    with TestClient(application(service), "http://localhost", raise_server_exceptions=False) as made:
        made.service = service  # type: ignore[attr-defined]
        yield made


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


# --- answers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, SequenceClassificationModule]:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    module = SequenceClassificationModule(tiny_bert(folder / "bert"), classes=["business", "sport", "politics"])
    module.configure_model()
    module.save_pretrained(folder / "saved")
    registry = Registry(folder / "registry")
    files = {file.name: file.read_bytes() for file in (folder / "saved").iterdir()}
    registry.promote(publish(registry, folder, files, "SequenceClassificationModule"))
    return registry, module


def test_one_record_and_several_get_the_answers_of_the_module(
    classifier: tuple[Registry, SequenceClassificationModule],
) -> None:
    registry, module = classifier
    texts = ["the bank share", "goal match of the team", "vote"]
    expected = module.predict(texts)
    with client(registry, module_class=None, device="cpu") as http:
        one = http.post("/predict", json={"text": texts[0], "id": "t-1", "top": 2})
        assert one.status_code == 200, one.text
        found = one.json()
        label, confidence = next(iter(expected[0].items()))
        assert (found["id"], found["label"], found["version"]) == ("t-1", label, 1)
        assert found["confidence"] == pytest.approx(confidence, abs=1e-6)
        assert list(found["probabilities"]) == list(expected[0])[:2]
        several = http.post("/predict", json={"records": [{"text": text} for text in texts]}).json()["answers"]
        for answer, probabilities in zip(several, expected, strict=True):
            assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-6)
            assert len(answer["id"]) == 32


def test_the_same_holds_for_several_labels_per_text(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = SequenceClassificationModule(tiny_bert(tmp_path / "bert"), classes=["a", "b", "c"], multi_label=True)
    module.configure_model()
    module.save_pretrained(tmp_path / "saved")
    registry = Registry(tmp_path / "registry")
    files = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    registry.promote(publish(registry, tmp_path, files, "SequenceClassificationModule"))
    (expected,) = module.predict(["vote"])
    with client(registry, module_class=None, device="cpu") as http:
        found = http.post("/predict", json={"text": "vote"}).json()
    assert found["label"] == [name for name, probability in expected.items() if probability > 0.5]
    whole = 1.0
    for probability in expected.values():
        whole *= max(probability, 1 - probability)
    assert found["confidence"] == pytest.approx(whole, abs=1e-5)


def test_pairs_of_texts(registry: Registry) -> None:
    with client(registry) as http:
        assert http.post("/predict", json={"text": ["a premise", "a hypothesis"]}).json()["label"] == "old"
        assert http.post("/predict", json={"text": ["only one"]}).status_code == 422


# --- refusals


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{", 400, "the body is not JSON"),
        ("", 400, "the body is not JSON"),
        ('{"text": "\\ud800"}', 400, "the body is not JSON"),
        ("[" * 100_000, 400, "the body is not JSON"),
        ("[]", 422, "does not fit"),
        ('"text"', 422, "does not fit"),
        ('{"text": 7}', 422, '"at":"text.'),
        ('{"text": ""}', 422, '"at":"text.'),
        ('{"txt": "a"}', 422, '{"at":"txt","problem":"Extra inputs are not permitted"}'),
        ('{"records": []}', 422, '"at":"records"'),
        ('{"records": [{"text": "a"}, {"text": null}]}', 422, '"at":"records.1.text.'),
        ('{"text": "a", "top": 0}', 422, '"at":"top"'),
        ('{"text": "a", "id": 3}', 422, '"at":"id"'),
        ('{"text": "empty"}', 422, "texts[0] has no tokens"),
        ('{"text": "' + "a" * 2_000 + '"}', 422, "it has 2,000 characters, more than 1,000"),
        (json.dumps({"records": [{"text": "a"}] * 9}), 422, "9 records, more than 8 in a request"),
    ],
)
def test_a_bad_body_is_refused_with_the_reason(registry: Registry, body: str, status: int, words: str) -> None:
    with client(registry, limits=LimitSettings(max_characters=1_000, max_records=8)) as http:
        answer = http.post("/predict", content=body, headers=JSON)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
        assert words in answer.text
        assert http.post("/predict", json={"text": "good"}).status_code == 200


def test_what_a_body_holds_is_not_repeated(registry: Registry) -> None:
    with client(registry) as http:
        answer = http.post("/predict", json={"text": {"secret": "hunter2"}})
    assert answer.status_code == 422 and "hunter2" not in answer.text


def test_other_paths_methods_media_types_and_hosts(registry: Registry) -> None:
    with client(registry) as http:
        assert http.get("/etc/passwd").json() == {"error": "Not Found", "problems": []}
        assert http.get("/predict").status_code == 405
        assert http.post("/predict", content='{"text": "a"}').status_code == 415
        assert http.post("/predict", content='{"text": "a"}', headers={"content-type": "text/plain"}).status_code == 415
        assert http.get("/health", headers={"host": "evil.example:8000"}).status_code == 421
        assert http.get("/health", headers={"host": "127.0.0.1:8000"}).status_code == 200
        assert http.get("/health", headers={"host": "[::1]"}).status_code == 200


def test_a_body_that_is_too_large_is_not_read(registry: Registry) -> None:
    with client(registry, limits=LimitSettings(max_body=100)) as http:
        assert http.post("/predict", json={"text": "a" * 200}).status_code == 413
        parts = (b" " * 60 for _ in range(1_000))
        assert http.post("/predict", content=parts, headers=JSON).status_code == 413  # no length is declared
        assert http.post("/predict", json={"text": "a"}).status_code == 200


def test_an_error_of_the_model_is_a_500_without_the_text_in_answer_and_log(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with client(registry) as http, caplog.at_level(logging.DEBUG):
        answer = http.post("/predict", json={"text": "boom"})
        assert (answer.status_code, answer.json()["error"]) == (500, "internal server error")
        assert http.post("/predict", json={"text": "fine"}).status_code == 200
    (failure,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "RuntimeError at predict" in failure
    assert "boom" not in caplog.text


# --- load


def test_back_pressure_and_timeouts_say_when_to_try_again(registry: Registry) -> None:
    limits = LimitSettings(timeout=0.3)
    with client(registry, limits=limits, batching=BatchSettings(max_queue=1)) as http, ThreadPoolExecutor() as pool:
        Echo.gate.clear()
        first = pool.submit(http.post, "/predict", json={"text": "wait"})
        batcher = http.service.production.batcher  # type: ignore[attr-defined]
        until(lambda: batcher.busy > 0)
        second = pool.submit(http.post, "/predict", json={"text": "later"})
        until(lambda: batcher.queued == 1)
        third = http.post("/predict", json={"text": "too many"})
        assert third.status_code == 429
        assert int(third.headers["retry-after"]) >= 1
        assert (first.result().status_code, second.result().status_code) == (503, 503)
        assert first.result().headers["retry-after"] == "1"
        Echo.gate.set()
        assert http.post("/predict", json={"text": "again"}).status_code == 200


def test_a_batch_that_never_ends_makes_the_process_unhealthy(registry: Registry) -> None:
    with client(registry, limits=LimitSettings(timeout=0.02)) as http:
        assert http.get("/health").json() == {"status": "ok"}
        Echo.gate.clear()
        http.post("/predict", json={"text": "wait"})
        until(lambda: http.get("/health").status_code == 503)
        assert "a batch has not ended for" in http.get("/health").json()["status"]
        Echo.gate.set()
        until(lambda: http.get("/health").status_code == 200)


# --- versions


def test_promotion_and_rollback_are_followed_and_no_request_is_dropped(registry: Registry) -> None:
    done = threading.Event()

    def ask(http: TestClient) -> list[tuple[int, str, int]]:
        found = []
        while not done.is_set():
            answer = http.post("/predict", json={"text": "a"})
            found.append((answer.status_code, answer.json()["label"], answer.json()["version"]))
        return found

    with client(registry) as http, ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask, http) for _ in range(4)]
        try:
            for _ in range(5):
                for change, number in ((lambda: registry.promote(2), 2), (registry.rollback, 1)):
                    change()
                    until(lambda: http.get("/ready").json()["production"]["version"] == number)  # noqa: B023
        finally:
            done.set()
        answers = {one for future in asking for one in future.result()}
    assert answers == {(200, "old", 1), (200, "new", 2)}


def test_a_version_that_cannot_be_loaded_changes_nothing_and_is_reported(registry: Registry, tmp_path: Path) -> None:
    bad = publish(registry, tmp_path, {"answer.json": b"{"})
    with client(registry) as http:
        registry.promote(bad)
        until(lambda: http.get("/ready").json()["production"]["problem"] is not None)
        ready = http.get("/ready")
        assert ready.status_code == 200 and "JSONDecodeError" in ready.json()["production"]["problem"]
        assert http.post("/predict", json={"text": "a"}).json()["version"] == 1


def test_it_can_wait_for_the_first_version(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match="holds no versions"), client(registry):
        pass
    with client(registry, wait=True) as http:
        assert http.get("/health").status_code == 200
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "waiting for a version")
        refused = http.post("/predict", json={"text": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        echoes(tmp_path, ["first"])
        until(lambda: http.get("/ready").status_code == 200)
        assert http.post("/predict", json={"text": "a"}).json()["label"] == "first"


def test_a_draining_server_answers_but_is_not_ready(registry: Registry) -> None:
    with client(registry) as http:
        http.service.draining = True  # type: ignore[attr-defined]
        assert http.get("/ready").status_code == 503
        answer = http.post("/predict", json={"text": "a"})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


class Reader(Echo):
    """Answers with entities, spans or texts, as tasks other than classification do."""

    def predict(self, texts: Any, /) -> Any:
        return [{"read": text, "by": self.label} for text in texts]


class Silent(Echo):
    def predict(self, texts: Any, /) -> Any:
        return "a story"


CONVERSATION = [{"role": "user", "content": "Mail ann@example.com, please"}, {"role": "assistant", "content": "Done"}]


@pytest.mark.parametrize(
    ("text", "read"),
    [("a", "a"), (["where?", "here"], ["where?", "here"]), (CONVERSATION, CONVERSATION)],
    ids=["text", "pair", "conversation"],
)
def test_other_tasks_answer_with_what_they_predict(registry: Registry, text: Any, read: Any, tmp_path: Path) -> None:
    with client(registry, module_class=Reader, log=RequestLog(LogSettings(path=str(tmp_path / "log")))) as http:
        found = http.post("/predict", json={"text": text, "id": "r-1"}).json()
        assert found == {"id": "r-1", "prediction": {"read": read, "by": "old"}, "version": 1}
        several = http.post("/predict", json={"records": [{"text": text}] * 2}).json()["answers"]
        assert [one["prediction"]["read"] for one in several] == [read] * 2
        assert (
            http.post("/feedback", json={"id": "r-1", "label": [{"start": 0, "end": 1, "label": "X"}]}).status_code
            == 202
        )
        assert "evertune_serve_answers_total{" in http.get("/metrics").text
    lines = [json.loads(line) for path in (tmp_path / "log").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert lines[0]["text"] == json.loads(json.dumps(read).replace("ann@example.com", "<EMAIL>"))
    assert lines[-1]["kind"] == "feedback" and lines[-1]["label"][0]["label"] == "X"
    pair = isinstance(read, list) and isinstance(read[0], str)
    source = RequestLogSource(str(tmp_path / "log"), text=["question", "context"] if pair else "text")
    first = source.read(None, 10).records[0].value
    assert first is not None
    assert lines[0]["text"] == ([first["question"], first["context"]] if pair else first["text"])


def test_conversations_are_checked(registry: Registry) -> None:
    with client(registry, module_class=Reader) as http:
        for wrong in (
            [{"role": "user"}],
            [],
            [{"role": "user", "content": ""}],
            [{"role": "user", "content": "a", "x": 1}],
        ):
            assert http.post("/predict", json={"text": wrong}).status_code == 422


def test_a_module_that_gives_no_answers_is_refused_by_name(registry: Registry) -> None:
    with (
        pytest.raises(TypeError, match=r"Silent cannot be served: its predict\(\) must return a list"),
        client(registry, module_class=Silent),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"Reader does not classify: leave drift\.arl out"),
        client(registry, module_class=Reader, drift=DriftSettings(arl=100_000, reference_size=2_000)),
    ):
        pass


# --- metrics and description


def test_metrics(registry: Registry) -> None:
    with client(registry) as http:
        http.post("/predict", json={"records": [{"text": "a"}, {"text": "b"}]})
        http.post("/predict", content="{", headers=JSON)
        http.get("/no/such/path")
        registry.promote(2)
        until(lambda: http.get("/ready").json()["production"]["version"] == 2)
        page = http.get("/metrics").text
    for line in (
        'evertune_serve_requests_total{endpoint="/predict",status="200"} 1.0',
        'evertune_serve_requests_total{endpoint="/predict",status="400"} 1.0',
        'evertune_serve_requests_total{endpoint="/other",status="404"} 1.0',
        'evertune_serve_request_seconds_count{endpoint="/predict"} 2.0',
        'evertune_serve_refused_total{reason="invalid"} 1.0',
        'evertune_serve_batch_size_sum{role="production"} 2.0',
        'evertune_serve_confidence_bucket{le="0.9",role="production"} 2.0',
        'evertune_serve_answers_total{label="old",role="production"} 2.0',
        'evertune_serve_version{role="production"} 2.0',
        'evertune_serve_swaps_total{role="production"} 1.0',
        'evertune_serve_queued_records{role="production"} 0.0',
    ):
        assert line in page.splitlines(), f"{line} is not in {page}"


def test_the_description_names_every_endpoint_and_its_schemas(registry: Registry) -> None:
    with client(registry) as http:
        described = http.get("/openapi.json").json()
        page = http.get("/docs")
    paths = {route.path for route in http.app.routes}  # type: ignore[attr-defined]
    assert set(described["paths"]) == paths
    references = {text.partition('"')[0] for text in json.dumps(described).split("#/components/schemas/")[1:]}
    assert references <= set(described["components"]["schemas"])
    assert "script" not in page.text and all(path in page.text for path in paths)
    assert "default-src 'none'" in page.headers["content-security-policy"]
