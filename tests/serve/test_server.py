"""``evertune serve`` as a process of its own: real HTTP, real signals, and a promotion in the middle."""

from __future__ import annotations

import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from evertune.cli.main import main
from evertune.registry.registry import Registry
from tests.helpers.certificates import self_signed
from tests.helpers.serving import PATIENCE, Running, ask, two_versions


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return two_versions(tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def server(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(registry.store.root, tmp_path_factory.mktemp("server"), "--limits.read_timeout", "0.5")
    yield running
    running.end()


def test_a_promotion_and_a_rollback_drop_no_request(server: Running, registry: Registry) -> None:
    done, found = threading.Event(), list[tuple[int, str, int]]()
    clients = [threading.Thread(target=ask, args=(server.url, done, found)) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        for change, number in ((lambda: registry.promote(2), 2), (registry.rollback, 1)):
            change()
            end, start = time.monotonic() + PATIENCE, len(found)
            while number not in {version for _, _, version in found[start:]}:
                assert time.monotonic() < end, server.command.errors
                time.sleep(0.01)
    finally:
        done.set()
        for client in clients:
            client.join()
    assert {status for status, _, _ in found} == {200}
    classes = {1: {"business", "sport"}, 2: {"film", "law"}}
    assert all(label in classes[version] for _, label, version in found)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n", 400),
        (b"not http at all\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"GET /../../etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404),
        (b"GET /%2e%2e/%0d%0aset-cookie:a=b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404),
        (b"GET /health HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n", 421),
    ],
)
def test_malformed_requests_get_their_status_and_the_next_one_is_answered(
    server: Running, data: bytes, status: int
) -> None:
    answer = server.raw(data)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"set-cookie" not in answer.partition(b"\r\n\r\n")[0]
    assert httpx.post(f"{server.url}/predict", json={"text": "vote"}).status_code == 200


def test_headers_without_end_are_not_read(server: Running) -> None:
    answer = server.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: " + b"a" * (1 << 24) + b"\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_slow_clients_are_cut_off(server: Running) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 20\r\n"
    start = time.monotonic()
    assert server.raw(head) == b""  # headers that never end
    assert server.raw(head + b"\r\n{").startswith(b"HTTP/1.1 408 ")  # a body that never ends
    assert time.monotonic() - start < PATIENCE / 4


def abuse(draw: random.Random) -> tuple[bytes, set[int]]:
    """A request that no good client sends, and the statuses that may answer it."""
    junk = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 200)))
    head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    as_json = head + b"content-type: application/json\r\n"

    def with_body(body: bytes, before: bytes = as_json) -> bytes:
        return before + b"content-length: %d\r\n\r\n" % len(body) + body

    def nested(depth: int) -> bytes:
        return b'{"text":' * depth + b"1" + b"}" * depth

    path = "".join(draw.choices(["/", "..", "%2e", "%00", "%0d%0a", "etc", "predict", "?x=", "a"], k=6)).encode()
    return draw.choice(
        [
            (with_body(junk), {400}),
            (with_body(b'{"text": "' + junk + b'"}'), {200, 400, 422}),
            (with_body(nested(draw.randrange(2, 5_000))), {400, 422}),
            (with_body(json.dumps({"text": draw.choice([None, 1, [], {}, True, ["a"], ["", ""]])}).encode()), {422}),
            (with_body(json.dumps({"records": [{"text": "a"}] * draw.randrange(257, 400)}).encode()), {422}),
            (with_body(b'{"text": "' + b"a" * draw.randrange(100_001, 200_000) + b'"}'), {422}),
            (with_body(b"{}", head), {415}),
            (as_json + b"content-length: %d\r\n\r\n" % draw.randrange(1 << 21, 1 << 60), {413}),
            (as_json + b"transfer-encoding: chunked\r\n\r\nzz\r\n", {400, 0}),
            (with_body(b"{}", as_json + b"x: a\r\n b\r\n"), {400, 422}),
            (with_body(b"{}", as_json + b"content-length: 7\r\n"), {400}),
            (b"GET /" + path + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", {400, 404, 405, 307}),
            (b"DELETE /predict HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", {405}),
            (b"GET /health HTTP/1.1\r\nhost: " + junk.hex().encode() + b"\r\nconnection: close\r\n\r\n", {421}),
            (junk + b"\r\n\r\n", {400, 0}),
            (as_json[: draw.randrange(len(head) + 1, len(as_json))] + b"\r\n\r\n", {400, 415, 408}),
        ]
    )


@pytest.mark.parametrize("n_requests", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_abuse_gets_its_status_and_good_requests_are_answered_all_along(server: Running, n_requests: int) -> None:
    def attack(seed: int) -> None:
        draw = random.Random(seed)
        data, allowed = abuse(draw)
        answer = server.raw(data)
        status = int(answer.split(b" ", 2)[1]) if answer else 0
        assert status in allowed, (data[:300], answer[:300])
        assert b"Traceback" not in answer
        if seed % 10 == 0:
            assert httpx.post(f"{server.url}/predict", json={"text": "vote"}).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attack, range(n_requests)))


def test_the_log_has_no_traceback(server: Running) -> None:
    lines = [json.loads(line) for line in server.command.errors.splitlines()]
    assert {line["level"] for line in lines} <= {"info"}, lines


def test_sigterm_answers_what_is_under_way_and_ends_with_0(registry: Registry, tmp_path: Path) -> None:
    running = Running(registry.store.root, tmp_path, "--server.drain", "0.5")
    done, found = threading.Event(), list[tuple[int, str, int]]()
    failed: list[Exception] = []

    def clients() -> None:
        try:
            ask(running.url, done, found)
        # It accepts no more, and the system resets connections that were still waiting for that: none of these requests
        # was read. One that is dropped while it is under way is a RemoteProtocolError.
        except (httpx.ConnectError, httpx.ReadError, httpx.WriteError):
            pass
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=clients) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(found) < 20:
        time.sleep(0.01)
    with ThreadPoolExecutor() as pool:
        ending = pool.submit(running.end)
        while httpx.get(f"{running.url}/ready").status_code != 503:
            time.sleep(0.01)
        ended = ending.result()
    done.set()
    for thread in threads:
        thread.join()
    assert ended.returncode == 0, ended.stderr
    assert not failed and {status for status, _, _ in found} == {200}
    assert "the server has ended" in ended.stderr


# --- the command


def command(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *arguments])
    return caught.value.code


def test_check_answers_one_text_and_ends(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--registry", registry.store.root, "--check") == 0
    assert capsys.readouterr().out == "ok: version 1 answers\n"
    assert command("--registry", registry.store.root, "--check", "--alias", "9") == 1
    assert "no version 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server.prot", "1"], "did you mean '--server.port'"),
        (["--batching.max_batch", "0"], "max_batch must be positive, got 0"),
        (["--server.port", "99999"], "port must be from 0 to 65535, got 99999"),
        (["--limits.timeout", "0"], "timeout must be positive, got 0"),
    ],
)
def test_wrong_settings(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--registry", "registry", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_in_one_line(
    registry: Registry, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evertune.live.telemetry.log_to", lambda **_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert command("--registry", registry.store.root, "--server.port", port) == 1
    assert f"evertune serve: cannot listen on 127.0.0.1:{port}: Address already in use" in caplog.text


def test_tls_and_a_certificate_of_the_client(registry: Registry, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    arguments = ["--server.certificate", certificate, "--server.private_key", key]
    running = Running(registry.store.root, tmp_path, *arguments, "--server.client_authority", certificate)
    try:
        url = f"https://127.0.0.1:{running.port}/health"
        trusting = ssl.create_default_context(cafile=certificate)
        with pytest.raises(httpx.HTTPError):
            httpx.get(url, verify=trusting)
        trusting.load_cert_chain(certificate, key)
        assert httpx.get(url, verify=trusting).json() == {"status": "ok"}
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https", "http"))
    finally:
        assert running.end().returncode == 0
