"""What every rank runs in the tests of the DeepSpeed strategy."""

from __future__ import annotations

import gc
import resource
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import evertune
from evertune import callbacks
from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.lightning_modules.saving import load_weights, save_weights, whole_state
from evertune.shards.opened import shards_of
from evertune.streams import ExperienceDataModule
from evertune.tasks.texts import PadCollator
from evertune.training.trainer import ContinualTrainer
from tests.helpers.l2sp import L2SP
from tests.helpers.quiet import QUIET
from tests.helpers.shard_worker import CLASSES, DEVICES, GLOBAL_BATCH, WORLD_SIZE, SmallBert, experience, fit

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

    across_experiences = True

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
        **QUIET,
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


class Wide(pl.LightningModule):
    """Three layers of 512 x 512 weights each, which ZeRO-3 gathers for each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Gathered(pl.Callback):
    """Counts the numbers that are gathered in each step; at its end, whether ZeRO-3 knows what to fetch ahead."""

    def __init__(self) -> None:
        from torch.distributed import distributed_c10d

        self.per_step: list[int] = []
        self.ahead: list[bool] = []
        self._now, gather = 0, torch.distributed.all_gather_into_tensor

        def counted(*inputs: Any, **named: Any) -> Any:
            self._now += (named.get("output_tensor") if not inputs else inputs[0]).numel()
            return gather(*inputs, **named)

        for place in (torch.distributed, distributed_c10d):
            place.all_gather_into_tensor = counted

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.per_step.append(self._now)
        self._now = 0
        engine: Any = trainer.strategy.model
        self.ahead.append(engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace())


def gathered_per_step(strategy: str) -> dict[str, Any]:
    """Train six steps, and say how many numbers each gathered."""
    module, gathered = Wide(), Gathered()
    data = torch.utils.data.TensorDataset(torch.randn(24, 512))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=strategy,
        callbacks=[gathered],
        **QUIET,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())
    return {"per_step": gathered.per_step, "ahead": gathered.ahead, "hooks": hooks}


class Masters(pl.Callback):
    """The fp32 masters at both ends of a fit."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = self._masters(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = self._masters(trainer)

    @staticmethod
    def _masters(trainer: pl.Trainer) -> torch.Tensor:
        return torch.cat([value.clone() for value in shards_of(trainer).values()])


def masters_between_fits(folder: str, out: str, strategy: str) -> dict[str, Any]:
    """Train in bf16: the second fit must start from the masters of the first, not from rounded weights.

    The third starts from weights that were loaded before it, which the masters of the second must not replace.
    """
    weights = Path(out) / "first.safetensors"
    pl.seed_everything(0, verbose=False)
    module, masters = SmallBert(folder, CLASSES, "adamw"), Masters()
    fit(module, experience("first", 3, CLASSES, 1), strategy, 1, [masters], precision="bf16-mixed")
    end = masters.end
    save_weights(module, weights)
    torch.distributed.barrier()
    fit(module, experience("second", 3, CLASSES, 2), strategy, 1, [masters], precision="bf16-mixed")
    start = masters.start
    load_weights(module, weights)
    fit(module, experience("third", 3, CLASSES, 3), strategy, 1, [masters], precision="bf16-mixed")
    return {
        "carried": torch.equal(start, end),
        "loaded": torch.equal(masters.start.bfloat16(), end.bfloat16()),
        "finer_than_bf16": not torch.equal(end, end.bfloat16().float()),
        "dtype": str(start.dtype),
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


def l2sp(folder: str, out: str, strategy: str, resume: bool) -> dict[str, Any]:
    """Learn two experiences with the method of the documents, or go on from a checkpoint in the second."""
    pl.seed_everything(3, verbose=False)
    module, method = SmallBert(folder, CLASSES, "adamw"), L2SP(strength=0.1)
    second, checkpoint = experience("second", 6, ["b", "c"], 2), Path(out) / "middle.ckpt"
    if resume:
        fit(module, second, strategy, 1, [method], ckpt_path=checkpoint)
    else:
        fit(module, experience("first", 4, ["a", "b"], 1), strategy, 1, [method])
        method.save(Path(out) / "l2sp")
        state = whole_state(module)
        if state:
            save_file(state, Path(out) / "first.safetensors")
        fit(module, second, strategy, 1, [method, SaveAt(checkpoint, 3)])
    return {"weights": digests(whole_state(module)), "repr": repr(method)}


def l2sp_elsewhere(folder: str, out: str) -> dict[str, Any]:
    """What two ranks have saved, on one process."""
    from safetensors.torch import load_file

    module, method, found = SmallBert(folder, CLASSES, "sgd"), L2SP(), {}
    method.load(Path(out) / "l2sp")

    class Looks(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert method._state is not None
            pairs = zip(method._state.fragments, method.tensors["anchor"], strict=True)
            found.update({f.name: value.view(f.shape).clone() for f, value in pairs})

    fit(module, experience("third", 1, ["a", "c"], 3), "auto", 1, [method, Looks()])
    return {"loaded": digests(found), "expected": digests(load_file(f"{out}/first.safetensors"))}


def _quadratic() -> list[Any]:
    return [
        callbacks.L2SP(0.5, to="previous", coupling="decoupled"),
        callbacks.MAS(20.0, n_examples=30, batch_size=4),
        callbacks.SynapticIntelligence(20.0),
    ]


def learn_and_save(folder: str, out: str, strategy: str) -> None:
    """Learn an experience with three methods on weights; write the weights and what the methods keep."""
    pl.seed_everything(3, verbose=False)
    module, methods = SmallBert(folder, CLASSES, "sgd"), _quadratic()
    fit(module, experience("first", 4, ["a", "b"], 1), strategy, 1, methods)
    for method in methods:
        method.save(Path(out) / type(method).__name__)
    state = whole_state(module)
    if state:
        save_file(state, Path(out) / "first.safetensors")


def load_and_learn(folder: str, out: str, strategy: str) -> None:
    """Learn another experience with what was saved, and write the weights."""
    pl.seed_everything(3, verbose=False)
    module, methods = SmallBert(folder, CLASSES, "sgd"), _quadratic()
    module.configure_model()
    load_weights(module, Path(out) / "first.safetensors")
    for method in methods:
        method.load(Path(out) / type(method).__name__)
    fit(module, experience("second", 3, ["b", "c"], 2), strategy, 1, methods)
    state = whole_state(module)
    if state:
        save_file(state, Path(out) / f"{strategy}.safetensors")


def digests(state: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}


class Tied(pl.LightningModule):
    """A module of the user's own: two layers share their weights, and there is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(40, 16)
        self.hidden = torch.nn.Linear(16, 16)
        self.out = torch.nn.Linear(16, 40, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("temperature", torch.tensor([2.0]))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        logits = self.out(torch.tanh(self.hidden(self.embed(batch)))) / self.temperature
        return torch.nn.functional.cross_entropy(logits, batch.roll(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveInside(pl.Callback):
    """Writes the weights in the middle of a fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            evertune.save_weights(trainer, self.path)


def save_own_module(out: str, strategy: str) -> list[str]:
    """Fit a module of the user's own; write its weights within the fit and after it."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=DEVICES,
        strategy=strategy,
        callbacks=[SaveInside(Path(out) / "new" / "inside.safetensors")],
        **QUIET,
        use_distributed_sampler=False,  # every rank learns the same
    )
    data = torch.randint(40, (32,), generator=torch.Generator().manual_seed(1))
    trainer.fit(Tied(), torch.utils.data.DataLoader(data, batch_size=8))  # type: ignore[arg-type]
    evertune.save_weights(trainer, f"{out}/after.safetensors")
    return sorted(path.name for path in Path(out).rglob("*") if path.is_file())
