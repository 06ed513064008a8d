"""``evertune check``: each part of a configuration is tried, and nothing is written or sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evertune.cli.check import check
from tests.cli.test_update import CONFIG
from tests.helpers.live_worker import feed, prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    prepare(folder)
    feed(folder, "a", ["business", "sport"], n=60, n_bad=2)
    return folder


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def checked(folder: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The exit code, and the words on each part."""
    config = yaml.safe_load(CONFIG)
    config["source"]["init_args"]["settle"] = 0
    (folder / "live.yaml").write_text(yaml.safe_dump({**config, **changes}))
    before = written(folder)
    code = check(["--config", "live.yaml"])
    assert written(folder) == before
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return code, dict(line for line in lines if len(line) == 2)


def test_what_works(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("HOOK", "http://127.0.0.1:1/s3cret")
    hook = {"class_path": "evertune.live.alerts.Webhook", "init_args": {"url": "${HOOK}"}}
    code, parts = checked(made, {"watch": {"alerts": [hook]}}, capsys)
    assert code == 0
    assert parts["configuration"] == "ok"
    assert parts["source"].startswith("ok: 62 records read, 2 of them bad, as a.jsonl:")
    assert parts["registry"] == "ok: no version yet; no update is due"
    assert parts["model"].startswith("ok: SequenceClassificationModule, 0.")
    assert parts["alerts"] == "ok: Webhook to 127.0.0.1 (nothing was sent)"


@pytest.mark.parametrize(
    ("changes", "part", "words"),
    [
        ({"schema": {"id": "id", "label": "lable"}}, "source", "62 of them bad"),
        ({"source": {"class_path": "FolderSource", "init_args": {"path": "gone"}}}, "source", "gone does not exist"),
        ({"gate": {"max_bad_share": 0.01}}, "source", "an update stops above 1%"),
    ],
)
def test_what_does_not_is_named(
    changes: dict[str, Any],
    part: str,
    words: str,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    code, parts = checked(made, changes, capsys)
    assert code == 1
    assert parts[part].startswith("FAILED: ") and words in parts[part]
    assert all(text.startswith("ok") for name, text in parts.items() if name != part)


def test_a_model_without_weights_is_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    (made / "empty").mkdir(exist_ok=True)
    for file in (made / "bert").iterdir():
        if "safetensors" not in file.name:
            (made / "empty" / file.name).write_bytes(file.read_bytes())
    model = yaml.safe_load(CONFIG)["model"]
    model["init_args"]["model_name_or_path"] = "empty"
    code, parts = checked(made, {"model": model}, capsys)
    assert code == 1 and parts["model"].startswith("FAILED: ")


def test_a_secret_that_is_not_set_is_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.delenv("HOOK", raising=False)
    hook = {"class_path": "evertune.live.alerts.Webhook", "init_args": {"url": "${HOOK}"}}
    config = {**yaml.safe_load(CONFIG), "watch": {"alerts": [hook]}}
    (made / "live.yaml").write_text(json.dumps(config))
    assert check(["--config", "live.yaml"]) == 2
    assert "evertune check: the environment variable HOOK is not set" in capsys.readouterr().err
