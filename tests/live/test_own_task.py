"""A module and a task of one's own, a regression without classes, through a whole life: learned, improved, refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from evertune._lightning import pl
from evertune.callbacks import Replay
from evertune.gate.gate import Gate
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import LabelDrift, PerformanceDrop, Volume
from evertune.live.update import Updater
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.tasks.base import Task
from evertune.training.trainer import ContinualTrainer
from tests.helpers.lightning_modules import TEXTS, WORDS, tiny_bert

URGENCY = {"business": 0.1, "sport": 0.9}


class UrgencyTask(Task):
    """A number between 0 and 1 for each text."""

    def label(self, example: Any) -> None:
        return None

    def check_label(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"the urgency must be a number between 0 and 1, got {value!r}")
        return float(value)

    def collator(self, tokenizer: Any) -> Callable[[list[Any]], Any]:
        pad = super().collator(tokenizer)

        def collate(examples: list[Any]) -> Any:
            batch = pad(examples)
            return {**batch, "labels": torch.tensor(batch["labels"])}

        return collate

    def score(self, module: pl.LightningModule, batch: Any) -> Tensor:
        return (1 - (module(**batch) - batch["labels"]).abs()).clamp(0, 1)


class Urgency(pl.LightningModule):
    """Written by hand, from a configuration, on nothing of evertune but the task."""

    def __init__(self, model_name_or_path: str, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.task = UrgencyTask()
        self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
        self.backbone = AutoModel.from_config(AutoConfig.from_pretrained(model_name_or_path))
        self.head = torch.nn.Linear(self.backbone.config.hidden_size, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))[:, 0].sigmoid()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.mse_loss(self(**batch), batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(self.state_dict(), folder / "weights.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path, lazy: bool = False, **settings: Any) -> Urgency:
        module = cls(str(folder), **settings)
        module.load_state_dict(load_file(folder / "weights.safetensors"))
        return module


def feed(folder: Path, name: str, n: int, turned: bool = False) -> None:
    draw = random.Random(name)
    lines = []
    for number in range(n):
        topic = list(URGENCY)[number % 2]
        text = " ".join([*draw.choice(TEXTS[topic]).split(), *draw.choices(WORDS, k=2)])
        urgency = 1 - URGENCY[topic] if turned else URGENCY[topic]
        lines.append(json.dumps({"id": f"{name}-{number}", "text": text, "label": urgency}))
    lines.append(json.dumps({"id": f"{name}-bad", "text": "the vote", "label": "high"}))
    (folder / "inbox" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def updater(folder: Path, **changes: Any) -> Updater:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = ContinualTrainer(max_epochs=6, accelerator="cpu", devices=1, callbacks=[Replay(20, id="id")], **quiet)
    settings: dict[str, Any] = {
        "schema": RecordSchema(id="id", fields={"id": "str", "text": "str", "label": "float"}),
        "data": {"batch_size": 8, "max_length": 16},
        "trigger": Volume(10),
        "gate": Gate(max_duplicate_share=None, max_latency_ratio=None, max_size_ratio=None),
        "settings": UpdateSettings(checkpoint_every_n_steps=50),
    }
    model = changes.pop("model", None) or Urgency(str(folder / "bert"))
    return Updater(folder / "registry", FolderSource(str(folder / "inbox")), model, trainer, **(settings | changes))


def test_a_regression_is_learned_improved_and_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "inbox").mkdir()
    tiny_bert(tmp_path / "bert")
    feed(tmp_path, "a", 120)
    live = updater(tmp_path)
    assert live.run().status == "promoted"
    first = live.registry.version(1).manifest
    assert first.classes == []
    assert first.records == {"train": 96, "held_out": 24, "quarantined": 1}
    (bad,) = live.journal.quarantined()
    assert bad["id"] == "a-bad"

    feed(tmp_path, "b", 120)
    outcome = updater(tmp_path).run()
    assert (outcome.status, outcome.version) == ("promoted", 2), outcome.words
    assert outcome.verdict is not None
    not_applicable = [check for check in outcome.verdict.checks if not check.applicable]
    names = {"one class", "class", "negative flips", "calibration error", "agreement", "label noise"}
    assert {check.name for check in not_applicable} == names
    assert all("the labels of this task are not classes" in check.words for check in not_applicable)
    scores = live.registry.version(2).manifest.metrics.accuracy
    assert scores.keys() == {"update-1", "update-2"}
    assert all(score is not None and 0.8 < score <= 1 for score in scores.values())

    feed(tmp_path, "c", 240, turned=True)
    refused = updater(tmp_path).run()
    assert refused.status == "refused"
    assert "on 'update-1' the new version scores" in refused.words
    assert live.registry.aliases["production"] == 2
    assert live.registry.verify() == []

    feed(tmp_path, "d", 20)
    idle = updater(tmp_path, trigger=LabelDrift(min_records=1)).run()
    assert "label drift: cannot tell, a reference of 48 records is too small" in idle.words
    dropped = updater(tmp_path, trigger=PerformanceDrop(window=100, min_records=1)).run()
    assert dropped.status == "nothing" and "performance drop: score" not in dropped.words  # 20 of 100


def test_what_a_module_lacks_is_named_at_once(tmp_path: Path) -> None:
    class Bare(pl.LightningModule):
        tokenizer = None

    with pytest.raises(TypeError, match=r"Bare cannot be updated: it has no save_pretrained\(folder\).*no from_p"):
        updater(tmp_path, model=Bare())


def test_labels_that_the_task_cannot_learn_are_refused_at_once(tmp_path: Path) -> None:
    schema = RecordSchema(fields={"text": "str", "label": "float"})
    with pytest.raises(ValueError, match=r"field 'label' is declared as numbers, which this task cannot learn"):
        schema.for_task(Task())
