"""What is seen from outside: metrics, health and logs, and the alerts that go out; all over real HTTP."""

from __future__ import annotations

import io
import json
import logging
import math
import socket
import threading
import time
import urllib.error
import urllib.request
import warnings
from base64 import b64decode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from evertune.live.alerts import EVENTS, Webhook
from evertune.live.telemetry import Telemetry, log_to

PATIENCE = 60.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


# --- metrics and health


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry(stale_after=3_600, max_errors=2)
    yield made
    made.close()


def get(port: int, path: str, accept: str = "*/*") -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def samples(port: int) -> dict[str, float]:
    status, kind, text = get(port, "/metrics")
    assert status == 200 and kind.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            found[sample.name + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items())] = sample.value
    return found


def test_loggers_that_are_silent_stay_so(capfd: pytest.CaptureFixture[str]) -> None:
    silent, root = logging.Logger("silent"), logging.getLogger()
    silent.addHandler(logging.NullHandler())
    logging.root.manager.loggerDict["silent"] = silent
    before = list(root.handlers), root.level
    try:
        log_to(io.StringIO())
        silent.error("for nobody")
    finally:
        del logging.root.manager.loggerDict["silent"]
        logging.captureWarnings(False)
        root.handlers[:], root.level = before
    assert "for nobody" not in capfd.readouterr().err


def test_what_happened_is_what_prometheus_reads(telemetry: Telemetry) -> None:
    port = telemetry.serve(0)
    before = samples(port)
    assert before["evertune_production_version"] == 0 and before["evertune_source_up"] == 1
    assert "evertune_drift_score" not in before
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    telemetry.took_in(100, 4)
    telemetry.took_in(20, 1)
    telemetry.stands(7, 312, 12, moment)
    telemetry.measured({"drift_score": 0.03, "drift_threshold": 0.01})
    telemetry.measured({"drift_score": 0.02, "drift_threshold": 0.01})
    telemetry.serves(0.93)
    old = {"name": "old", "slice": "", "champion": 0.5, "challenger": 0.5, "limit": 0.5, "passed": True}
    telemetry.judged([old])
    drop = {"name": "drop", "slice": "update-1", "champion": 0.9, "challenger": 0.7, "limit": None, "passed": False}
    unsure = {"name": "class", "slice": "law", "champion": None, "challenger": None, "limit": None, "passed": None}
    telemetry.judged([drop, unsure, "not a check"])
    telemetry.updating(True)
    telemetry.updated("promoted", 42.0)
    telemetry.updated("refused", 3.0)
    telemetry.updated("promoted", 4_000.0)
    telemetry.failed("source", "it is gone")
    now = samples(port)
    expected = {
        "evertune_production_version": 7,
        "evertune_production_accuracy": 0.93,
        "evertune_gate_value{check=drop}{of=production}{slice=update-1}": 0.9,
        "evertune_gate_value{check=drop}{of=new}{slice=update-1}": 0.7,
        "evertune_gate_passed{check=drop}{slice=update-1}": 0,
        "evertune_pending_records": 312,
        "evertune_new_records": 12,
        "evertune_read_records_total": 120,
        "evertune_quarantined_records_total": 5,
        "evertune_last_update_timestamp": moment.timestamp(),
        "evertune_drift_score": 0.02,
        "evertune_drift_threshold": 0.01,
        "evertune_updating": 1,
        "evertune_updates_total{outcome=promoted}": 2,
        "evertune_updates_total{outcome=refused}": 1,
        "evertune_update_seconds_count": 3,
        "evertune_update_seconds_sum": 4_045.0,
        "evertune_update_seconds_bucket{le=60.0}": 2,
        "evertune_errors_total{where=source}": 1,
        "evertune_source_up": 0,
        "evertune_healthy": 1,
    }
    assert {name: now[name] for name in expected} == expected
    assert sum(name.startswith("evertune_gate_") for name in now) == 4, "values of an earlier verdict are still there"
    assert math.isnan(now["evertune_gate_passed{check=class}{slice=law}"])
    telemetry.recovered("source")
    assert samples(port)["evertune_source_up"] == 1


def test_two_services_in_a_process_do_not_share_metrics() -> None:
    first, second = Telemetry(10), Telemetry(10)
    first.took_in(5, 0)
    assert first.registry.get_sample_value("evertune_read_records_total") == 5
    assert second.registry.get_sample_value("evertune_read_records_total") == 0


def test_failures_in_a_row_make_it_unhealthy_until_one_update_ends_well(telemetry: Telemetry) -> None:
    port = telemetry.serve(0)
    telemetry.updated("error", 1.0)
    telemetry.updated("refused", 1.0)
    telemetry.updated("error", 1.0)
    telemetry.updated("interrupted", 1.0)
    assert get(port, "/healthz")[0] == 200
    telemetry.updated("error", 1.0)
    status, kind, text = get(port, "/healthz")
    assert (status, kind) == (503, "application/json")
    assert json.loads(text)["healthy"] is False
    assert json.loads(text)["why"] == ["the last 2 updates failed"]
    assert samples(port)["evertune_healthy"] == 0
    telemetry.updated("refused", 1.0)
    assert get(port, "/healthz")[0] == 200


def test_a_loop_that_stands_still_is_unhealthy() -> None:
    telemetry = Telemetry(stale_after=0.05)
    until(lambda: not telemetry.health["healthy"])
    assert telemetry.health["why"][0].startswith("the loop has stood still for ")
    telemetry.stale_after = 3_600
    telemetry.beat()
    assert telemetry.health["healthy"]


def test_openmetrics_and_unknown_paths(telemetry: Telemetry) -> None:
    port = telemetry.serve(0)
    status, kind, text = get(port, "/metrics?x=1", accept="application/openmetrics-text")
    assert status == 200 and kind.startswith("application/openmetrics-text") and text.endswith("# EOF\n")
    assert get(port, "/")[0] == 404


def test_a_client_that_hangs_up_or_says_nothing_stops_no_other(
    telemetry: Telemetry, capfd: pytest.CaptureFixture[str]
) -> None:
    port = telemetry.serve(0)
    with socket.create_connection(("127.0.0.1", port)):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as rude:
                rude.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert get(port, "/healthz")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_the_port_is_free_again_after_closing() -> None:
    telemetry = Telemetry(10)
    port = telemetry.serve(0)
    telemetry.close()
    again = Telemetry(10)
    assert again.serve(port) == port
    again.close()


# --- logs


@pytest.fixture
def restored_logging() -> Iterator[None]:
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("restored_logging")
def test_logs_are_one_json_object_a_line() -> None:
    stream, own = io.StringIO(), io.StringIO()
    chatty = logging.getLogger("chatty")
    chatty.addHandler(logging.StreamHandler(own))
    chatty.setLevel(logging.INFO)
    chatty.propagate = False
    logging.captureWarnings(False)  # an earlier test in this process may have left it half undone
    log_to(stream)
    chatty.info("not shown")
    assert not own.getvalue()
    logger = logging.getLogger("evertune.live")
    logger.info("update %d\nstarts", 7, extra={"event": "update", "version": 7, "when": datetime(2026, 1, 1)})
    logger.debug("not shown")
    logging.getLogger("another").info("not shown")
    logging.getLogger("another").warning("é from redis://a:secret@b/0")
    try:
        raise OSError("amqp://u:secret@h")
    except OSError:
        logger.exception("failed", extra={"event": "error"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    first, other, failed, warned = (json.loads(line) for line in stream.getvalue().splitlines())
    assert datetime.fromisoformat(first.pop("time")).tzinfo == UTC
    assert first == {
        "level": "info",
        "event": "update",
        "message": "update 7\nstarts",
        "version": 7,
        "when": "2026-01-01 00:00:00",
    }
    assert (other["event"], other["level"], other["message"]) == ("another", "warning", "é from redis://a:***@b/0")
    assert "Traceback" in failed["traceback"]
    assert "careful" in warned["message"]
    assert "secret" not in stream.getvalue()


@pytest.mark.usefixtures("restored_logging")
def test_people_get_words() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    log_to(terminal)
    logging.getLogger("evertune.live").warning("an update was refused (http://a:secret@b)", extra={"event": "refusal"})
    assert terminal.getvalue().endswith(" WARNING an update was refused (http://a:***@b)\n")
    stream = io.StringIO()
    log_to(stream, as_json=False)
    logging.getLogger("evertune.live").info("words")
    assert stream.getvalue().endswith("INFO    words\n")
    assert len(logging.getLogger().handlers) == 1


# --- alerts


class Receiver:
    """A server that answers as the test says, and keeps what arrived."""

    def __init__(self) -> None:
        self.answers: list[int | str] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.release = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((self.path, dict(self.headers), json.loads(body)))
                answer = receiver.answers.pop(0) if receiver.answers else 200
                if answer == "hang":
                    receiver.release.wait(PATIENCE)
                    return
                self.send_response(int(answer))
                if answer == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hooks/s3cret"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def texts(self) -> list[str]:
        return [body["text"] for _, _, body in self.requests]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.release.set()
    made.server.shutdown()
    made.server.server_close()


def test_an_alert_arrives_as_json_with_its_headers(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", receiver.url)
    monkeypatch.setenv("TOKEN", "t0ken")
    hook = Webhook("${HOOK}", headers={"Authorization": "Bearer ${TOKEN}"})
    hook.send("refusal", "version 8 was refused é", registry="registry", version=8)
    hook.send("promotion", "nobody asked")
    hook.close(PATIENCE)
    assert len(receiver.requests) == 1
    path, headers, body = receiver.requests[0]
    assert path == "/hooks/s3cret"
    assert headers["Authorization"] == "Bearer t0ken" and headers["Content-Type"] == "application/json"
    assert datetime.fromisoformat(body.pop("time")).tzinfo == UTC
    assert body == {"event": "refusal", "text": "version 8 was refused é", "registry": "registry", "version": 8}


def test_a_receiver_that_fails_twice_gets_it_the_third_time_and_in_order(receiver: Receiver) -> None:
    receiver.answers = [500, 429]
    hook = Webhook(receiver.url, pause=0.01)
    hook.send("drift", "one")
    hook.send("error", "two")
    until(lambda: len(receiver.requests) == 4)
    assert receiver.texts == ["one", "one", "one", "two"]
    hook.close()


@pytest.mark.parametrize(("answer", "tries"), [(403, 1), (302, 1), (503, 3)])
def test_what_is_not_delivered_is_dropped_and_logged_without_the_secret(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, answer: int, tries: int
) -> None:
    receiver.answers = [answer] * tries
    hook = Webhook(receiver.url, pause=0.01, retries=2)
    hook.send("drift", "one")
    hook.send("drift", "two")
    until(lambda: "two" in receiver.texts)
    assert receiver.texts == ["one"] * tries + ["two"]
    assert f"alert to 127.0.0.1 is dropped: HTTP {answer}" in caplog.text
    assert "s3cret" not in caplog.text
    hook.close()


def test_a_receiver_that_hangs_delays_nothing(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.answers = ["hang"]
    hook = Webhook(receiver.url, timeout=0.1, retries=0)
    hook.send("error", "one")
    hook.send("error", "two")
    until(lambda: "two" in receiver.texts)
    assert "is dropped: TimeoutError" in caplog.text
    receiver.answers = ["hang"]
    hook = Webhook(receiver.url, timeout=3_600)
    hook.send("error", "three")
    until(lambda: "three" in receiver.texts)
    for n in range(200):  # more than wait in the queue
        hook.send("error", f"more {n}")
    assert "100 others are waiting" in caplog.text
    start = time.monotonic()
    hook.close(timeout=0.1)
    assert time.monotonic() - start < PATIENCE


def test_a_receiver_that_is_gone_is_tried_until_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hook = Webhook(f"http://127.0.0.1:{port}/s3cret", pause=0.01, retries=2)
    hook.send("error", "one")
    until(lambda: "alert to 127.0.0.1 is dropped: ConnectionRefusedError" in caplog.text)
    assert "s3cret" not in caplog.text
    hook.close()


def test_closing_delivers_what_waits_and_tries_nothing_again(receiver: Receiver) -> None:
    receiver.answers = [500]
    hook = Webhook(receiver.url, pause=3_600)
    hook.send("error", "one")
    hook.send("error", "two")
    until(lambda: receiver.texts == ["one"])
    hook.close(PATIENCE)
    assert receiver.texts == ["one", "two"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://host/s3cret"}, "url must start with http:// or https://"),
        ({"url": "hooks.slack.com/s3cret"}, "url must start with http:// or https://"),
        ({"url": "${NOT_THERE}"}, "the environment variable NOT_THERE is not set"),
        ({"url": "$S3cret"}, "url must start with http:// or https://"),
        ({"url": "http://me:s3cret/2@host/x"}, "special characters of its password must be percent-encoded"),
        (
            {"url": "http://me:s3cret@host", "headers": {"authorization": "Bearer s3cret"}},
            "either in url or in headers",
        ),
        ({"url": "http://host", "events": ["drift", "news"]}, "events must be among drift, .* got news"),
        ({"url": "http://host", "timeout": 0}, "timeout must be positive"),
        ({"url": "http://host", "retries": -1}, "retries and pause not negative"),
    ],
)
def test_a_webhook_is_checked_where_it_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Webhook(**settings)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("me:s3cret", "me:s3cret"),
        ("me:p%40ss%2Fw%C3%B6rd", "me:p@ss/w\u00f6rd"),
        ("t0ken", "t0ken:"),
        (":s3cret", ":s3cret"),
    ],
)
def test_credentials_in_the_url_are_sent_as_basic_authentication(receiver: Receiver, written: str, sent: str) -> None:
    hook = Webhook(receiver.url.replace("127.0.0.1", f"{written}@127.0.0.1"))
    hook.send("drift", "the words changed")
    hook.close(PATIENCE)
    [(path, headers, _)] = receiver.requests
    assert path == "/hooks/s3cret" and headers["Host"] == f"127.0.0.1:{receiver.port}"
    assert b64decode(headers["Authorization"].removeprefix("Basic ")).decode() == sent
    assert hook.host == "127.0.0.1"


def test_all_events_but_promotion_by_default() -> None:
    assert Webhook("https://host").events == tuple(event for event in EVENTS if event != "promotion")
