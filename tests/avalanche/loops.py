"""The same small network and data, learned by Avalanche's loop and by evertune's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from avalanche.benchmarks import nc_benchmark
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from evertune import ContinualTrainer
from evertune.streams import from_avalanche

N_CLASSES, N_EACH = 6, 12
LEARNING_RATE = 0.1


def data(n_classes: int = N_CLASSES) -> TensorDataset:
    """Classes that overlap."""
    targets = torch.arange(n_classes).repeat_interleave(N_EACH)
    centres = torch.randn(n_classes, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(centres[targets] + torch.randn(len(targets), 5), targets)


def benchmark(n_experiences: int = 3) -> Any:
    torch.manual_seed(2)
    order = list(range(N_CLASSES))
    return nc_benchmark(data(), data(), n_experiences, task_labels=False, fixed_class_order=order)


def network(n_classes: int = N_CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, n_classes))


class Module(pl.LightningModule):
    def __init__(self, n_classes: int = N_CLASSES) -> None:
        super().__init__()
        self.net = network(n_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def avalanche(plugins: Sequence[Any], batch_size: int, epochs: int = 3, n_experiences: int = 3) -> Tensor:
    """The weights after Avalanche's loop, flat."""
    net = network()
    strategy = Naive(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=LEARNING_RATE),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch_size,
        train_epochs=epochs,
        plugins=list(plugins),
        evaluator=EvaluationPlugin(),
    )
    train_stream = benchmark(n_experiences).train_stream
    for number, experience in enumerate(train_stream):
        torch.manual_seed(number)  # of the order: reading examples for an importance draws random numbers, too
        strategy.train(experience, eval_streams=[])
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def lightning(callbacks: Sequence[pl.Callback], epochs: int = 3, n_experiences: int = 3) -> Tensor:
    """The weights after evertune's loop, with all examples of an experience in one batch, flat."""
    module = Module()
    trainer = ContinualTrainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit_stream(module, from_avalanche(benchmark(n_experiences)), batch_size=N_EACH * N_CLASSES)
    return nn.utils.parameters_to_vector(module.parameters()).detach()
