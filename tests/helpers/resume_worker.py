"""What every process runs in the tests of a killed update: it learns a version, dies when told to, and goes on."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evertune._lightning import pl
from evertune.callbacks import EWC, ContinualCallback, DriftTrigger, Replay
from evertune.drift import MMD, HashedNgrams
from evertune.lightning_modules import SequenceClassificationModule
from evertune.shards.fragments import FragmentState
from evertune.shards.opened import shards_of
from evertune.shards.optimizer_state import PortableShards
from evertune.shards.support import is_deepspeed, is_sharded
from evertune.shards.zero import FrozenZero3Shards
from evertune.streams import Experience, ExperienceDataModule
from evertune.training.checkpoint import UpdateCheckpoint, latest
from evertune.training.trainer import ContinualTrainer
from tests.helpers.lightning_modules import TEXTS, WORDS

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
GLOBAL_BATCH, STEPS, EPOCHS = 8, 10, 3


class Classifier(SequenceClassificationModule):
    """The module that users have, with an optimizer that does not blow up the rounding of gradients that are zero."""

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        for group in made["optimizer"].param_groups:
            group["eps"] = 1e-5
        return made


def news(name: str, labels: list[str], n_steps: int) -> Experience:
    """Texts of some labels with a word of chance each."""
    chance = random.Random(name)
    rows = []
    for number in range(n_steps * GLOBAL_BATCH):
        label = labels[number % len(labels)]
        text = f"{chance.choice(TEXTS[label])} {' '.join(chance.choices(WORDS, k=chance.randrange(1, 6)))}"
        rows.append({"id": f"{name}-{number}", "text": text, "label": label})
    return Experience(name, rows, classes=labels)


def methods(name: str) -> list[pl.Callback]:
    """Learning methods; "drift" lets alarms end experiences in the middle of the update."""
    made: list[pl.Callback] = [Replay(memory_size=24)]
    if name != "replay":
        made.append(EWC(ewc_lambda=50.0, n_examples=24, batch_size=4))
    if name == "drift":
        made.append(DriftTrigger(MMD(arl=40, reference_size=64, window_size=16), HashedNgrams(16)))
    return made


def learn(
    module: SequenceClassificationModule,
    experience: Experience,
    strategy: str,
    callbacks: list[pl.Callback],
    epochs: int = EPOCHS,
    accumulation: int = 2,
    ckpt_path: Path | None = None,
    precision: Any = "32-true",
    batch_size: int | None = None,
    step_size: int | None = None,
) -> ContinualTrainer:
    trainer = ContinualTrainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=strategy,
        accumulate_grad_batches=accumulation,
        precision=precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(one, UpdateCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch_size = batch_size or GLOBAL_BATCH // WORLD_SIZE // accumulation
    data = ExperienceDataModule(experience, module.tokenizer, batch_size=batch_size)
    trainer.fit_experience(module, experience, data, ckpt_path=ckpt_path, step_size=step_size)
    return trainer


def save(module: SequenceClassificationModule, callbacks: list[pl.Callback], folder: Path) -> None:
    """Write what an update leaves: the model and what each method has learned."""
    folder.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(folder / "model")
    for callback in callbacks:
        if isinstance(callback, ContinualCallback):
            callback.save(folder / type(callback).__name__)


def load(version: Path, callbacks: list[pl.Callback], **settings: Any) -> SequenceClassificationModule:
    for callback in callbacks:
        if isinstance(callback, ContinualCallback) and (version / type(callback).__name__).is_dir():
            callback.load(version / type(callback).__name__)
    return Classifier.from_pretrained(version / "model", lazy=True, **settings)


def seed_all(seed: int) -> None:
    """Other random numbers on every rank, so that dropout tells whose state has come back."""
    random.seed(seed + RANK)
    np.random.seed(seed + RANK)
    torch.manual_seed(seed + RANK)


class Kill(pl.Callback):
    """SIGKILL, at a moment of a step."""

    def __init__(self, step: int, moment: str) -> None:
        self.step = step
        setattr(self, moment, self._kill)

    def _kill(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            die()


class KillWhileSaving(UpdateCheckpoint):
    """SIGKILL, while the checkpoint of a step is written: half a file, all files, or before the older one is gone."""

    def __init__(self, directory: Path, every_n_steps: int, step: int, moment: str) -> None:
        super().__init__(directory, every_n_steps)
        self.step, self.moment = step, moment

    def _save(self, trainer: pl.Trainer) -> None:
        calls = {"half": "save_checkpoint", "unnamed": "barrier"}
        if trainer.global_step >= self.step and self.moment in calls:
            self._instead(trainer, calls[self.moment])
        super()._save(trainer)

    def _instead(self, trainer: pl.Trainer, name: str) -> None:
        call: Callable[..., Any] = getattr(trainer.strategy, name)

        def call_and_die(*arguments: Any, **settings: Any) -> None:
            call(*arguments, **settings)
            if name == "save_checkpoint" and RANK == 0:
                for path in self.directory.rglob(".step-*/**/*"):
                    if path.is_file():
                        os.truncate(path, path.stat().st_size // 2)
            if name == "save_checkpoint" or "the parts of a checkpoint" in arguments:
                die()

        setattr(trainer.strategy, name, call_and_die)

    def _remove_all_but(self, kept: Path | None) -> None:
        if self.moment == "removing" and kept is not None and int(kept.name[5:]) >= self.step:
            die()
        super()._remove_all_but(kept)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def first(bert: str, out: str) -> None:
    """The version in production."""
    seed_all(1)
    callbacks = methods("replay+ewc")
    module = Classifier(bert, classes=["business"], learning_rate=1e-3)
    learn(module, news("first", ["business", "sport"], 4), "auto", callbacks, epochs=1)
    save(module, callbacks, Path(out))


def update(
    version: str, out: str, strategy: str, method: str, kill: dict[str, Any] | None = None, resume: bool = False
) -> list[dict[str, Any]]:
    """Learn an update undisturbed, then once more until killed; or ``resume`` that and finish it.

    Returns:
        The alarms of the drift trigger, and where the fit started.
    """
    told = []
    for part in ["resumed"] if resume else ["undisturbed", "killed"]:
        checkpoints, callbacks = Path(out) / "checkpoints", methods(method)
        module = load(Path(version), callbacks)
        seed_all(1000 if resume else 2)
        more: list[pl.Callback] = [Started()]
        if resume:
            more.append(UpdateCheckpoint(checkpoints, every_n_steps=4))
        elif part == "killed":
            assert kill is not None
            if kill["moment"] in ("half", "unnamed", "removing"):
                more.append(KillWhileSaving(checkpoints, 4, **kill))
            else:
                more += [UpdateCheckpoint(checkpoints, every_n_steps=4), Kill(**kill)]
        experience = news("second", ["sport", "politics"], STEPS)
        ckpt_path = latest(checkpoints) if resume else None
        learn(module, experience, strategy, [*callbacks, *more], ckpt_path=ckpt_path)
        save(module, callbacks, Path(out) / part)
        alarms = [test["alarm"] for one in callbacks if isinstance(one, DriftTrigger) for test in one.history]
        told.append({"start": more[0].step, "alarms": alarms})  # type: ignore[attr-defined]
    return told


class Started(pl.Callback):
    """The step at which training started."""

    step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step


class Steps(pl.Callback):
    """What this rank trains on in each optimizer step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[Any]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True)
        texts = [[[token for token, on in zip(ids, mask, strict=True) if on], label] for ids, mask, label in rows]
        self.steps.setdefault(f"{trainer.current_epoch}, {trainer.global_step}", []).extend(texts)


def one_of_three(bert: str, parent: str | None, out: str, strategy: str, number: int) -> dict[str, Any]:
    """One of three updates, without dropout: what ranks drop is their own."""
    callbacks, steps = methods("replay+ewc"), Steps()
    seed_all(number)
    labels = [["business", "sport"], ["sport", "politics"], ["business", "politics"]][number]
    settings = {"dropout": 0.0, "learning_rate": 1e-3}
    torch.manual_seed(number)  # of the head's new rows, on all ranks
    module = load(Path(parent), callbacks) if parent else Classifier(bert, classes=["business"], **settings)  # type: ignore[arg-type]
    learn(module, news(str(number), labels, 6), strategy, [*callbacks, steps], epochs=2)
    save(module, callbacks, Path(out))
    return steps.steps


def resume_elsewhere(version: str, out: str, strategy: str) -> str:
    """Resume a checkpoint that other processes have written; tell the error."""
    callbacks = methods("replay+ewc")
    module = load(Path(version), callbacks)
    checkpoint = UpdateCheckpoint(Path(out) / "checkpoints", every_n_steps=4)
    try:
        learn(
            module,
            news("second", ["sport", "politics"], STEPS),
            strategy,
            [*callbacks, checkpoint],
            ckpt_path=latest(checkpoint.directory),
        )
    except ValueError as error:
        return str(error)
    return ""


def elastic(
    version: str,
    out: str,
    strategy: str,
    part: str,
    method: str = "replay+ewc",
    at_most: int = 2,
    kill: dict[str, Any] | None = None,
    precision: Any = "32-true",
) -> dict[str, Any]:
    """Learn an update without dropout on any number of processes, until killed; or go on with it ("resumed").

    Returns:
        Where the fit started, its batches, and the texts that this rank trained on in each step; or the error.
    """
    checkpoints, callbacks, steps, started = Path(out) / "checkpoints", methods(method), Steps(), Started()
    module = load(Path(version), callbacks, dropout=0.0)
    seed_all(1000 if part == "resumed" else 2)
    torch.manual_seed(5)  # of the head's new rows, on all ranks
    more = [steps, started, UpdateCheckpoint(checkpoints, every_n_steps=4), Held(Path(out) / f"{part}-held")]
    if kill is not None:
        more.append(Kill(**kill))
    try:
        trainer = learn(
            module,
            news("second", ["sport", "politics"], STEPS),
            strategy,
            [*callbacks, *more],
            accumulation=1,
            ckpt_path=latest(checkpoints) if part == "resumed" else None,
            precision=precision,
            batch_size=at_most,
            step_size=GLOBAL_BATCH,
        )
    except ValueError as error:
        return {"error": str(error)}
    save(module, callbacks, Path(out) / part)
    alarms = [test["alarm"] for one in callbacks if isinstance(one, DriftTrigger) for test in one.history]
    batches = [trainer.train_dataloader.batch_size, trainer.accumulate_grad_batches]  # type: ignore[union-attr]
    return {"start": started.step, "layout": batches, "steps": steps.steps, "alarms": alarms}


class Held(pl.Callback):
    """Writes what the ranks hold under ZeRO or FSDP2 at step 12, as training starts there or at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != 12 or (self.folder / "index.json").exists() or not is_sharded(trainer):
            return
        shards = shards_of(trainer)
        engine: Any = trainer.strategy.model
        assert isinstance(shards, PortableShards)
        optimizer = shards.optimizer_state()
        weights = dict(trainer.lightning_module.named_parameters())
        for fragment, master in zip(shards.fragments, shards.values(), strict=True) if is_deepspeed(trainer) else ():
            weight: Any = weights[fragment.name]
            own = weight.ds_tensor[: fragment.numel] if hasattr(weight, "ds_tensor") else fragment.slice(weight)
            assert torch.equal(own, master.to(own.dtype))
        told: dict[str, Any] = {
            "scalars": {name: float(values["step"]) for name, values in optimizer.scalars.items()},
            "groups": str(optimizer.groups[0]["lr"]),
        }
        if is_deepspeed(trainer):
            scaler = getattr(engine.optimizer, "loss_scaler", None)  # not where bf16 accumulates in fp32
            told |= {
                "counters": [engine.global_steps, engine.micro_steps // engine.gradient_accumulation_steps()],
                "scale": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler else None,
            }
        FragmentState.of(shards, {"value": shards.values(), **optimizer.tensors}).save(self.folder, told)


class Still(pl.LightningModule):
    """Has weights that are not trained, and buffers; their values are the rank's once they were moved."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = torch.nn.Linear(3, 3), torch.nn.Linear(3, 5).requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(3)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.frozen(self.norm(self.trained(batch))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def still(out: str, strategy: str, part: str) -> dict[str, Any]:
    """Fit a few steps; tell the weights that are not trained, and a buffer, as training starts."""
    module, told = Still(), Told()
    if part == "first":
        torch.nn.init.constant_(module.frozen.weight, 7.0)
    module.norm.running_mean.fill_(RANK + 1.0)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[told, UpdateCheckpoint(out, every_n_steps=4)],
    )
    ckpt_path = latest(out) if part == "resumed" else None
    batches = torch.randn(20, 3, generator=torch.Generator().manual_seed(RANK))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=2), ckpt_path=ckpt_path)
    return told.told


class Told(pl.Callback):
    """A module's still parts at the end of step 4, or as training starts there."""

    told: dict[str, Any]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._tell(trainer, pl_module)

    def _tell(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step == 4:
            weight = module.frozen.weight
            if hasattr(weight, "ds_tensor"):
                engine: Any = trainer.strategy.model
                weight = FrozenZero3Shards(module, engine).values()[0]
            self.told = {"weight": weight.unique().tolist(), "mean": module.norm.running_mean.tolist()}
