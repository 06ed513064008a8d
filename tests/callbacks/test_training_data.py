"""The training data that callbacks read before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from evertune._lightning import pl
from evertune.callbacks import Imprinting, LogitAdjustment
from evertune.callbacks.training_data import TrainingData
from evertune.streams import Experience, ExperienceDataModule


class Counted(Dataset):
    """Examples of some classes; counts how often one is read."""

    def __init__(self, targets: list[int]) -> None:
        self.targets = targets
        self.n_read = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.n_read += 1
        return torch.ones(3) * index, self.targets[index]


class Cosine(pl.LightningModule):
    """A head of four rows on three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_targets_of_a_fit_are_read_once_for_all_callbacks() -> None:
    callbacks = [Imprinting(examples_per_class=1, features=lambda module, batch: batch[0]), LogitAdjustment()]
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for targets in ([0, 0, 0, 1], [2, 2, 3, 3]):
        data = Counted(targets)
        trainer = pl.Trainer(max_epochs=1, callbacks=callbacks, **settings)
        trainer.fit(Cosine(), DataLoader(data, batch_size=2))
        n_targets, n_imprinted, n_trained = 4, 2, 4
        assert data.n_read == n_targets + n_imprinted + n_trained
    assert callbacks[1].counts.tolist() == [3, 1, 2, 2]


def test_shares_are_those_of_balanced_draws() -> None:
    shares: dict[bool, list[float]] = {}

    class Shares(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            shares[balanced] = TrainingData(trainer, "Shares").class_shares().tolist()

    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for balanced in (False, True):
        data = ExperienceDataModule(Experience("one", Counted([0] * 6 + [1] * 2)), batch_size=2, balanced=balanced)
        pl.Trainer(max_epochs=1, callbacks=[Shares()], **settings).fit(Cosine(), data)
    assert shares[False] == pytest.approx([0.75, 0.25]) and shares[True] == pytest.approx([0.5, 0.5])
