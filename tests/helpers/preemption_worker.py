"""What every process runs in the tests of preemption: it learns an update, is asked to stop, and goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.training.checkpoint import UpdateCheckpoint, latest
from evertune.training.preemption import Preempted, Preemption
from tests.helpers.resume_worker import RANK, STEPS, WORLD_SIZE, learn, load, methods, news, save, seed_all


class Ask(pl.Callback):
    """Sends a signal to this process, at a moment."""

    def __init__(self, name: str, moment: str, step: int = 0) -> None:
        self.name, self.step = name, step
        setattr(self, moment, self._ask)

    def _ask(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.Signals[self.name])


class Stopped(pl.Callback):
    """Writes down the step at which a rank was preempted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(exception, Preempted)
        (self.folder / f"stopped-{RANK}").write_text(str(trainer.global_step))


def update(
    version: str,
    out: str,
    strategy: str,
    resume: bool,
    accumulation: int = 2,
    step: int = 5,
    name: str = "SIGUSR2",
    every_n_steps: int = 1000,
) -> None:
    """Learn an update undisturbed, then once more until the last rank is asked to stop; or ``resume`` that."""
    for part in ["resumed"] if resume else ["undisturbed", "stopped"]:
        checkpoints, callbacks = Path(out) / "checkpoints", methods("replay+ewc")
        module = load(Path(version), callbacks)
        seed_all(1000 if resume else 2)
        more: list[pl.Callback] = []
        if part != "undisturbed":
            more += [Stopped(Path(out)), Preemption([name]), UpdateCheckpoint(checkpoints, every_n_steps)]
        if part == "stopped" and RANK == WORLD_SIZE - 1:
            more.append(Ask(name, "on_before_optimizer_step", step))
        experience = news("second", ["sport", "politics"], STEPS)
        ckpt_path = latest(checkpoints) if resume else None
        learn(module, experience, strategy, [*callbacks, *more], accumulation=accumulation, ckpt_path=ckpt_path)
        save(module, callbacks, Path(out) / part)


class Line(pl.LightningModule):
    """A model that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(n: int) -> DataLoader[Any]:
    return DataLoader(torch.ones(n * WORLD_SIZE, 4), batch_size=1)  # type: ignore[arg-type]


def fit(callbacks: list[pl.Callback], n_steps: int = 6, **settings: Any) -> None:
    """A fit of one epoch in a plain trainer."""
    trainer = pl.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": WORLD_SIZE,
            "strategy": "ddp" if WORLD_SIZE > 1 else "auto",
            "callbacks": callbacks,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | settings
    )
    trainer.fit(Line(), batches(n_steps), batches(1))
