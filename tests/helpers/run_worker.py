"""What the tests of interrupted runs train: a stream of three experiences, which may end at any batch."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.streams import Experience, ExperienceDataModule
from evertune.training.trainer import ContinualTrainer
from tests.helpers.quiet import QUIET
from tests.helpers.resume_worker import Classifier, news

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
GLOBAL_BATCH = 8


class EndAt(pl.Callback):
    """Ends the run in the n-th batch of this process: with an error, or without a word."""

    across_experiences = True

    def __init__(self, batch: int | None, kill: bool) -> None:
        self.batch, self.kill, self.batches = batch, kill, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.batch:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError(f"batch {self.batch}")


def learn(
    bert: str,
    run_dir: str | None,
    strategy: str,
    out: str,
    end_at: int | None = None,
    kill: bool = True,
    dropout: float | None = None,
    processes: int = WORLD_SIZE,
    precision: Any = "32-true",
) -> dict[str, Any]:
    """Learn three experiences of five steps, two epochs each; 30 batches in all.

    ``processes`` are those that the batch size is meant for.

    Returns:
        The history, and how many batches were trained here.
    """
    torch.manual_seed(0)
    labels = [["business", "sport"], ["sport", "politics"], ["business", "politics"]]
    stream = [news(str(number), names, 5) for number, names in enumerate(labels)]
    stream = [replace(experience, test=experience.train) for experience in stream]
    module = Classifier(bert, learning_rate=1e-3, dropout=dropout)
    end = EndAt(end_at, kill)
    trainer = ContinualTrainer(
        max_epochs=2,
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=strategy,
        precision=precision,
        callbacks=[Replay(memory_size=12), EWC(ewc_lambda=50.0, n_examples=16, batch_size=4), end],
        **QUIET,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )

    def batches(experience: Experience) -> ExperienceDataModule:
        return ExperienceDataModule(experience, module.tokenizer, batch_size=GLOBAL_BATCH // processes)

    history = trainer.fit_stream(module, stream, batches, run_dir=run_dir, checkpoint_every_n_steps=3)
    module.save_pretrained(Path(out) / "model")
    for callback in trainer.callbacks:
        if isinstance(callback, Replay | EWC) and end.batches:
            callback.save(Path(out) / type(callback).__name__)
    return {"matrix": str(history.accuracy_matrix), "batches": end.batches}
