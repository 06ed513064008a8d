"""An update that is killed and resumed ends in the same bits as an undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from evertune.callbacks import EWC, ContinualCallback, Replay
from evertune.callbacks.base import end_experience
from evertune.lightning_modules import SequenceClassificationModule
from evertune.streams import ExperienceDataModule
from evertune.streams.datamodule import PadCollator
from tests.shard_worker import CLASSES, SmallBert, experience, make_bert
from tests.shard_worker import fit as fit_on_one


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bert(tmp_path_factory.mktemp("bert"))


class Seen(pl.Callback):
    """The batches trained on; saves a checkpoint after a step."""

    def __init__(self, path: Path | None = None, step: int = -1) -> None:
        self.path, self.step = path, step
        self.batches: list[Any] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.path is not None and self.step == -1 and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self.batches.append(batch["input_ids"].tolist())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("loader", "step"), [("resumable", 3), ("resumable", 7), ("resumable", -1), ("plain", -1), ("workers", -1)]
)
def test_a_schedule_that_asks_for_the_length_of_the_fit_resumes_with_the_next_batch(
    bert: str, loader: str, step: int, tmp_path: Path
) -> None:
    """Lightning then sets the loader up before it has read where the checkpoint left it."""

    def fit(module: pl.LightningModule, callbacks: list[pl.Callback], n_epochs: int, ckpt_path: Any = None) -> None:
        trainer = pl.Trainer(
            max_epochs=n_epochs,
            accelerator="cpu",
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data: Any = ExperienceDataModule(
            experience(str(n_epochs), 5, CLASSES, n_epochs), batch_size=12, collate_fn=PadCollator(0), label="labels"
        )
        if loader != "resumable":
            data = DataLoader(
                data.experience.train, batch_size=12, collate_fn=PadCollator(0), num_workers=2 * (loader == "workers")
            )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)

    whole, resumed = Seen(tmp_path / "a.ckpt", step), Seen()
    module, twin = (SequenceClassificationModule(bert, classes=CLASSES, dropout=0.0) for _ in range(2))
    replay, another = Replay(memory_size=10), Replay(memory_size=10)
    fit(module, [replay], 1)
    fit(module, [replay, whole], 2)
    fit(twin, [another, resumed], 2, tmp_path / "a.ckpt")
    assert resumed.batches == whole.batches[5 if step == -1 else step :]
    assert another.memory.ids == replay.memory.ids
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


class Split(pl.Callback):
    """Ends an experience in the middle of a fit, as a ``DriftTrigger`` does."""

    splits_fit = True

    def __init__(self, method: ContinualCallback, step: int) -> None:
        self.method, self.step = method, step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            end_experience(self.method, trainer, pl_module)
            self.method.on_experience_start(trainer, pl_module)


@pytest.mark.parametrize("step", [4, 9])
def test_what_ewc_has_seen_comes_back_and_the_folder_it_was_loaded_from_does_not(
    bert: str, step: int, tmp_path: Path
) -> None:
    def fit(seed: int, ewc: EWC, *callbacks: pl.Callback, ckpt_path: Any = None) -> pl.LightningModule:
        pl.seed_everything(0, verbose=False)
        module = SmallBert(bert, CLASSES, "adamw")
        data = experience("one", 14, CLASSES, seed)
        fit_on_one(module, data, "auto", 1, [ewc, *callbacks], ckpt_path)
        return module

    first = EWC(n_examples=24)
    fit(1, first)
    first.save(tmp_path / "ewc")
    whole, resumed = EWC(n_examples=48), EWC(n_examples=48)
    whole.load(tmp_path / "ewc")
    resumed.load(tmp_path / "ewc")
    module = fit(2, whole, Split(whole, 6), Seen(tmp_path / "a.ckpt", step))
    twin = fit(2, resumed, Split(resumed, 6), ckpt_path=tmp_path / "a.ckpt")
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "whole/index.json").read_bytes() == (tmp_path / "resumed/index.json").read_bytes()
