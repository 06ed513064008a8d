"""``evertune ui`` as a process of its own: its refusals, its address, and its end by a signal."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import httpx
import pytest

from evertune.cli.main import main
from tests.helpers.processes import Command
from tests.helpers.shown import news


@pytest.fixture
def registry(tmp_path: Path) -> str:
    return str(news(tmp_path).store.root)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["ui", *arguments])
    assert ended.value.code == code
    return capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ui", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Example: evertune ui" in shown and "Exit codes: 0" in shown and "--allow_changes" in shown


def test_what_cannot_work_is_refused_at_once(registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "other machines can reach 0.0.0.0" in refused(
        ["--registry", registry, "--server.host", "0.0.0.0"], capsys, 2
    )
    assert "watch must be an address" in refused(["--registry", registry, "--watch", "localhost:9090"], capsys, 2)
    assert "there is no registry at" in refused(["--registry", str(tmp_path / "none")], capsys, 1)
    assert "registry" in refused([], capsys, 2)
    assert "drain" in refused(["--registry", registry, "--server.drain", "5"], capsys, 2)
    keys = ["--access.keys", str(tmp_path / "none.json")]
    assert "evertune keys add" in refused(["--registry", registry, *keys], capsys, 1)


def test_it_shows_the_registry_until_a_signal(registry: str, tmp_path: Path) -> None:
    words = ["-m", "evertune", "ui", "--registry", registry, "--server.port", "0", "--allow-changes"]
    command = Command(tmp_path, *words, environment=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not (found := re.search(r'"address": "127.0.0.1:(\d+)"', command.errors)):
        assert time.monotonic() < end and command.process.is_alive(), command.errors
        time.sleep(0.05)
    url = f"http://127.0.0.1:{found[1]}"
    assert "Version 2 is in production" in httpx.get(url).text
    assert httpx.get(f"{url}/rollback").status_code == 200
    assert httpx.get(url, headers={"host": "evil.example"}).status_code == 421
    with httpx.stream("GET", f"{url}/events", timeout=30) as events:
        assert next(events.iter_lines()).startswith("data: ")
        assert command.process.pid is not None
        os.kill(command.process.pid, signal.SIGTERM)
        done = command.wait(60)  # an open stream does not hold it
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
