"""A configuration that names a preset: its own settings override those of the preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from evertune.cli.main import main

MODEL = {"class_path": "evertune.lightning_modules.SequenceClassificationModule"}
DATA = {"source": "rows.jsonl", "scenario": "class_incremental", "n_experiences": 2}


def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, Any], *arguments: str) -> Any:
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tmp_path / "fit.yaml"), *arguments, "--print_config"])
    out, err = capsys.readouterr()
    return yaml.safe_load(out) if ended.value.code == 0 else err


def test_what_the_configuration_does_not_name_is_the_preset_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {**MODEL, "init_args": {"model_name_or_path": "bert-base-uncased", "head_learning_rate": 0.01}}
    content = {"preset": {"memory_size": 50}, "model": model, "data": DATA, "trainer": {"max_epochs": 7}}
    config = printed(tmp_path, capsys, content, "--data.batch_size", "4")
    assert config["model"]["init_args"]["head"] == "cosine"
    assert config["model"]["init_args"]["head_learning_rate"] == 0.01
    assert config["trainer"]["max_epochs"] == 7
    assert config["trainer"]["gradient_clip_val"] == 1.0
    assert config["trainer"]["callbacks"][0]["init_args"]["memory_size"] == 50
    assert config["data"]["batch_size"] == 4


def test_a_preset_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {**MODEL, "init_args": {"model_name_or_path": "bert-base-uncased"}}
    arguments = ["--preset.name", "text_classification", "--preset.memory_size", "70"]
    config = printed(tmp_path, capsys, {"model": model, "data": DATA}, *arguments)
    assert config["trainer"]["callbacks"][0]["init_args"]["memory_size"] == 70


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"name": "text_classification"}, "preset: memory_size is missing"),
        ({"memory_size": 5, "memory": 5}, "preset: there is no setting 'memory'"),
        ({"name": "poetry", "memory_size": 5}, "there is no preset 'poetry'"),
    ],
)
def test_a_wrong_preset_is_named(
    preset: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {**MODEL, "init_args": {"model_name_or_path": "bert-base-uncased"}}
    assert message in printed(tmp_path, capsys, {"preset": preset, "model": model, "data": DATA})
