"""What every rank runs in the tests of the DeepSpeed strategy."""

from __future__ import annotations

import gc
import resource
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.lightning_modules.saving import whole_state
from evertune.shards.shards import ParameterShards
from evertune.streams import ExperienceDataModule
from evertune.tasks.texts import PadCollator
from evertune.training.trainer import ContinualTrainer
from tests.helpers.shard_worker import CLASSES, GLOBAL_BATCH, WORLD_SIZE, SmallBert, experience, fit

NAMES = ["a", "b", "c", "d", "e", "f"]


def engines() -> int:
    """How many DeepSpeed engines this process holds."""
    from deepspeed import DeepSpeedEngine

    gc.collect()
    return sum(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects())


def tensor_bytes() -> int:
    """The storage of all tensors this process holds."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


class Census(pl.Callback):
    """Counts engines and bytes at the same moment of each update."""

    def __init__(self) -> None:
        self.engines: list[int] = []
        self.tensor_bytes: list[int] = []
        self.peak_kib: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            self.engines.append(engines())
            self.tensor_bytes.append(tensor_bytes())
            self.peak_kib.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def five_updates(folder: str, strategy: str) -> dict[str, Any]:
    """Learn five experiences, the head growing with each."""
    pl.seed_everything(0, verbose=False)
    module, census = SmallBert(folder, NAMES[:1], "adamw"), Census()
    trainer = ContinualTrainer(
        max_epochs=1,
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=strategy,
        callbacks=[Replay(memory_size=30), EWC(n_examples=24, batch_size=6), census],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    stream = [experience(str(i), 4, NAMES[i : i + 2], i) for i in range(5)]

    def batches(one: Any) -> ExperienceDataModule:
        one = one if one.test is not None else type(one)(one.name, one.train, test=one.train, classes=one.classes)
        return ExperienceDataModule(
            one, batch_size=GLOBAL_BATCH // WORLD_SIZE, collate_fn=PadCollator(0), label="labels"
        )

    history = trainer.fit_stream(module, stream, batches)
    return {
        "engines": census.engines,
        "tensor_bytes": census.tensor_bytes,
        "peak_kib": census.peak_kib,
        "alive": engines(),
        "rows": len(history.accuracy_matrix),
        "head": list(whole_state(module)["head.weight"].shape) if trainer.is_global_zero else _take_part(module),
        "memory": history.memory["size"],
    }


def _take_part(module: pl.LightningModule) -> None:
    whole_state(module)


class Masters(pl.Callback):
    """The fp32 masters at both ends of a fit."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = self._masters(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = self._masters(trainer)

    @staticmethod
    def _masters(trainer: pl.Trainer) -> torch.Tensor:
        return torch.cat([value.clone() for value in ParameterShards.of(trainer).values()])


def masters_between_fits(folder: str, strategy: str) -> dict[str, Any]:
    """Train twice in bf16: the second fit must start from the masters of the first, not from rounded weights."""
    pl.seed_everything(0, verbose=False)
    module, masters = SmallBert(folder, CLASSES, "adamw"), Masters()
    fit(module, experience("first", 3, CLASSES, 1), strategy, 1, [masters], precision="bf16-mixed")
    end = masters.end
    fit(module, experience("second", 3, CLASSES, 2), strategy, 1, [masters], precision="bf16-mixed")
    return {
        "carried": torch.equal(masters.start, end),
        "finer_than_bf16": not torch.equal(end, end.bfloat16().float()),
        "dtype": str(masters.start.dtype),
    }


class SaveAt(pl.Callback):
    """Writes a checkpoint after a step and stops there."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def resume(folder: str, out: str, strategy: str, part: str) -> None:
    """Learn two experiences ("whole"), writing a checkpoint in the second; or go on from it ("resumed")."""
    pl.seed_everything(3, verbose=False)
    module = SmallBert(folder, CLASSES, "adamw")
    methods: list[pl.Callback] = [
        Replay(memory_size=30),
        EWC(ewc_lambda=50.0, n_examples=30, batch_size=4),
    ]
    second, checkpoint = experience("second", 8, ["b", "c"], 2), Path(out) / "middle.ckpt"
    if part == "whole":
        fit(module, experience("first", 4, ["a", "b"], 1), strategy, 1, list(methods))
        fit(module, second, strategy, 1, [*methods, SaveAt(checkpoint, 5)])
        methods[1].save(Path(out) / "ewc")  # type: ignore[attr-defined]
    else:
        fit(module, second, strategy, 1, list(methods), ckpt_path=checkpoint)
    state = whole_state(module)
    if state:
        save_file(state, Path(out) / f"{part}.safetensors")


def ewc_elsewhere(folder: str, out: str, strategy: str, weights: str, saved: str) -> None:
    """Learn an experience with the importance that other ranks have saved, from the weights they left."""
    from safetensors.torch import load_file

    pl.seed_everything(3, verbose=False)
    module, ewc = SmallBert(folder, CLASSES, "sgd"), EWC(ewc_lambda=50.0, n_examples=30, batch_size=4)
    module.configure_model()
    module.load_state_dict(load_file(weights))
    ewc.load(saved)
    fit(module, experience("third", 6, ["a", "c"], 3), strategy, 1, [ewc])
    state = whole_state(module)
    if state:
        save_file(state, Path(out) / f"{strategy}.safetensors")
