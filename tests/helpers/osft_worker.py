"""What every rank runs in the tests of OSFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks import OSFT, ContinualCallback
from evertune.lightning_modules.saving import load_weights, save_weights, whole_state
from evertune.shards import subspaces
from evertune.shards.opened import shards_of
from evertune.shards.shards import Fragment, ParameterShards
from evertune.shards.subspaces import Sides, Subspaces
from evertune.strategies import EvertuneDeepSpeedStrategy
from evertune.utils.ranks import rank_and_world_size
from tests.helpers.shard_worker import CLASSES, SmallBert, experience, fit
from tests.helpers.strategy_worker import SaveAt, digests


def protected(start: Tensor, end: Tensor, ratio: float, sides: str = "either") -> float:
    """The share of a matrix's change in its protected space, a ratio of norms; float64, by the definition."""
    change = end.double() - start.double()
    left, _, right = torch.linalg.svd(start.double(), full_matrices=False)
    rank = int(ratio * min(start.shape))
    u, v = left[:, :rank] @ left[:, :rank].T, right[:rank].T @ right[:rank]
    allowed = change - u @ change @ v
    if sides == "either":
        allowed = (torch.eye(len(u)) - u) @ change @ (torch.eye(len(v)) - v)
    return float((change - allowed).norm() / change.norm())


def whole(shards: ParameterShards) -> dict[str, Tensor]:
    """All weights in fp32, as the strategy keeps them, put together on every rank."""
    found = {name: torch.zeros(shape) for name, shape in shards.shapes.items()}
    for fragment, value in zip(shards.fragments, shards.values(), strict=True):
        fragment.slice(found[fragment.name]).copy_(value)
    if shards.sharded:
        for value in found.values():
            shards.sum_over_ranks(value)
    return found


class Watch(pl.Callback):
    """The weights at the start and at the end of a fit."""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.start = whole(shards_of(trainer))

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.end = whole(shards_of(trainer))


class Decays(SmallBert):
    """Large steps: what fp32 rounds is 1e-7 of the weights, however little they move. Two groups of parameters."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": list(self.parameters())[start::2]} for start in (0, 1)]
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(groups, lr=2.0, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(groups, lr=5e-3, weight_decay=0.5)


def leaks(folder: str, strategy: str, runs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """For each run, the largest share of the change of a matrix in its protected space in each of two experiences."""
    found = []
    for run in runs:
        module, osft, watch = Decays(folder, CLASSES, run["optimizer"]), OSFT((0.3, 0.6), run["sides"]), Watch()
        told = {}
        for number, ratio in enumerate((0.3, 0.6)):
            data = experience(str(number), 8, CLASSES, number)
            # As with a large model, whose masters DeepSpeed updates in several steps.
            parts = EvertuneDeepSpeedStrategy(stage=3, sub_group_size=1_000)
            settings = {"precision": run.get("precision", "32-true"), "gradient_clip_val": 0.5}
            chosen: Any = parts if strategy == "stage 3 in parts" else strategy
            fit(module, data, chosen, run.get("accumulation", 1), [osft, watch], **settings)
            shares = [
                protected(start, watch.end[name], ratio, run["sides"])
                for name, start in watch.start.items()
                if start.ndim == 2 and "embeddings" not in name and "head" not in name
            ]
            assert len(shares) == 12  # 2 layers of 6 matrices
            told[f"{ratio}"] = max(shares)
            free = [n for n, start in watch.start.items() if torch.equal(start, watch.end[n])]
            assert not free, free
        found.append(told)
    return found


def resume(folder: str, out: str, strategy: str, part: str) -> dict[str, str]:
    """Learn two experiences ("whole"), writing a checkpoint in the second; or go on from it ("resumed")."""
    pl.seed_everything(3, verbose=False)
    module, osft = SmallBert(folder, CLASSES, "adamw"), OSFT((0.3, 0.6))
    second, checkpoint = experience("second", 8, ["b", "c"], 2), Path(out) / "middle.ckpt"
    if part == "whole":
        fit(module, experience("first", 4, ["a", "b"], 1), strategy, 1, [osft])
        fit(module, second, strategy, 1, [osft, SaveAt(checkpoint, 5)])
    else:
        fit(module, second, strategy, 1, [osft], ckpt_path=checkpoint)
    assert osft.experience_index == 2
    return digests(whole_state(module))


class SaveMethod(pl.Callback):
    """Writes the weights and what a method keeps, after a step."""

    def __init__(self, method: ContinualCallback, out: str, step: int) -> None:
        self.method, self.out, self.step = method, Path(out), step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.method.save(self.out / "method")
            weights = whole(shards_of(trainer))
            pl_module.load_state_dict(weights, strict=False)
            save_weights(pl_module, self.out / "middle.safetensors")
            trainer.should_stop = True


def learn_and_save(folder: str, out: str) -> None:
    """Learn an experience and three steps of another under ZeRO-2, and write what there is then."""
    module, osft = SmallBert(folder, CLASSES, "sgd"), OSFT((0.3, 0.6))
    strategy = "evertune_deepspeed_stage_2"
    fit(module, experience("first", 3, ["a", "b"], 1), strategy, 1, [osft])
    fit(module, experience("second", 5, ["b", "c"], 2), strategy, 1, [osft, SaveMethod(osft, out, 3)])


def load_and_step(folder: str, out: str, strategy: str, load: bool = True) -> None:
    """Take the next step of the second experience, and write the weights."""
    module, osft = SmallBert(folder, CLASSES, "sgd"), OSFT((0.3, 0.6))
    module.configure_model()
    load_weights(module, Path(out) / "middle.safetensors")
    if load:
        osft.load(Path(out) / "method")
        assert osft.experience_index == 1
    fit(module, experience("third", 1, ["a", "c"], 3), strategy, 1, [osft])
    save_weights(module, Path(out) / f"{strategy if load else 'fresh'}.safetensors")


class Cut(ParameterShards):
    """Matrices that are cut anywhere, as ZeRO cuts them."""

    def __init__(self, matrices: dict[str, Tensor], starts: dict[str, list[int]]) -> None:
        rank, world_size = rank_and_world_size()
        self.sharded = world_size > 1
        fragments, self._values = [], []
        for name, value in matrices.items():
            start, end = [*starts[name], value.numel()][rank : rank + 2] if self.sharded else (0, value.numel())
            if end > start:
                fragments.append(Fragment(name, value.shape, start, end - start))
                self._values.append(fragments[-1].slice(value).clone())
        super().__init__({name: value.shape for name, value in matrices.items()}, fragments)

    def values(self) -> list[Tensor]:
        return self._values

    def gradients(self) -> list[Tensor]:
        raise NotImplementedError

    def set_values(self, values: list[Tensor]) -> None:
        raise NotImplementedError


SHAPES = {"tall": (9, 5), "wide": (5, 11), "zero": (4, 4), "row": (1, 7), "free": (3, 3), "low": (6, 6)}
STARTS = {
    "tall": [0, 13, 31],
    "wide": [0, 0, 54],  # the first rank holds nothing, and one row is of two ranks
    "zero": [0, 5, 6],  # a row of three ranks
    "row": [0, 2, 7],
    "free": [0, 3, 6],
    "low": [0, 12, 24],
}
RANKS = {"tall": 2, "wide": 3, "zero": 2, "row": 1, "free": 0, "low": 4}


def matrices(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if seed == 0:
        found["zero"].zero_()
        found["low"] = found["low"][:, :2] @ found["low"][:2]  # of rank 2: only two of its directions are real
    return found


def in_group(cases: list[tuple[Sides, int | None]]) -> list[dict[str, Any]]:
    """Changes of cut matrices without their protected directions, put together again."""
    torch.distributed.init_process_group("gloo")
    told, usual = [], subspaces._BUCKET
    for sides, bucket in cases:
        subspaces._BUCKET = bucket or usual
        weights, changes = Cut(matrices(0), STARTS), Cut(matrices(1), STARTS)
        found = Subspaces(weights, weights.values(), RANKS, sides)
        for names in (["tall", "wide", "zero", "row", "free"], ["low"]):  # as ZeRO may divide a step
            numbers = [number for number, fragment in enumerate(changes.fragments) if fragment.name in names]
            found.remove(names, {number: changes.values()[number] for number in numbers})
        kept = sum(basis.numel() for one in found._matrices.values() for basis in (one.left, one._right))
        told.append({"changes": {name: value.tolist() for name, value in whole(changes).items()}, "kept": kept})
    return told
