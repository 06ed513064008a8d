"""Elastic weight consolidation: a penalty that keeps important weights close to their previous values."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from evertune._lightning import pl, rank_zero_info, rank_zero_warn
from evertune.callbacks.importance_method import ImportanceMethod
from evertune.callbacks.quadratic_method import Coupling
from evertune.callbacks.weight_method import Tensors
from evertune.importance.fisher import (
    EXACT_UP_TO,
    Checked,
    Estimator,
    Logits,
    Targets,
    estimate_fisher,
)
from evertune.importance.moments import second_moment
from evertune.shards.shards import ParameterShards

BOUND = 0.1
"""Backward passes of an automatic estimation, at most, for each example that was trained on."""
AT_LEAST = 16
"""Backward passes of an automatic estimation of the smallest experiences: fewer examples say nothing about a model."""
EXACT_FROM = 100
"""Number of examples from which an automatic estimation prefers the exact Fisher to a sampled one on more of them."""


class EWC(ImportanceMethod):
    """Elastic weight consolidation, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    Adds to the loss of every later experience the penalty::

        (ewc_lambda / 2) * sum_i F_i * (theta_i - anchor_i)^2

    where ``F`` is the diagonal Fisher information at the end of the previous experiences, and ``anchor`` are the
    weights at that point (Kirkpatrick et al. 2017). The penalty acts on the weights as each rank holds them: nothing is
    gathered, and it costs two fragments of memory (importance and anchor) and a small buffer.

    With ``mode="online"``, there is one anchor, the latest weights, and the importance decays: ``F <- gamma * F +
    F_new`` (Schwarz et al. 2018). With ``mode="separate"``, every experience keeps its own anchor, as in the original
    paper. A sum of quadratics is a quadratic, so this costs no more memory: ``F`` is the sum of the importances and
    ``anchor`` their weighted mean (Huszar 2018).

    ``notes``, saved with the state, says how the importance of the latest experience was estimated: ``estimator``,
    ``examples``, ``trained`` (on how many, over all epochs) and ``normalize``.

    Args:
        ewc_lambda: Strength of the penalty, not negative: its mean curvature, over the weights that matter at all and
            after one experience. Default: 1, the best of 0.1, 0.3, 1 and 10 for a sentence encoder of 22.7 million
            weights that learns new classes (``benchmarks/text_streams.py``); networks of 3,000 to 190,000 weights need
            0.1 to 0.3 (``benchmarks/ewc_strength.py``). With ``normalize=False``, the best is anywhere between 1 and
            100,000.
        mode: ``"online"`` (default) or ``"separate"``.
        gamma: Factor in [0, 1] by which the old importance decays per experience. Only for ``"online"``. Default: 1 (no
            decay).
        estimator: ``"exact"``, ``"sampled"``, ``"empirical"``, ``"batched"``, ``"optimizer"``, or ``"auto"`` (default):
            exact or sampled, with at most one backward pass for every ten examples trained on (counted over the epochs,
            without replayed ones), or 16. It is exact for up to 32 classes if that leaves 100 examples, or all. All but
            the batched one square per example, so the result depends neither on the batch size nor on the number of
            ranks (van de Ven 2025). See :func:`evertune.importance.estimate_fisher`. ``"optimizer"`` takes Adam's
            second moment instead, which is there at no cost and needs neither logits nor targets, but depends on the
            batch size (:func:`evertune.importance.second_moment`).
        n_examples: Number of training examples of an experience, over all ranks, on which the Fisher is estimated; with
            ``"auto"``, the maximum. 500 (default) lose 0.3 points of accuracy against all of them (van de Ven 2025).
        batch_size: Examples per rank and pass in the estimation. Changes speed and memory, not the result. Default: 16.
        logits: Function ``(module, batch) -> tensor [batch, ..., classes]``. By default the module's task finds the
            logits (:meth:`evertune.tasks.Task.outputs`): it calls the module on the batch without its targets.
        targets: Function ``batch -> tensor`` that returns class numbers ``[batch, ...]``, with -100 at positions that
            do not count, or a tensor of the logits' shape. By default the module's task finds the targets. With one
            position and several classes, only ``"empirical"`` and ``"batched"`` need them.
        seed: Seed of the drawn examples, and of the labels that ``"sampled"`` draws. Default: 0.
        normalize: Whether the Fisher of each experience is divided by its mean over all weights where it is not 0
            (default). ``ewc_lambda`` then means the same on a model of any size, however sure of its answers it is
            (Schwarz et al. 2018 normalize for this reason), and no weight is pulled beyond its anchor in a plain
            gradient step: ``ewc_lambda * F_i`` is at most ``1 / learning_rate``. False is EWC as published.
        coupling: ``"coupled"`` (default): the penalty acts on the gradient. ``"decoupled"``: as a proximal step after
            that of the optimizer, stable at any strength; see
            :class:`~evertune.callbacks.quadratic_method.QuadraticMethod`.

    Raises:
        ValueError: If an argument is out of range. In ``setup``, if the strategy or the number of optimizers is not
            supported. Before the first step, if no Fisher can be estimated from the module or its batches.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[EWC()])
        trainer.fit(module, first_data)  # learns freely, then remembers what mattered

        trainer = pl.Trainer(max_epochs=3, callbacks=trainer.callbacks)
        trainer.fit(module, second_data)  # learns without letting go of it
    """

    def __init__(
        self,
        ewc_lambda: float = 1.0,
        mode: Literal["online", "separate"] = "online",
        gamma: float = 1.0,
        estimator: Estimator | Literal["optimizer"] = "auto",
        n_examples: int = 500,
        batch_size: int = 16,
        logits: Logits | None = None,
        targets: Targets | None = None,
        seed: int = 0,
        normalize: bool = True,
        coupling: Coupling = "coupled",
    ) -> None:
        super().__init__(
            ewc_lambda, coupling, normalize, n_examples, batch_size, logits, targets, seed, name="ewc_lambda"
        )
        if mode not in ("online", "separate"):
            raise ValueError(f"mode must be 'online' or 'separate', got {mode!r}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, got {gamma}")
        if estimator not in (choices := (*get_args(Estimator), "optimizer")):
            raise ValueError(f"estimator must be one of {', '.join(choices)}, got {estimator!r}")
        if mode == "separate" and gamma != 1.0:
            rank_zero_warn(f"gamma={gamma} is ignored: it belongs to mode='online'")
        self.estimator = estimator
        self._of_fisher: Estimator = "sampled" if estimator == "optimizer" else estimator
        self._has_moment = False  # whether the optimizer has been asked for it
        self.mode = mode
        self.gamma = gamma
        self._estimated: dict[str, Any] = {}
        self._has_told = False  # that the bound applies

    @property
    def ewc_lambda(self) -> float:
        """Strength of the penalty."""
        return self.strength

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the first step, see whether the optimizer keeps what is needed."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (
            self.estimator == "optimizer"
            and not self._has_moment
            and trainer.global_step > 0
            and self._shards is not None
        ):
            second_moment(trainer, self._shards)
            self._has_moment = True

    def _try_to_estimate(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Checked | None:
        return None if self.estimator == "optimizer" else super()._try_to_estimate(trainer, module, batch)

    def combined(self, importance: list[Tensor], anchor: list[Tensor]) -> Tensors:
        """The importance and the anchor of all experiences, from those of the last, which are changed."""
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

    def estimate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> list[Tensor]:
        """The diagonal Fisher on a sample of the experience's examples: one tensor per fragment."""
        n_sample, n_trained = self._examples.counts(trainer)
        if self.estimator == "optimizer":
            self._estimated = {"estimator": self.estimator, "examples": 0, "trained": n_trained}
            return second_moment(trainer, shards)
        estimator, n_examples = self._affordable(n_sample, n_trained)
        fisher = estimate_fisher(
            module,
            self._examples.batches(trainer, n_examples),
            shards,
            estimator=estimator,
            logits=self.logits,
            targets=self.targets,
            likelihood=None if self._checked is None else self._checked.likelihood,
            seed=self.seed + self.experience_index,
            forward_context=trainer.precision_plugin.forward_context,
        )
        self._estimated = {"estimator": estimator, "examples": n_examples, "trained": n_trained}
        return fisher

    @property
    def about(self) -> dict[str, Any]:
        return self._estimated

    def _affordable(self, n_sample: int, n_trained: int) -> tuple[Estimator, int]:
        """The estimator, and on how many examples: with ``"auto"``, what takes a tenth of the training at most.

        The cost is counted in backward passes, not in seconds, so that the choice is reproducible and the same at any
        batch size and number of ranks.

        Args:
            n_sample: Number of examples that can be drawn.
            n_trained: Number of examples trained on in the experience, over all its epochs.
        """
        if self._of_fisher != "auto":
            return self._of_fisher, n_sample
        budget = max(AT_LEAST, int(BOUND * n_trained))
        passes = None if self._checked is None else self._checked.exact_passes
        estimator: Estimator = "sampled"
        n_examples = min(n_sample, budget)
        if passes is not None and passes <= EXACT_UP_TO:
            n_exact = min(n_sample, budget // max(passes, 1))
            if n_exact >= min(EXACT_FROM, n_examples):
                estimator, n_examples = "exact", n_exact
        if n_examples < n_sample and not self._has_told:
            rank_zero_info(
                f"EWC bounds the Fisher to a tenth of the training ({n_trained:,} examples): {estimator}, on "
                f"{n_examples:,} of {n_sample:,} examples; to spend more, set estimator= and n_examples="
            )
            self._has_told = True
        return estimator, n_examples
