"""Small modules and loops in float64 for the tests of methods that compare logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from evertune._lightning import pl
from evertune.streams import Experience, ExperienceDataModule
from tests.helpers.quiet import QUIET

RATE = 0.1


class Points(Dataset[tuple[Tensor, int, int]]):
    """Three numbers, a class and the number of the example, by which a test recognises it."""

    def __init__(self, targets: Sequence[int], start: int = 0) -> None:
        self.targets, self.start = list(targets), start

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        number = self.start + index
        x = torch.randn(3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        return {"x": x, "number": number, "labels": self.targets[index]}


class Net(pl.LightningModule):
    """A network in float64 that notes which examples each step had."""

    def __init__(self, n_classes: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(3, 5, dtype=torch.float64)
        self.head = nn.Linear(5, n_classes, dtype=torch.float64)
        self.numbers: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.numbers.append(batch["number"].tolist())
        return F.cross_entropy(self(batch["x"]), batch["labels"])

    def grow(self, n_classes: int) -> None:
        old, self.head = self.head, nn.Linear(5, n_classes, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight[: old.out_features], self.head.bias[: old.out_features] = old.weight, old.bias

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def fit(module: pl.LightningModule, data: Any, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    trainer = quiet(*callbacks, **settings)
    trainer.fit(module, data if isinstance(data, DataLoader) else DataLoader(data, batch_size=4))
    return trainer


def learn(module: pl.LightningModule, data: Any, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> None:
    """A fit in random order that can be resumed in the middle of an epoch."""
    batches = ExperienceDataModule(Experience("one", data), batch_size=4, collate_fn=default_collate, label="labels")
    quiet(*callbacks).fit(module, datamodule=batches, ckpt_path=ckpt_path)


def quiet(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        **QUIET,
        **{"max_epochs": 1, **settings},
    )


class SaveAt(pl.Callback):
    """Writes a checkpoint after the second step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def logits_of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network of :class:`Net`, written once more."""
    hidden = torch.tanh(x @ weights["body.weight"].T + weights["body.bias"])
    return hidden @ weights["head.weight"].T + weights["head.bias"]


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def step(weights: dict[str, Tensor], loss: Any) -> dict[str, Tensor]:
    """A step of gradient descent on ``loss(weights)``."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    gradients = torch.autograd.grad(loss(leaves), list(leaves.values()))
    return {name: value - RATE * g for (name, value), g in zip(weights.items(), gradients, strict=True)}


def assert_same(module: nn.Module, weights: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert dict(module.state_dict()).keys() == weights.keys()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
