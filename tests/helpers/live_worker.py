"""A small registry that learns tickets: what the tests of updates run, in processes that they may kill."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from evertune.callbacks import EWC, Replay
from evertune.gate.gate import Gate
from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.intake import Intake
from evertune.live.outcome import Outcome
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.training.trainer import ContinualTrainer
from tests.helpers.lightning_modules import TEXTS, WORDS, tiny_bert

__all__ = ["Intake"]


def prepare(folder: Path) -> None:
    """An empty inbox and a pretrained model."""
    (folder / "inbox").mkdir(parents=True)
    tiny_bert(folder / "bert")


def feed(folder: Path, name: str, classes: list[str], n: int, n_bad: int = 0, seed: int = 0) -> list[str]:
    """Write a file of tickets to the inbox; returns the ids of the good ones."""
    draw = random.Random(f"{seed}-{name}")
    lines, ids = [], []
    for number in range(n):
        label = classes[number % len(classes)]
        words = [*draw.choice(TEXTS[label]).split(), *draw.choices(WORDS, k=2)]
        ids.append(f"{name}-{number}")
        lines.append(json.dumps({"id": ids[-1], "text": " ".join(words), "label": label}))
    for number in range(n_bad):
        lines.insert(draw.randrange(len(lines)), json.dumps({"id": f"{name}-bad-{number}", "text": "", "label": "a"}))
    (folder / "inbox" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return ids


def poison(folder: Path, name: str, n: int) -> None:
    """Write a file of tickets whose labels are wrong."""
    wrong = {"business": "sport", "sport": "business"}
    feed(folder, name, list(wrong), n)
    path = folder / "inbox" / f"{name}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record | {"label": wrong[record["label"]]}) + "\n" for record in records))


def updater(folder: str | Path, **changes: Any) -> Updater:
    """The updater of a folder made by :func:`prepare`."""
    folder = Path(folder)
    trainer: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer |= {"callbacks": [Replay(memory_size=30, id="id"), EWC(ewc_lambda=10.0, n_examples=16, batch_size=8)]}
    settings: dict[str, Any] = {
        "schema": RecordSchema(id="id"),
        "data": {"batch_size": 8, "max_length": 16},
        "trigger": Volume(10),
        "gate": lenient_gate(),
        "settings": UpdateSettings(checkpoint_every_n_steps=4),
    }
    model = SequenceClassificationModule(str(folder / "bert"), learning_rate=3e-3, **changes.pop("model", {}))
    model.task = changes.pop("task", model.task)
    return Updater(
        changes.pop("registry", folder / "registry"),
        changes.pop("source", None) or FolderSource(str(folder / "inbox")),
        model,
        ContinualTrainer(**{**trainer, **changes.pop("trainer", {})}),
        **{**settings, **changes},
    )


def lenient_gate(**limits: Any) -> Gate:
    """A gate that lets a tiny model pass: what it measures is tested elsewhere."""
    off = {"max_forgetting", "max_negative_flips", "max_calibration_error_increase", "max_latency_ratio"}
    off |= {
        "max_total_forgetting",
        "max_class_drop",
        "max_below_untrained",
        "max_size_ratio",
        "max_label_noise",
        "max_class_share",
        "max_duplicate_share",
    }
    return Gate(**dict.fromkeys(off) | limits)


def run(
    folder: str, limits: dict[str, float] | None = None, until: str | None = None, **changes: Any
) -> dict[str, Any]:
    """One update in this process; it is killed when the file ``until`` appears in its registry."""
    torch.set_num_threads(1)
    if until is not None:
        threading.Thread(target=_kill_when, args=(Path(folder, "registry", until),), daemon=True).start()
    changes |= {} if limits is None else {"gate": lenient_gate(**limits)}
    outcome: Outcome = updater(folder, **changes).run()
    return {"status": outcome.status, "words": outcome.words, "version": outcome.version}


def _kill_when(landmark: Path) -> None:
    while not landmark.exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
