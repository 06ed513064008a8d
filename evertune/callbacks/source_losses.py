"""The losses of new, replayed and extra examples, apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.replay.collate import Joined
from evertune.callbacks.step_logits import LogitsMethod
from evertune.shards.support import check_strategy
from evertune.tasks.base import Outputs, losses, task_of
from evertune.utils.batches import targets_of

SOURCES = ("new", "replayed", "extra")


class SourceLosses(LogitsMethod):
    """Logs the loss of each source of a batch: ``train_loss/new``, ``train_loss/replayed`` and ``train_loss/extra``.

    The sources are those of a :class:`Replay`: the new examples, those of its memory, and those of its ``extra``
    dataset. Each figure is the mean over the examples of a source, on all ranks together, since the last one: of
    cross-entropy (the mean over labels of binary cross-entropy with several labels per example, squared error for a
    regression; the mean over the positions that count for a sequence). It is computed from the logits of the training
    step, without adjustments and label smoothing, and changes nothing.

    The figures go to the trainer's loggers every ``log_every_n_steps`` batches, and to ``trainer.callback_metrics`` at
    the end of an epoch, for all of it. Ranks exchange six numbers each time.

    Args:
        head: Name of the submodule that returns the logits, ``[batch, ..., classes]``. Found by itself by default.

    Raises:
        ValueError: In ``setup``, if there is no :class:`Replay`. On the first batch, if the logits or targets cannot be
            found, or the training step does not use the logits exactly once.

    Example::

        callbacks = [Replay(memory_size=600, extra=pretraining, extra_ratio=0.05), SourceLosses()]
    """

    keeps_nothing = True

    def __init__(self, head: str | None = None) -> None:
        self.head = head
        self._replay: Replay | None = None
        self._now: Joined | None = None
        self._recent = torch.zeros(len(SOURCES), 2, dtype=torch.float64)  # sum and number of examples of each source
        self._epoch = self._recent.clone()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        self._replay = Replay.of(trainer)
        if self._replay is None:
            raise ValueError("SourceLosses tells replayed examples from new ones: it needs a Replay")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the means of an epoch."""
        device = pl_module.device
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._recent, self._epoch = (torch.zeros(len(SOURCES), 2, dtype=kind, device=device) for _ in range(2))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which examples are of which source."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._replay is not None
        self._now = self._replay.joined(trainer, batch)
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add up the losses of the batch."""
        assert self._step is not None
        assert self._now is not None
        now = self._now
        with torch.no_grad():
            each = example_losses(pl_module, self._batch, self._step.logits(self._batch)).to(self._recent)
        end = now.replayed.stop
        for number, rows in enumerate((slice(now.n_new), now.replayed, slice(end, end + len(now.extra)))):
            known = each[rows][~each[rows].isnan()]
            self._recent[number] += torch.stack([known.sum(), known.new_tensor(len(known))])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what has been added up, every ``log_every_n_steps`` batches."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._now = None
        if (batch_idx + 1) % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            values = self._together(trainer)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means of the epoch."""
        self._together(trainer)
        pl_module.log_dict(_means(self._epoch))

    def _together(self, trainer: pl.Trainer) -> dict[str, float]:
        """The means since the last call, over all ranks."""
        everyones: Tensor = trainer.strategy.reduce(self._recent.clone(), reduce_op="sum")
        self._epoch += everyones
        self._recent.zero_()
        return _means(everyones)

    def _release(self) -> None:
        self._now = self._batch = None
        super()._release()


def example_losses(module: pl.LightningModule, batch: Any, outputs: Outputs) -> Tensor:
    """The loss of each example of a training step, ``[batch]``; NaN for one without positions that count.

    Args:
        batch: The batch.
        outputs: Its logits (:meth:`StepLogits.logits`).
    """
    targets = targets_of(batch) if outputs.targets is None else outputs.targets
    logits = outputs.logits.float()
    if targets.ndim == logits.ndim:
        logits = logits[..., : targets.shape[-1]]  # without rows allocated ahead
    return losses(Outputs.of(logits, targets, task_of(module).likelihood))


def _means(sums: Tensor) -> dict[str, float]:
    totals: list[list[float]] = sums.tolist()
    return {f"train_loss/{name}": total / n for name, (total, n) in zip(SOURCES, totals, strict=True) if n}
