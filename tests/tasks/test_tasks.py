"""Every task through everything that must know of tasks; `table.py` has a row for each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from starlette.testclient import TestClient

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.cli.plan import plan
from evertune.cli.predict import predict
from evertune.drift import HashedNgrams
from evertune.live.evaluation import evaluate
from evertune.live.learnable import unlearnable
from evertune.metrics.history import History
from evertune.registry.manifest import Manifest
from evertune.registry.registry import Registry
from evertune.serve import Service, application
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.predicting import scores_of
from evertune.training.trainer import ContinualTrainer
from evertune.utils.batches import batch_size_of
from evertune.utils.evaluation import evaluation_mode
from tests.tasks.table import ROWS, TaskRow

MAX_LENGTH = 16


class Sizes(pl.Callback):
    """Notes how many examples each batch has."""

    across_experiences = True

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch_size_of(batch))


@dataclass
class Learned:
    """A module that has learned the two halves of a row's records, and what it learned them with."""

    row: TaskRow
    module: Any
    replay: Replay = field(default_factory=lambda: Replay(memory_size=4, seed=0))
    ewc: EWC = field(default_factory=lambda: EWC(ewc_lambda=1.0, n_examples=4, batch_size=2))
    sizes: Sizes = field(default_factory=Sizes)
    history: History | None = None

    def __post_init__(self) -> None:
        self.schema = self.row.schema_for(self.module)
        self.kept = [self.schema.check(record) for record in self.row.records]
        self.halves = [self.kept[: len(self.kept) // 2], self.kept[len(self.kept) // 2 :]]
        self.rows = [{"id": str(number), "record": record} for number, record in enumerate(self.kept)]

    @property
    def columns(self) -> dict[str, Any]:
        text, label = self.schema.text, self.schema.label
        return {"text": text if isinstance(text, str) else tuple(text), "label": label}

    def data(self, experience: Experience) -> ExperienceDataModule:
        return ExperienceDataModule(
            experience,
            self.module.tokenizer,
            **self.columns,
            task=self.module.task,
            batch_size=3,
            max_length=MAX_LENGTH,
            bucketed=False,
        )

    def stream(self) -> list[Experience]:
        names = self.module.task.label_names
        classes = [
            list(dict.fromkeys(n for r in half for n in names(r.get(self.schema.label)))) for half in self.halves
        ]
        return [
            Experience(f"half {number}", half, test=half, classes=named)
            for number, (half, named) in enumerate(zip(self.halves, classes, strict=True))
        ]

    def learn(self) -> Learned:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = ContinualTrainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            enable_checkpointing=False,
            callbacks=[self.replay, self.ewc, self.sizes],
            **quiet,
        )
        self.history = trainer.fit_stream(self.module, self.stream(), self.data, untrained=False)
        return self

    def examples(self) -> list[Any]:
        """All examples as the collate function gets them."""
        sets = [self.data(experience).dataset("train") for experience in self.stream()]
        return [data[index] for data in sets if data is not None for index in range(len(data))]  # type: ignore[arg-type]

    def scores(self) -> list[float]:
        """The score of each example, alone in its batch."""
        with evaluation_mode(self.module), torch.inference_mode():
            return [float(scores_of(self.module.task, self.module, [one])[0]) for one in self.examples()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return {**a, "id": 0}.keys() == {**b, "id": 0}.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


@pytest.fixture(scope="module", params=ROWS)
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learned]:
    row = ROWS[request.param]
    folder = str(tmp_path_factory.mktemp("pretrained"))
    row.pretrained(folder)
    torch.manual_seed(0)
    yield Learned(row, row.module(folder)).learn()


def test_the_memory_keeps_examples_and_replays_them(learned: Learned) -> None:
    memory = learned.replay.memory
    assert len(memory) == 4
    for slot in range(4):
        assert any(same(memory[slot], example) for example in learned.examples())
    half = len(learned.sizes.seen) // 2
    assert learned.sizes.seen[half:] == [2 * size for size in learned.sizes.seen[:half]]


def test_the_importance_of_the_weights_is_estimated(learned: Learned) -> None:
    importance = [tensor.double().sum().item() for tensor in learned.ewc.tensors["importance"]]
    assert learned.ewc.experience_index == 2
    assert math.isfinite(sum(importance)) and sum(importance) > 0


def test_an_example_has_the_same_score_alone_and_in_a_batch(learned: Learned) -> None:
    assert learned.history is not None
    scores = learned.scores()
    half = len(learned.halves[0])
    last = learned.history.accuracy_matrix[1]
    assert last == pytest.approx([np.mean(scores[:half]), np.mean(scores[half:])], abs=1e-6)


def test_the_gate_judges_records_by_the_score(learned: Learned) -> None:
    said = evaluate(learned.module, {"": learned.rows}, **learned.columns, batch_size=5, max_length=MAX_LENGTH)[""]
    assert said.ids == [row["id"] for row in learned.rows]
    assert said.labels == [row["record"].get(learned.schema.label, "") for row in learned.rows]
    assert said.score.tolist() == pytest.approx(learned.scores(), abs=1e-5)
    assert type(said).from_dict(said.to_dict()).score.tolist() == said.score.tolist()


def test_records_are_kept_in_a_form_that_passes_again(learned: Learned) -> None:
    assert [learned.schema.check_again(record) for record in learned.kept] == learned.kept
    assert unlearnable(learned.rows, learned.module.task, learned.module, learned.schema, MAX_LENGTH, score=True) == []


def test_records_that_cannot_be_learned_are_refused(learned: Learned) -> None:
    for record, reason in learned.row.refused:
        with pytest.raises(ValueError) as refusal:
            learned.schema.check(record)
        assert reason in str(refusal.value)


def test_drift_is_found_in_texts_and_in_names(learned: Learned) -> None:
    for name in learned.schema.texts:
        assert HashedNgrams()([record[name] for record in learned.kept]).isfinite().all()
    names = {n for record in learned.kept for n in learned.module.task.label_names(record.get(learned.schema.label))}
    assert all(isinstance(name, str) for name in names)
    assert names <= set(getattr(learned.module, "classes", names))


def test_a_saved_module_predicts_the_same(learned: Learned, tmp_path: Path) -> None:
    learned.module.save_pretrained(tmp_path)
    again = type(learned.module).from_pretrained(tmp_path)
    options: dict[str, Any] = {**learned.columns, "max_length": MAX_LENGTH}
    before, after = (evaluate(one, {"": learned.rows}, **options)[""] for one in (learned.module, again))
    assert before.to_dict() == after.to_dict()


def test_plan_knows_the_size(learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {name: value for name, value in learned.module.hparams.items() if not name.startswith("_")}
    model = {"class_path": f"evertune.lightning_modules.{type(learned.module).__name__}", "init_args": settings}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model}))
    assert plan(["--config", str(tmp_path / "run.yaml"), "--gpu_memory", "t4", "--json"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)["parameters"]
    assert found == sum(parameter.numel() for parameter in learned.module.parameters())


def test_a_version_of_it_is_served_and_answers_files(learned: Learned, tmp_path: Path) -> None:
    if not learned.row.served:
        return
    texts = learned.schema.text
    fields = [texts] if isinstance(texts, str) else list(texts)
    asked = [[record[name] for name in fields] for record in learned.kept[:3]]
    inputs = [one[0] if len(one) == 1 else tuple(one) for one in asked]
    with evaluation_mode(learned.module):
        expected = json.loads(json.dumps(learned.module.predict(inputs)))
    learned.module.save_pretrained(tmp_path / "staging" / "model")
    registry = Registry(tmp_path / "registry")
    about = {"module": type(learned.module).__name__, "config": {"schema": {"text": texts}}}
    registry.publish(tmp_path / "staging", Manifest(version=1, parent=None, **about))
    registry.promote(1)

    with TestClient(application(Service(registry)), "http://localhost") as http:
        body = {"records": [{"text": one[0] if len(one) == 1 else one} for one in asked], "top": 99}
        answers = http.post("/predict", json=body).json()["answers"]
    said = [one["prediction"] if "prediction" in one else one["probabilities"] for one in answers]
    assert [shape_of(one) for one in said] == [shape_of(one) for one in expected]

    lines = [json.dumps(dict(zip(fields, one, strict=True))) for one in asked]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert predict([registry.store.root, *files, "--top", "99"]) == 0
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    said = [one["probabilities"] if isinstance(one, dict) and "probabilities" in one else one for one in found]
    assert [shape_of(one) for one in said] == [shape_of(one) for one in expected]


def shape_of(value: Any) -> Any:
    """A prediction without its probabilities, which batches of other sizes change in the last digits."""
    if isinstance(value, dict):
        return {name: shape_of(part) for name, part in value.items()}
    return (
        [shape_of(part) for part in value] if isinstance(value, list) else None if isinstance(value, float) else value
    )
