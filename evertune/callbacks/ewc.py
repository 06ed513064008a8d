"""Elastic weight consolidation: a penalty that keeps important weights close to their previous values."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from evertune._lightning import pl, rank_zero_warn
from evertune.callbacks.examples import ExampleSampler
from evertune.callbacks.weight_method import WeightMethod
from evertune.importance.fisher import Estimator, Logits, Targets, check_fisher, estimate_fisher
from evertune.shards.penalty import QuadraticPenalty
from evertune.shards.shards import ParameterShards
from evertune.tasks.base import Likelihood
from evertune.utils.batches import batch_size_of, take
from evertune.utils.evaluation import trial

_EXAMPLES = "evertune.ewc.examples"
"""Key in a checkpoint of the batches that all ranks hold for the next estimation of the Fisher."""


class EWC(WeightMethod):
    """Elastic weight consolidation, on one device, DDP and ZeRO-1, 2 and 3.

    Adds to the loss of every later experience the penalty::

        (ewc_lambda / 2) * sum_i F_i * (theta_i - anchor_i)^2

    where ``F`` is the diagonal Fisher information at the end of the previous experiences, and ``anchor`` are the
    weights at that point (Kirkpatrick et al. 2017). The penalty is added to the gradient of the weights as each rank
    holds them: nothing is gathered, and it costs two fragments of memory (importance and anchor) and a small buffer.

    With ``mode="online"``, there is one anchor, the latest weights, and the importance decays: ``F <- gamma * F +
    F_new`` (Schwarz et al. 2018). With ``mode="separate"``, every experience keeps its own anchor, as in the original
    paper. A sum of quadratics is a quadratic, so this costs no more memory: ``F`` is the sum of the importances and
    ``anchor`` their weighted mean (Huszar 2018).

    Args:
        ewc_lambda: Strength of the penalty, not negative. The Fisher is a mean over examples, so it does not depend on
            the size of the data. Values from 1 to 10,000 are common; tune it. Default: 100.
        mode: ``"online"`` (default) or ``"separate"``.
        gamma: Factor in [0, 1] by which the old importance decays per experience. Only for ``"online"``. Default: 1 (no
            decay).
        estimator: ``"exact"``, ``"sampled"``, ``"empirical"``, ``"batched"``, or ``"auto"`` (default): exact for
            examples with up to 32 classes (times positions that count), sampled for the others. All but ``"batched"``
            square per example, so the result depends neither on the batch size nor on the number of ranks (van de Ven
            2025). See :func:`evertune.importance.estimate_fisher`.
        n_examples: Number of training examples of an experience, over all ranks, on which the Fisher is estimated. 500
            (default) lose 0.3 points of accuracy against all of them (van de Ven 2025).
        batch_size: Examples per rank and pass in the estimation. Changes speed and memory, not the result. Default: 16.
        logits: Function ``(module, batch) -> tensor [batch, ..., classes]``. By default the module's task finds the
            logits (:meth:`evertune.tasks.Task.outputs`): it calls the module on the batch without its targets.
        targets: Function ``batch -> tensor`` that returns class numbers ``[batch, ...]``, with -100 at positions that
            do not count, or a tensor of the logits' shape. By default the module's task finds the targets. With one
            position and several classes, only ``"empirical"`` and ``"batched"`` need them.
        seed: Seed of the drawn examples, and of the labels that ``"sampled"`` draws. Default: 0.

    Raises:
        ValueError: If an argument is out of range. In ``setup``, if the strategy or the number of optimizers is not
            supported. Before the first step, if no Fisher can be estimated from the module or its batches.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[EWC(ewc_lambda=100.0)])
        trainer.fit(module, first_data)  # learns freely, then remembers what mattered

        trainer = pl.Trainer(max_epochs=3, callbacks=trainer.callbacks)
        trainer.fit(module, second_data)  # learns without letting go of it
    """

    tensor_names = ("importance", "anchor")

    def __init__(
        self,
        ewc_lambda: float = 100.0,
        mode: Literal["online", "separate"] = "online",
        gamma: float = 1.0,
        estimator: Estimator = "auto",
        n_examples: int = 500,
        batch_size: int = 16,
        logits: Logits | None = None,
        targets: Targets | None = None,
        seed: int = 0,
    ) -> None:
        if ewc_lambda < 0:
            raise ValueError(f"ewc_lambda must not be negative, got {ewc_lambda}")
        if mode not in ("online", "separate"):
            raise ValueError(f"mode must be 'online' or 'separate', got {mode!r}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, got {gamma}")
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
        if n_examples < 1:
            raise ValueError(f"n_examples must be positive, got {n_examples}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if mode == "separate" and gamma != 1.0:
            rank_zero_warn(f"gamma={gamma} is ignored: it belongs to mode='online'")
        self.ewc_lambda = ewc_lambda
        self.mode = mode
        self.gamma = gamma
        self.estimator = estimator
        self.n_examples = n_examples
        self.batch_size = batch_size
        self.logits = logits
        self.targets = targets
        self.seed = seed
        self._penalty: QuadraticPenalty | None = None
        self._examples = ExampleSampler(n_examples, batch_size, seed)
        self._likelihood: Likelihood | None = None  # determined at the first batch of each fit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and note from now on what is trained on."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._likelihood = None
            self._examples.setup(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._examples.on_train_start(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._likelihood is None:
            self._likelihood = self._try_to_estimate(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Consider the batch for the next estimation."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._examples.see(trainer, batch, batch_idx)

    def _try_to_estimate(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Likelihood:
        """Run everything but the backward pass on the first batch, so that nothing fails after hours of training."""
        advice = "pass logits=, a callable (module, batch) -> tensor, and targets=, a callable batch -> tensor"
        shards = self._shards or ParameterShards.of(trainer)
        with trial(f"EWC cannot estimate the importance of the weights of {type(module).__name__}", advice):
            size = batch_size_of(batch)
            likelihood = check_fisher(
                module,
                take(batch, list(range(min(size, self.batch_size))), size),
                shards,
                self.estimator,
                logits=self.logits,
                targets=self.targets,
                forward_context=trainer.precision_plugin.forward_context,
            )
        shards.release()
        return likelihood

    def consolidate(
        self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards
    ) -> dict[str, list[Tensor]]:
        """Estimate the importance of the weights for the experience that ends, and anchor them."""
        importance, anchor = (
            self._estimate(trainer, module, shards),
            [value.to(torch.float32, copy=True) for value in shards.values()],
        )
        if self.has_state and self.mode == "online":
            for new, old in zip(importance, self.tensors["importance"], strict=True):
                new.add_(old, alpha=self.gamma)
        elif self.has_state:
            pairs = zip(self.tensors["importance"], self.tensors["anchor"], strict=True)
            for new, here, (old, there) in zip(importance, anchor, pairs, strict=True):
                new.add_(old)
                # The anchor moves to the minimum of the two quadratics: the mean of both, weighted by importance. Where
                # neither has any importance, 0 / 0 would be NaN.
                share = torch.where(new > 0, old / new, torch.zeros_like(new))
                here.lerp_(there, share)
        return {"importance": importance, "anchor": anchor}

    def _estimate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> list[Tensor]:
        """The diagonal Fisher on a sample of the experience's examples: one tensor per fragment."""
        fisher = estimate_fisher(
            module,
            self._examples.batches(trainer),
            shards,
            estimator=self.estimator,
            logits=self.logits,
            targets=self.targets,
            likelihood=self._likelihood,
            seed=self.seed + self.experience_index,
            forward_context=trainer.precision_plugin.forward_context,
        )
        shards.release()
        self._examples.forget()
        return fisher

    def prepare(self, shards: ParameterShards) -> None:
        """Build the penalty once for all steps, restricted to the weights that have importance."""
        self._penalty = QuadraticPenalty(shards, self.tensors["importance"], self.tensors["anchor"])

    def add_to_gradient(self, shards: ParameterShards) -> None:
        """Add the gradient of the penalty, in place."""
        assert self._penalty is not None
        self._penalty.add_gradient(self.ewc_lambda)

    def penalty(self) -> Tensor:
        """The penalty at the current weights, summed over all ranks, shape ``[]``. Call on every rank during a fit."""
        return torch.zeros(()) if self._penalty is None else self._penalty.value(self.ewc_lambda)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the strategy's buffers."""
        super().teardown(trainer, pl_module, stage)
        self._examples.teardown(trainer)
        self._penalty = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the strategy."""
        self._examples.teardown(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if examples := self._examples.state_dict(trainer):
            checkpoint[_EXAMPLES] = examples

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if _EXAMPLES in checkpoint:
            self._examples.load_state_dict(checkpoint[_EXAMPLES], trainer)
