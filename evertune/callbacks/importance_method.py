"""Base class of methods that estimate the importance of the weights on examples when an experience ends."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.examples import ExampleSampler
from evertune.callbacks.quadratic_method import Coupling, QuadraticMethod
from evertune.callbacks.weight_method import Tensors
from evertune.importance.fisher import Checked, Estimator, Logits, Targets, check_fisher
from evertune.shards.opened import shards_of
from evertune.shards.shards import ParameterShards
from evertune.utils.batches import batch_size_of, take
from evertune.utils.evaluation import trial


class ImportanceMethod(QuadraticMethod):
    """Base class of penalties whose importance is estimated on training examples when an experience ends.

    A method implements :meth:`estimate`. The examples are a sample of those trained on, which checkpoints contain if
    they cannot be read again, and the first batch of each fit is tried, so that nothing fails after hours of training.

    Args:
        strength: Strength of the penalty; see :class:`~evertune.callbacks.quadratic_method.QuadraticMethod`. So are
            ``coupling`` and ``normalize``.
        n_examples: Number of training examples of an experience, over all ranks.
        batch_size: Examples per rank and pass in the estimation.
        logits: Function ``(module, batch) -> tensor``; None for those that the module's task finds.
        targets: Function ``batch -> tensor``; None for those that the module's task finds.
        seed: Seed of the drawn examples.
        name: What the strength is called, for the message.
    """

    _of_fisher: Estimator = "sampled"  # by which the first batch is tried: this one needs nothing but logits

    def __init__(
        self,
        strength: float,
        coupling: Coupling,
        normalize: bool,
        n_examples: int,
        batch_size: int,
        logits: Logits | None,
        targets: Targets | None,
        seed: int,
        name: str = "strength",
    ) -> None:
        super().__init__(strength, coupling, normalize, name)
        if n_examples < 1:
            raise ValueError(f"n_examples must be positive, got {n_examples}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.n_examples = n_examples
        self.batch_size = batch_size
        self.logits = logits
        self.targets = targets
        self.seed = seed
        self._examples = ExampleSampler(n_examples, batch_size, seed)
        self._tried = False  # on the first batch of this fit
        self._checked: Checked | None = None  # what was found there

    @abstractmethod
    def estimate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> list[Tensor]:
        """The importance of the weights for the experience that ends, one new tensor per fragment; on every rank."""

    def consolidate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> Tensors:
        """Estimate the importance for the experience that ends, and add it to that of the others."""
        importance = self.scaled(self.estimate(trainer, module, shards), shards)
        shards.release()
        self._examples.forget()
        return self.combined(importance, [value.to(torch.float32, copy=True) for value in shards.values()])

    def combined(self, importance: list[Tensor], anchor: list[Tensor]) -> Tensors:
        """Both tensors of all experiences, from those of the last: the importances added up, and the last anchor."""
        if self.has_state:
            for new, old in zip(importance, self.tensors["importance"], strict=True):
                new.add_(old)
        return {"importance": importance, "anchor": anchor}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and note from now on what is trained on."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._tried, self._checked = False, None
            self._examples.setup(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._examples.on_train_start(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._tried:
            self._tried, self._checked = True, self._try_to_estimate(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Consider the batch for the next estimation."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._examples.see(trainer, batch, batch_idx)

    def _try_to_estimate(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Checked | None:
        """Run everything but the backward pass on the first batch, so that nothing fails after hours of training."""
        name = type(self).__name__
        advice = "pass logits=, a callable (module, batch) -> tensor, and targets=, a callable batch -> tensor"
        shards = self._shards or shards_of(trainer)
        with trial(f"{name} cannot estimate the importance of the weights of {type(module).__name__}", advice):
            size = batch_size_of(batch)
            checked = check_fisher(
                module,
                take(batch, list(range(min(size, self.batch_size))), size),
                shards,
                self._of_fisher,
                logits=self.logits,
                targets=self.targets,
                forward_context=trainer.precision_plugin.forward_context,
            )
        shards.release()
        return checked

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the strategy's buffers."""
        super().teardown(trainer, pl_module, stage)
        self._examples.teardown(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the strategy."""
        self._examples.teardown(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if examples := self._examples.state_dict(trainer):
            checkpoint[self._key] = examples

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._key in checkpoint:
            self._examples.load_state_dict(checkpoint[self._key], trainer)

    @property
    def _key(self) -> str:
        """Key in a checkpoint of the batches that all ranks hold for the next estimation."""
        return f"evertune.{type(self).__name__.lower()}.examples"
