"""What every rank runs in the tests of FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.lightning_modules.saving import whole_state
from evertune.streams import ExperienceDataModule
from evertune.tasks.texts import PadCollator
from evertune.training.trainer import ContinualTrainer
from evertune.utils.evaluation import evaluation_mode
from evertune.utils.sharding import gathered, is_sharded
from tests.helpers.quiet import QUIET
from tests.helpers.shard_worker import CLASSES, DEVICES, GLOBAL_BATCH, WORLD_SIZE, SmallBert, experience


class Block(nn.Module):
    """A layer of a network, with fewer rows than there could be ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.outer = nn.Linear(3, 5)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.outer(torch.tanh(self.inner(x)))


class Own(pl.LightningModule):
    """A module of the user's own, whose step uses weights and parts of it directly, and never the module itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.shift = nn.Parameter(torch.zeros(5))
        self.still = nn.Parameter(torch.ones(5), requires_grad=False)
        self.head = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(1))

    def logits(self, x: Tensor) -> Tensor:
        x = x * self.still + self.shift
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert isinstance(self.seen, Tensor)
        self.seen += 1
        decay: Tensor = self.head.weight.square().mean()
        return nn.functional.cross_entropy(self.logits(batch[0]), batch[1]) + 0.1 * decay

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.logits(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.01)


def points() -> DataLoader[Any]:
    """A single batch over all ranks: Lightning shuffles the examples of several processes."""
    generator = torch.Generator().manual_seed(1)
    rows = [(torch.randn(5, generator=generator), i % 3) for i in range(GLOBAL_BATCH)]
    return DataLoader(rows, batch_size=GLOBAL_BATCH // WORLD_SIZE)


def fit(module: pl.LightningModule, data: Any, strategy: str, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    ckpt_path = settings.pop("ckpt_path", None)
    settings = {"max_epochs": 1, **settings}
    trainer = pl.Trainer(
        accelerator="cpu", devices=DEVICES, strategy=strategy, callbacks=list(callbacks), **settings, **QUIET
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def texts(seed: int, accumulation: int = 1) -> ExperienceDataModule:
    size = GLOBAL_BATCH // WORLD_SIZE // accumulation
    data = experience(str(seed), 6, CLASSES, seed)
    return ExperienceDataModule(data, batch_size=size, collate_fn=PadCollator(0), label="labels")


def own(bert: str, out: Path, strategy: str) -> pl.LightningModule:
    """Trained twice, with validation in between."""
    module = Own()
    for _ in range(2):
        trainer = fit(module, points(), strategy, max_epochs=4)
    trainer.validate(module, points(), verbose=False)
    return module


def clipped(bert: str, out: Path, strategy: str) -> pl.LightningModule:
    module = SmallBert(bert, CLASSES, "sgd")
    fit(module, texts(1, 3), strategy, gradient_clip_val=0.05, accumulate_grad_batches=3)
    return module


def frozen(bert: str, out: Path, strategy: str) -> pl.LightningModule:
    """With embeddings and a layer that are not trained, and methods on the others."""
    module = SmallBert(bert, CLASSES, "adamw")
    module.freeze_layers = 1
    methods = [Replay(memory_size=20), EWC(ewc_lambda=50.0, n_examples=24, batch_size=4)]
    for seed in (1, 2):
        fit(module, texts(seed), strategy, *methods)
    return module


def stream(bert: str, out: Path, strategy: str) -> pl.LightningModule:
    """A stream in which the head grows, evaluated after each update."""
    module = SmallBert(bert, ["a"], "adamw")
    methods: list[pl.Callback] = [Replay(memory_size=20), EWC(ewc_lambda=50.0, n_examples=24, batch_size=4)]
    trainer = ContinualTrainer(
        max_epochs=1, accelerator="cpu", devices=DEVICES, strategy=strategy, callbacks=methods, **QUIET
    )
    parts = [experience(str(number), 4, ["a", "b", "c", "d"][number : number + 2], number) for number in range(3)]
    parts = [type(one)(one.name, one.train, test=one.train, classes=one.classes) for one in parts]

    def batches(one: Any) -> ExperienceDataModule:
        size = GLOBAL_BATCH // WORLD_SIZE
        return ExperienceDataModule(one, batch_size=size, collate_fn=PadCollator(0), label="labels")

    pl.seed_everything(1, verbose=False)
    history = trainer.fit_stream(module, parts, batches)
    module.matrix = history.accuracy_matrix  # type: ignore[assignment]
    return module


def bf16(bert: str, out: Path, strategy: str) -> pl.LightningModule:
    module = SmallBert(bert, CLASSES, "sgd")
    fit(module, texts(1), strategy, Replay(memory_size=20), precision="bf16-mixed")
    return module


SCENES: dict[str, Callable[[str, Path, str], pl.LightningModule]] = {
    one.__name__: one for one in (own, clipped, frozen, stream, bf16)
}


def learn(bert: str, out: str, strategy: str, scenes: list[str]) -> dict[str, Any]:
    """Play each scene, and write the whole weights of its module. Returns what else it left, on each rank."""
    told = {}
    for name in scenes:
        pl.seed_everything(1, verbose=False)
        module = SCENES[name](bert, Path(out), strategy)
        state = whole_state(module)
        if state:
            save_file(state, Path(out) / f"{name}.safetensors")
        with gathered(module):
            total = float(sum(p.detach().double().abs().sum() for p in module.parameters()))
        told[name] = {"total": total, "matrix": getattr(module, "matrix", None)}
    return told


def gathered_in_a_step(bert: str) -> dict[str, int]:
    """How often each unit's weights were gathered in one step of a module whose training step calls the module."""

    class Profiled(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            profile.start()

        def on_train_batch_end(self, *_: Any) -> None:
            profile.stop()

    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    fit(SmallBert(bert, CLASSES, "sgd"), texts(1), "evertune_fsdp2", Profiled(), max_steps=1)
    found = {event.key: event.count for event in profile.key_averages()}
    return {name: count for name, count in found.items() if name.partition(" ")[0] == "FSDP::all_gather"}


def left_behind(out: str) -> dict[str, Any]:
    """What of FSDP2 is left of a module after a fit, and after one that fails; and what can be done with the module."""
    strategy, module, untouched = "evertune_fsdp2", Own(), Own()
    fit(module, points(), strategy)
    found: dict[str, Any] = {"kinds": [type(one).__name__ for one in module.modules()]}
    found["expected"] = [type(one).__name__ for one in untouched.modules()]
    found["hooks"] = _hooks(module)
    found["attributes"] = sorted(
        name
        for one, other in zip(module.modules(), untouched.modules(), strict=True)
        for name in vars(one).keys() - vars(other).keys()
        if "fsdp" in name or "composable" in name or name == "forward"
    )
    found["sharded"] = [is_sharded(p) for p in module.parameters()]
    rows = next(iter(points()))[0]
    module._trainer = None  # with the optimizer's state: torch does not copy sharded tensors
    with evaluation_mode(module), gathered(module):
        expected = module.logits(rows)
        found["copied"] = torch.equal(copy.deepcopy(module).logits(rows), expected)

    class Fails(pl.Callback):
        def on_before_backward(self, *_: Any) -> None:
            raise ZeroDivisionError

    try:
        fit(module, points(), strategy, Fails())
    except ZeroDivisionError:
        found["failed"] = type(module).__name__
    with evaluation_mode(module), gathered(module):
        found["kept"] = torch.equal(module.logits(rows), expected)
    fit(module, points(), strategy)
    with evaluation_mode(module), gathered(module):
        found["learned"] = not torch.equal(module.logits(rows), expected)
    return found


def _hooks(module: nn.Module) -> list[str]:
    """The hooks of a module and its parts, without those that Lightning's own modules have."""
    return [
        str(hook)
        for part in module.modules()
        for name, hooks in vars(part).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
        for hook in hooks.values()
        if "fsdp" in str(getattr(hook, "hook", hook)).lower()
    ]


class SaveAfter(pl.Callback):
    """Writes a checkpoint after an epoch."""

    def __init__(self, path: Path, n_epochs: int) -> None:
        self.path, self.n_epochs = path, n_epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch + 1 == self.n_epochs:
            trainer.save_checkpoint(self.path)


def resume(out: str, strategy: str, part: str) -> dict[str, Any]:
    """Train 8 steps and write a checkpoint after 4 of them ("whole"); or go on from it ("resumed"), or score it."""
    pl.seed_everything(3, verbose=False)  # Lightning shuffles by it
    module, checkpoint = Own(), Path(out) / "middle.ckpt"
    if part == "whole":
        fit(module, points(), strategy, SaveAfter(checkpoint, 4), max_epochs=8)
    elif part == "resumed":
        fit(module, points(), strategy, ckpt_path=checkpoint, max_epochs=8)
    else:
        trainer = pl.Trainer(accelerator="cpu", devices=DEVICES, strategy=strategy, **QUIET)
        [found] = trainer.validate(module, points(), ckpt_path=checkpoint, verbose=False)
        return {"loss": found["loss"], "seen": float(module.seen)}  # type: ignore[arg-type]
    state = whole_state(module)
    if state:
        save_file(state, Path(out) / f"{part}.safetensors")
    return {"seen": float(module.seen)}  # type: ignore[arg-type]


def refused(out: str) -> dict[str, str]:
    """What is said to a module and a checkpoint that cannot work."""
    found = {}

    class Scalar(Own):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    class Outside(Own):
        """Uses the weight of a layer outside of it, which no rule for single examples sees."""

        def forward(self, batch: Any) -> Tensor:
            return self.logits(batch[0]) + batch[0] @ self.head.weight.T

    def error_of(action: Callable[[], Any]) -> str:
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    strategy = "evertune_fsdp2"
    found["scalar"] = error_of(lambda: fit(Scalar(), points(), strategy))
    torch.save({"state_dict": {}}, Path(out) / "other.ckpt")
    found["checkpoint"] = error_of(lambda: fit(Own(), points(), strategy, ckpt_path=Path(out) / "other.ckpt"))
    found["outside"] = error_of(lambda: fit(Outside(), points(), strategy, EWC()))
    return found
