"""``evertune serve --workers 2``: real processes on one port, through a promotion, a kill and a signal."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from evertune.registry.registry import Registry
from evertune.serve.workers import Workers
from tests.helpers.serving import PATIENCE, Running, ask, two_versions


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return two_versions(tmp_path_factory.mktemp("versions"))


@pytest.fixture
def server(registry: Registry, tmp_path: Path) -> Iterator[Running]:
    running = Running(registry.store.root, tmp_path, "--workers", "2", "--log.path", "requests")
    yield running
    if running.command.process.is_alive():  # a test that failed has left it
        running.end()


def until(condition: Callable[[], bool], server: Running) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, server.command.errors
        time.sleep(0.05)


def versions(server: Running) -> dict[int, int]:
    """The version of each worker that lives, by its process."""
    page = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'^evertune_serve_version\{pid="(\d+)",role="production"\} (\d+)', page, re.MULTILINE)
    return {int(pid): int(number) for pid, number in found}


def counted(server: Running) -> int:
    page = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'^evertune_serve_requests_total\{endpoint="/predict",status="200"\} (\d+)', page, re.MULTILINE)
    return int(found[0]) if found else 0


def test_two_workers_answer_through_a_promotion_and_one_that_is_killed_is_replaced(
    server: Running, registry: Registry, tmp_path: Path
) -> None:
    until(lambda: len(versions(server)) == 2, server)
    assert set(versions(server).values()) == {1}

    done, found = threading.Event(), list[tuple[int, str, int]]()
    clients = [threading.Thread(target=ask, args=(server.url, done, found)) for _ in range(8)]
    for client in clients:
        client.start()
    try:
        registry.promote(2)
        until(lambda: set(versions(server).values()) == {2}, server)
        start = len(found)
        until(lambda: len(found) > start + 50, server)
    finally:
        done.set()
        for client in clients:
            client.join()
    assert {status for status, _, _ in found} == {200}
    classes = {1: {"business", "sport"}, 2: {"film", "law"}}
    assert all(label in classes[version] for _, label, version in found)
    assert {version for _, _, version in found[-20:]} == {2}, "what was under way at the swap has long been answered"
    until(lambda: counted(server) == len(found), server)  # the counts of both workers are added up

    victim, other = versions(server)
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(set(versions(server)) - {victim, other}) == 1, server)
    assert other in versions(server) and victim not in versions(server)
    assert "is replaced" in server.command.errors
    answered = counted(server)
    assert answered >= len(found), "what the dead worker had counted is kept"

    ended = server.end()
    assert ended.returncode == 0, ended.stderr
    logs = list((tmp_path / "requests").iterdir())
    assert sum(len(log.read_bytes().splitlines()) for log in logs) == len(found)
    registry.rollback()


@pytest.mark.slow
def test_a_server_whose_workers_cannot_start_ends_with_the_reason(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no version 9"):
        Running(registry.store.root, tmp_path, "--workers", "2", "--alias", "9")


def test_the_number_of_workers_is_checked() -> None:
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        Workers(lambda listening, on_start: 0, 0)
