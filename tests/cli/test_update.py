"""``evertune update``, as a shell or cron runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evertune.cli.main import main
from evertune.cli.update import update
from evertune.live.training import remembered
from evertune.registry.registry import Registry
from tests.helpers.live_worker import feed, prepare
from tests.helpers.processes import Command

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
CONFIG = """
registry: registry
source:
  class_path: evertune.sources.FolderSource
  init_args: {path: inbox}
schema: {id: id}
trigger:
  class_path: evertune.live.Volume
  init_args: {min_records: 10}
gate: {max_forgetting: null, max_drop: null, max_negative_flips: null, max_label_noise: null, min_new_agreement: null,
  max_calibration_error_increase: null, max_latency_ratio: null, max_total_forgetting: null, max_class_drop: null,
  max_below_untrained: null}
model:
  class_path: evertune.lightning_modules.SequenceClassificationModule
  init_args: {model_name_or_path: bert, learning_rate: 0.003}
data: {batch_size: 8, max_length: 16}
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 1
  callbacks:
    - class_path: evertune.callbacks.Replay
      init_args: {memory_size: 30, id: id}
watch: {poll: 5}
"""


@pytest.fixture(autouse=True)
def _same_handler_afterwards() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    feed(tmp_path, "a", ["business", "sport"], n=60, n_bad=2)
    (tmp_path / "live.yaml").write_text(CONFIG)
    return tmp_path


def evertune(folder: Path, *arguments: str, **variables: str) -> Command:
    return Command(folder, "-m", "evertune", *arguments, environment=ENVIRONMENT | variables)


def test_exit_codes(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = evertune(folder, "update", "--config", "live.yaml").wait()
    assert first.returncode == 0, first.stderr
    assert "version 1 is in production" in first.stdout
    assert first.stderr.splitlines() == ["62 records arrived", "update 1: 60 new records (10 asked for)"]
    assert not list(folder.rglob("lightning_logs"))
    monkeypatch.chdir(folder)
    assert update(["--config", "live.yaml"]) == 3
    assert capsys.readouterr().out == "nothing to do: version 1 has learned every record that has arrived\n"
    feed(folder, "b", ["politics", "sport"], n=40)
    assert update(["--config", "live.yaml", "--gate.min_accuracy", "1.0"]) == 4
    registry = Registry(folder / "registry")
    assert registry.aliases == {"production": 1, "refused": 2}
    memory = remembered(folder / "registry/versions/1")
    assert memory is not None
    assert all(name.startswith("a-") for name in memory.ids)
    config = registry.version(2).manifest.config
    assert config["gate"]["min_accuracy"] == 1.0
    assert "watch" not in config


def test_terminated_update_goes_on(folder: Path) -> None:
    slow = ["update", "--config", "live.yaml", "--trainer.max_epochs", "20", "--update.checkpoint_every_n_steps", "2"]
    update = evertune(folder, *slow)
    while not list(folder.glob("registry/staging/checkpoints/step-*")):
        assert update.process.is_alive()
        time.sleep(0.01)
    update.process.terminate()
    assert update.wait(60).returncode == 128 + signal.SIGTERM
    assert Registry(folder / "registry").production is None
    done = evertune(folder, *slow).wait()
    assert done.returncode == 0, done.stderr
    assert Registry(folder / "registry").aliases == {"production": 1}


def test_a_watch_reads_the_verdict_as_one_line(folder: Path) -> None:
    with Registry(folder / "registry").lease("evertune watch") as lease:
        done = evertune(folder, "update", "--config", "live.yaml", EVERTUNE_LEASE=lease.token).wait()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["set_aside", "intake", "training", "verdict"], done.stderr
    assert lines[-1]["passed"] and lines[-1]["version"] == 1
    assert {check["name"] for check in lines[-1]["checks"]} >= {"bad records", "records"}


def test_lightning_starts_the_other_rank(folder: Path) -> None:
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "4"]
    command = [sys.executable, "-m", "evertune", "update", "--config", "live.yaml", *devices]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    registry = Registry(folder / "registry")
    assert registry.aliases == {"production": 1}
    assert registry.verify() == []


def test_labels_that_a_terminal_or_rich_would_obey_are_shown_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "300")
    (folder / "live.yaml").write_text(CONFIG.replace("path: inbox", "path: inbox, settle: 0"))
    evil = "[/x]\x1b]0;owned\x07\u202e"
    lines = (folder / "inbox/a.jsonl").read_text()
    (folder / "inbox/a.jsonl").write_text(lines.replace('"business"', json.dumps(evil)))
    assert update(["--config", "live.yaml"]) == 0
    rows = [{"id": f"n{n}", "text": f"goal {n}", "label": evil} for n in range(60)]
    (folder / "inbox/n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert update(["--config", "live.yaml", "--gate.max_class_share", "0.5"]) == 5  # the check names the label
    shown = capsys.readouterr()
    for command in (["show", "registry"], ["list", "registry"], ["list", "registry", "--events"]):
        with pytest.raises(SystemExit) as end:
            main(["registry", *command])
        assert end.value.code == 0
    commands = capsys.readouterr()
    assert re.search(r"time: training \d", shown.out)
    assert "seconds to fit" in commands.out
    assert "[/x]\\x1b]0;owned" in shown.out and "[/x]\\x1b]0;owned" in commands.out
    assert not set(shown.out + shown.err + commands.out + commands.err) & set("\x1b\x07\u202e")


def test_errors_take_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "inbox").rename(folder / "gone")
    monkeypatch.chdir(folder)
    assert update(["--config", "live.yaml"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("evertune update: ")
    assert "inbox" in last
    assert not list((folder / "registry").glob("versions/*"))
