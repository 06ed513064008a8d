"""Callbacks that change the batch of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from evertune._lightning import pl, replace_method, return_method
from evertune.callbacks.base import ContinualCallback


class BatchChange(ContinualCallback, ABC):
    """Changes each training batch after the hooks of all callbacks: wherever they stand, they see it unchanged."""

    @abstractmethod
    def change(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Change a batch, in its place."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act from here on."""
        strategy = trainer.strategy

        def on_train_batch_start(batch: Any, batch_idx: int) -> None:
            self.change(trainer, pl_module, batch)
            type(strategy).on_train_batch_start(strategy, batch, batch_idx)

        replace_method(strategy, "on_train_batch_start", on_train_batch_start)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop: what is read from here on is unchanged."""
        return_method(trainer.strategy, "on_train_batch_start")
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop."""
        return_method(trainer.strategy, "on_train_batch_start")
