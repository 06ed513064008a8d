"""``evertune fit`` and ``evertune report``, as a shell runs them."""

from __future__ import annotations

import json
import math
import os
import pickle
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evertune.cli.main import main
from evertune.lightning_modules import SequenceClassificationModule
from evertune.metrics.history import History, load_history, save_history
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.helpers.processes import Command

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
seed_everything: 0
out: run
model:
  class_path: evertune.lightning_modules.SequenceClassificationModule
  init_args: {model_name_or_path: bert, dropout: 0.0, learning_rate: 0.001}
data:
  source: rows.jsonl
  scenario: class_incremental
  n_experiences: 3
  class_order: [business, sport, politics]
  batch_size: 4
trainer:
  max_epochs: 3
  accelerator: cpu
  callbacks:
    - class_path: evertune.callbacks.Replay
      init_args: {memory_size: 6}
    - class_path: evertune.callbacks.EWC
      init_args: {ewc_lambda: 10.0, n_examples: 8}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT, a file of texts and a configuration."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny_bert(folder / "bert")
    rows = [{"text": text, "label": name} for name, texts in TEXTS.items() for text in texts * 4]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "stream.yaml").write_text(CONFIG)
    return folder


def environment() -> dict[str, str]:
    """Without what a launcher or a test before has left there."""
    launched = ("LOCAL_RANK", "RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    inherited = {name: value for name, value in os.environ.items() if name not in launched}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def evertune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m evertune`` in a folder."""
    command = [sys.executable, "-m", "evertune", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=1_200, check=False
    )


@pytest.fixture(scope="module")
def fitted(workspace: Path) -> Path:
    """What ``evertune fit`` leaves on one process."""
    done = Command(workspace, "-m", "evertune", "fit", "--config", "stream.yaml", environment=environment()).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report: run/report.html" in done.stdout
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"experience {n} of 3" for n in (1, 2, 3)], done.stderr
    return workspace / "run"


def check_outputs(out: Path) -> History:
    assert {path.name for path in out.iterdir()} == {"history.json", "report.html", "config.yaml", "model"}
    history = load_history(out / "history.json")["run"]
    assert history.experiences == ["business", "sport", "politics"]
    assert [[math.isnan(score) for score in row] for row in history.accuracy_matrix] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert history.memory["size"] == history.memory["capacity"] == 6
    assert "<html" in (out / "report.html").read_text()
    return history


def scores(out: Path) -> list[dict[str, float]]:
    module = SequenceClassificationModule.from_pretrained(out / "model")
    assert module.classes == ["business", "sport", "politics"]
    return module.predict(["the bank share", "a match", "the party"])


def test_fit_writes_the_history_the_report_and_the_model(fitted: Path) -> None:
    check_outputs(fitted)
    assert all(sum(row.values()) == pytest.approx(1) for row in scores(fitted))
    from transformers import AutoModel

    assert AutoModel.from_pretrained(fitted / "model").config.hidden_size == 32
    beside = {path.name for path in fitted.parent.iterdir()} - {"two"}
    assert beside == {"bert", "rows.jsonl", "stream.yaml", "run"}  # nothing is left lying about


@pytest.mark.slow  # tests/cli/test_update.py has a quick one
def test_fit_on_two_processes_that_lightning_starts(workspace: Path, fitted: Path) -> None:
    settings = ["--trainer.devices", "2", "--trainer.strategy", "evertune_deepspeed_stage_3", "--data.batch_size", "2"]
    done = evertune(workspace, "fit", "--config", "stream.yaml", *settings, "--out", "two")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.count("report: two/report.html") == 1
    history, alone = check_outputs(workspace / "two"), check_outputs(fitted)
    # half the batch on twice the processes: the same stream, in the same steps
    assert str(history.accuracy_matrix) == str(alone.accuracy_matrix)
    assert history.memory == alone.memory
    for mine, theirs in zip(scores(workspace / "two"), scores(fitted), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    config = yaml.safe_load((workspace / "two" / "config.yaml").read_text())
    assert config["trainer"]["strategy"] == "evertune_deepspeed_stage_3"


def run_here(arguments: list[str]) -> Any:
    """The exit code of the command line in this process."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_a_complete_run_is_not_learnt_again(
    workspace: Path, fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    before = {path: path.stat().st_mtime_ns for path in fitted.rglob("*")}
    assert run_here(["fit", "--config", "stream.yaml", "--trainer.devices", "2"]) == 0  # where it runs does not matter
    assert "this run is complete: see run/report.html" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in fitted.rglob("*")} == before


def test_an_interrupted_run_with_other_settings_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text('{"model": "another"}')
    assert run_here(["fit", "--config", "stream.yaml", "--out", str(tmp_path)]) == 2
    assert "holds an interrupted run with other settings" in capsys.readouterr().err
    assert (tmp_path / "run" / "settings.json").read_text() == '{"model": "another"}'


def test_print_config_shows_every_setting(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    assert run_here(["fit", "--config", "stream.yaml", "--trainer.devices", "2", "--print_config"]) in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert str(config["trainer"]["devices"]) == "2"
    assert config["trainer"]["accumulate_grad_batches"] == 1
    assert config["trainer"]["callbacks"][0]["init_args"]["policy"] == "reservoir"
    assert config["model"]["init_args"]["warmup_ratio"] == 0.1
    assert config["data"]["max_length"] is None


def test_a_saved_configuration_can_be_run_again(
    fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fitted.parent)
    assert run_here(["fit", "--config", "run/config.yaml", "--print_config"]) in (0, None)
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load((fitted / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["learn"], "invalid choice: 'learn'"),
        (["report"], "the following arguments are required: history"),
        (["report", "history.json", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["fit", "--config", "absent.yaml"], "absent.yaml"),
        (["fit", "--config", "stream.yaml", "--trainer.epochs", "3"], "trainer.epochs"),
        (["fit", "--config", "stream.yaml", "--trainer.max_epochs", "many"], "trainer.max_epochs"),
        (["fit", "--config", "stream.yaml", "--model", "NoSuchModule"], "NoSuchModule"),
        (["fit", "--config", "stream.yaml", "--data.scenario", "task_incremental"], "data.scenario"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workspace)
    assert run_here(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [(None, "no such file: absent.jsonl"), ('{"text": "the bank"', "absent.jsonl, row 2: not valid JSON")],
)
def test_data_that_cannot_be_read_end_in_one_line(
    line: str | None,
    message: str,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    if line is not None:
        Path("absent.jsonl").write_text((workspace / "rows.jsonl").read_text().split("\n")[0] + f"\n{line}\n")
    config = CONFIG.replace("bert", str(workspace / "bert")).replace("rows.jsonl", "absent.jsonl")
    Path("stream.yaml").write_text(config)
    assert run_here(["fit", "--config", "stream.yaml"]) == 2
    assert f"evertune fit: {message}" in capsys.readouterr().err
    assert not Path("run").exists()


def history_in(folder: Path) -> Path:
    return save_history(folder / "history.json", {"naive": History(["a", "b"], [[1.0], [0.5, 1.0]], 2.0)})


def test_report_writes_the_page_and_the_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = history_in(tmp_path)
    main(["report", str(history)])
    assert "naive" in (tmp_path / "report.html").read_text()
    assert "naive" in capsys.readouterr().out
    main(["report", str(history), "--out", str(tmp_path / "page.html"), "--plots", str(tmp_path / "plots")])
    assert (tmp_path / "page.html").read_text() == (tmp_path / "report.html").read_text()
    assert list((tmp_path / "plots").glob("*.png"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "is empty, not a history"),
        (b'{"runs": {"naive": {"exper', "is not valid JSON (truncated or corrupt?)"),
        (b"[]", "is not a history"),
        (pickle.dumps(print), "is a pickle"),
    ],
)
def test_report_of_a_corrupt_history_ends_in_one_line(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "history.json"
    if content is not None:
        path.write_bytes(content)
    assert run_here(["report", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evertune report: ")
    assert message in line
    assert str(path) in line
    assert not (tmp_path / "report.html").exists()


def test_report_exits_with_1_in_a_shell(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text("{")
    done = evertune(tmp_path, "report", "history.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("evertune report: history.json is not valid JSON")


@pytest.mark.parametrize("name", ["Replay", "EWC", "DriftTrigger", "ContinualEvaluation"])
def test_every_method_can_be_named_in_a_configuration(name: str) -> None:
    """What has a default function or object gets that, not its name."""
    import jsonargparse

    import evertune.callbacks
    from evertune._lightning import pl

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--method", type=pl.Callback)
    sizes = {"memory_size": 4} if name == "Replay" else {}
    parsed = parser.parse_object({"method": {"class_path": f"evertune.callbacks.{name}", "init_args": sizes}})
    method = parser.instantiate(parsed).method
    plain = getattr(evertune.callbacks, name)(**sizes)
    assert type(method) is type(plain)
    kept = {
        key: value for key, value in vars(plain).items() if callable(value) and not isinstance(value, torch.nn.Module)
    }
    for key, value in kept.items():
        assert type(vars(method)[key]) is type(value), key


def test_a_key_in_a_configuration_is_no_function() -> None:
    """``id`` is also the name of a function of Python's."""
    from jsonargparse import ArgumentParser

    from evertune.callbacks import Replay

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Replay, "callback")
    settings = {"class_path": "evertune.callbacks.Replay", "init_args": {"memory_size": 3, "id": "id"}}
    config = parser.parse_object({"callback": settings})
    assert parser.instantiate_classes(config)["callback"].id_of({"id": "ticket-7"}) == "ticket-7"
    assert json.loads(parser.dump(config, format="json"))["callback"]["init_args"]["id"] == "id"


def test_version_names_what_it_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"evertune {metadata.version('evertune')}"
    assert f"torch {metadata.version('torch')}" in second and second.endswith(f"Python {platform.python_version()}")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], pytest.param(["fit", "--help"], marks=pytest.mark.slow)]
)
def test_a_reader_that_stops_reading_is_not_an_error(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "evertune", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() in (0, 141)


@pytest.mark.parametrize(
    "command",
    [
        "fit",
        "update",
        "watch",
        "check",
        "quarantine",
        "pending",
        "launch",
        "drift",
        "forget",
        "plan",
        "report",
        "registry",
    ],
)
def test_each_help_has_an_example_and_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split()).lower()
    assert "exit code" in shown and shown.count(f"evertune {command}") >= 2  # the usage, and an example
