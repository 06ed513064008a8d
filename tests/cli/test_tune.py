"""``evertune tune`` on a tiny model: real trials, a study that goes on, pruning, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from evertune.cli.main import main
from evertune.cli.space import Choice, Range, read_space, value_at, with_values
from tests.helpers.lightning_modules import TEXTS, tiny_bert


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def config(bert: str, tmp_path: Path) -> Path:
    """Two experiences of two classes each, with validation data."""
    rows = [
        {"text": text, "label": name, "split": split}
        for name, texts in TEXTS.items()
        for text in texts
        for split in ("train", "val", "test")
    ]
    rows += [{"text": "film of the party", "label": "film", "split": split} for split in ("train", "val", "test")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "evertune.lightning_modules.SequenceClassificationModule",
            "init_args": {"model_name_or_path": bert, "learning_rate": 0.01},
        },
        "data": {
            "source": str(tmp_path / "rows.jsonl"),
            "scenario": "class_incremental",
            "n_experiences": 2,
            "split_column": "split",
            "batch_size": 4,
        },
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": "evertune.callbacks.Replay", "init_args": {"memory_size": 6}}],
        },
    }
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


SPACE = {
    "model.learning_rate": {"low": 1.0e-4, "high": 0.05, "log": True},
    "trainer.callbacks.Replay.memory_size": [3, 6],
}


def tune(tmp_path: Path, config: Path, *arguments: str, space: Any = SPACE) -> int:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    files = ["--config", str(config), "--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path / "tuned")]
    with pytest.raises(SystemExit) as ended:
        main(["tune", *files, *arguments])
    return int(ended.value.code or 0)


def study_of(tmp_path: Path) -> optuna.Study:
    return optuna.load_study(study_name="evertune", storage=f"sqlite:///{tmp_path / 'tuned' / 'study.db'}")


def test_the_best_settings_are_a_configuration_of_fit(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = list(logging.getLogger().handlers)
    assert tune(tmp_path, config, "--trials", "2") == 0
    assert logging.getLogger().handlers == handlers
    assert not logging.getLogger("evertune").disabled and not logging.getLogger("evertune.live").disabled
    printed = capsys.readouterr().out
    assert "trial 1: learning_rate 0.01, memory_size 6: " in printed  # the configuration as it is
    assert "2 trials learned the whole stream, 0 ended early, 0 failed" in printed
    trials = study_of(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    assert all(set(trial.intermediate_values) == {1, 2} for trial in trials)
    assert all(trial.value == trial.intermediate_values[2] for trial in trials)
    best = yaml.safe_load((tmp_path / "tuned" / "best.yaml").read_text())
    winner = max(trials, key=lambda trial: trial.value or 0).user_attrs["values"]
    assert best["model"]["init_args"]["learning_rate"] == winner["model.learning_rate"]
    assert best["trainer"]["callbacks"][0]["init_args"]["memory_size"] == winner["trainer.callbacks.Replay.memory_size"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tmp_path / "tuned" / "best.yaml"), "--out", str(tmp_path / "run")])
    assert ended.value.code in (0, None)
    assert (tmp_path / "run" / "report.html").is_file()

    assert tune(tmp_path, config, "--trials", "3") == 0  # goes on
    printed = capsys.readouterr().out
    assert "trial 3: " in printed and "trial 2: " not in printed
    assert tune(tmp_path, config, "--trials", "3", space={"trainer.max_epochs": [1, 2]}) == 2
    assert "holds the study of another configuration or space" in capsys.readouterr().err


def test_a_trial_behind_the_others_ends_early_and_one_that_fails_does_not_end_the_search(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"model.learning_rate": [0.01, -1.0], "trainer.max_epochs": {"low": 1, "high": 2}}
    assert tune(tmp_path, config, "--trials", "1", space=space) == 0
    study = study_of(tmp_path)
    first = study.trials[0]
    for _ in range(4):
        better = dict.fromkeys(first.intermediate_values, 1.1)
        study.add_trial(
            optuna.create_trial(
                params=first.params, distributions=first.distributions, value=1.1, intermediate_values=better
            )
        )
    study.enqueue_trial(first.params)
    study.enqueue_trial({**first.params, "model.learning_rate": "-1.0"})
    capsys.readouterr()
    assert tune(tmp_path, config, "--trials", "7", space=space) == 0
    printed = capsys.readouterr().out
    assert "trial 6: learning_rate 0.01, max_epochs 1: ended early: after experience 1 the average is " in printed
    assert "trial 7: learning_rate -1, max_epochs 1: failed: " in printed and "-1.0" in printed
    assert [trial.state.name for trial in study_of(tmp_path).trials[-2:]] == ["PRUNED", "FAIL"]
    assert list(study_of(tmp_path).trials[5].intermediate_values) == [1]


@pytest.mark.parametrize(
    ("space", "arguments", "words"),
    [
        ({"model.learning_rat": [1, 2]}, [], "the configuration has no 'learning_rat' there; it has"),
        ({"trainer.callbacks.EWC.ewc_lambda": [1, 2]}, [], "no 'EWC' there; it has Replay"),
        ({"trainer.max_epochs": {"low": 3, "high": 1}}, [], "low must be below high, got 3 and 1"),
        ({"model.learning_rate": {"low": "1e-5", "high": 1}}, [], "write 1.0e-5"),
        ([], [], "the space must map settings"),
        (SPACE, ["--trials", "0"], "--trials must be positive, got 0"),
        (SPACE, ["--trainer.devices", "2"], "each trial runs on one process"),
        (SPACE, ["--data.split_column", "null", "--data.splits", "[0.8, 0, 0.2]"], "has no validation data"),
    ],
)
def test_refused_before_the_first_trial(
    space: Any, arguments: list[str], words: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(tmp_path, config, *arguments, space=space) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "tuned" / "trials").exists()


def test_space() -> None:
    space = read_space({"a.b": {"low": 1, "high": 9, "step": 2}, "c": ["x", None, [1]]})
    assert space == {"a.b": Range(1, 9, step=2), "c": Choice(["x", None, [1]])}
    study = optuna.create_study()
    drawn = [
        {place: one.suggest(trial, place) for place, one in space.items()} for trial in [study.ask() for _ in range(20)]
    ]
    assert {one["a.b"] for one in drawn} <= {1, 3, 5, 7, 9} and all(one["c"] in ("x", None, [1]) for one in drawn)
    assert space["c"].stored([1]) == "[1]" and space["c"].stored("y") is None
    assert space["a.b"].stored(3) == 3 and space["a.b"].stored(10) is None and space["a.b"].stored(True) is None


def test_places() -> None:
    config = {"a": [{"class_path": "p.Q", "init_args": {"x": {"y": 1}}}, {"class_path": "p.R"}]}
    assert value_at(config, "a.Q.x.y") == value_at(config, "a.0.init_args.x.y") == 1
    changed = with_values(config, {"a.Q.x.y": 2})
    assert value_at(changed, "a.Q.x.y") == 2 and value_at(config, "a.Q.x.y") == 1
    for wrong in ("b", "a.2", "a.R.x", "a.Q.x.y.z"):
        with pytest.raises(ValueError, match=f"^{wrong}: the configuration has no"):
            with_values(config, {wrong: 3})
