"""examples/live/compose.yaml: it is valid, and the commands of its services work together as real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from evertune.cli.update import updater_from
from evertune.registry.registry import Registry
from evertune.sources import CombinedSource, RedisSource, RequestLogSource
from tests.helpers.processes import Command
from tests.helpers.servers import Redis

LIVE = Path(__file__).resolve().parents[2] / "examples" / "live"
COMPOSE = yaml.safe_load((LIVE / "compose.yaml").read_text())
PATIENCE = 900.0


def test_it_is_a_compose_file() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="no validator (pip install compose-spec)")
    parsed = compose_spec.PyCompose.from_yaml(yaml.safe_dump(COMPOSE))  # it reads no merge keys
    assert set(parsed.service_names()) == {"redis", "feed", "updater", "server", "prometheus"}


def test_every_file_that_it_mounts_or_names_exists() -> None:
    build = COMPOSE["x-evertune"]["build"]
    assert (LIVE / build["context"] / "Dockerfile").is_file()
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (LIVE / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        for word in service["command"]:
            assert not word.startswith("/examples/") or Path(here(word, "")).is_file(), word


def test_prometheus_asks_every_service_where_it_listens() -> None:
    (job,) = yaml.safe_load((LIVE / "compose/prometheus.yml").read_text())["scrape_configs"]
    ports = {
        "server": yaml.safe_load((LIVE / "compose/server.yaml").read_text())["server"]["port"],
        "updater": yaml.safe_load((LIVE / "compose/updater.yaml").read_text())["watch"]["port"],
    }
    assert job["static_configs"] == [{"targets": [f"{name}:{port}" for name, port in ports.items()]}]
    for name, port in ports.items():
        assert f":{port}/" in COMPOSE["services"][name]["healthcheck"]["test"][-1]
    assert COMPOSE["services"]["server"]["ports"] == [f"127.0.0.1:{ports['server']}:{ports['server']}"]


def test_the_updater_learns_from_the_stream_and_from_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://localhost:6379/0")
    updater, options = updater_from(
        [here(word, "") for word in COMPOSE["services"]["updater"]["command"][1:]], "evertune watch"
    )
    assert isinstance(updater.source, CombinedSource)
    assert [type(one) for one in updater.source.sources.values()] == [RedisSource, RequestLogSource]
    assert options.watch.host == "0.0.0.0"
    updater.source.close()


def here(word: str, redis: str) -> str:
    """A word of a service's command as it is outside of a container."""
    return word.replace("/examples/", f"{LIVE}/").replace("redis://redis:6379/0", redis)


class Service:
    """A service's command as a process."""

    def __init__(self, name: str, folder: Path, redis: Redis, *more: str) -> None:
        service: dict[str, Any] = COMPOSE["services"][name]
        start = [] if service.get("entrypoint") else ["-m", "evertune"]
        words = [here(word, redis.url) for word in service["command"]]
        variables = {key: here(value, redis.url) for key, value in service.get("environment", {}).items()}
        environment = os.environ | variables | {"OMP_NUM_THREADS": "1"}
        self.command = Command(folder, *start, *words, *more, environment=environment)

    def address(self) -> str:
        until(lambda: re.search(r'"address": "[^"]*:\d+"', self.command.errors), self)
        return "http://127.0.0.1:" + re.findall(r'"address": "[^"]*:(\d+)"', self.command.errors)[0]

    def end(self) -> int:
        pid = self.command.process.pid
        assert pid is not None
        if self.command.process.is_alive():
            os.kill(pid, signal.SIGTERM)
        return self.command.wait(120).returncode


def until(condition: Callable[[], Any], service: Service) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end and service.command.process.is_alive(), service.command.errors[-4_000:]
        time.sleep(0.2)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[dict[str, Service]]:
    redis = Redis(tmp_path)
    feed = Service("feed", tmp_path, redis, "--tick", "0", "--limit", "320")
    assert feed.command.wait(120).returncode == 0
    assert redis.client.xlen("news") == 320
    started = {
        "updater": Service("updater", tmp_path, redis, "--watch.port", "0"),
        "server": Service("server", tmp_path, redis, "--server.host", "127.0.0.1", "--server.port", "0"),
    }
    yield started
    codes = {name: service.end() for name, service in started.items()}
    redis.kill()
    assert codes == {"updater": 0, "server": 0}


@pytest.mark.slow
def test_the_loop_closes(services: dict[str, Service], tmp_path: Path) -> None:
    server, updater = services["server"], services["updater"]
    http = httpx.Client(base_url=server.address(), timeout=60)
    until(lambda: http.get("/ready").status_code == 200, server)
    assert Registry(tmp_path / "news-registry").production is not None

    text = "The striker scored twice, says ada@example.com."
    answer = http.post("/predict", json={"id": "from-a-user", "text": text}).json()
    assert answer["version"] >= 1 and answer["label"] in ("business", "sports", "politics", "tech", "entertainment")
    assert http.post("/feedback", json={"id": "from-a-user", "label": "sports"}).json()["accepted"] == 1

    def learned() -> list[dict[str, Any]]:
        segments = (tmp_path / "news-registry" / "pending").glob("*.jsonl")
        rows = [json.loads(line) for segment in segments for line in segment.read_text().splitlines()]
        return [row["record"] for row in rows if row.get("id") == "from-a-user"]

    until(learned, updater)
    (record,) = learned()
    assert record["label"] == "sports" and "ada@example.com" not in record["text"]
    assert "evertune_serve_answers_total" in http.get("/metrics").text
