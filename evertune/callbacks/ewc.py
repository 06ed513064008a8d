"""Elastic weight consolidation: hold the weights that mattered close to where they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from evertune._lightning import pl, rank_zero_warn
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.examples import ExampleSampler
from evertune.importance.fisher import Estimator, estimate_fisher
from evertune.shards.fragments import FragmentState
from evertune.shards.penalty import QuadraticPenalty
from evertune.shards.shards import ParameterShards
from evertune.shards.sidecars import read_sidecar, write_sidecar_with_checkpoints
from evertune.shards.support import check_strategy, is_deepspeed, is_step_boundary
from evertune.strategies.deepspeed import warn_about_stock_deepspeed
from evertune.utils.batches import logits_of, targets_of

_EXAMPLES = "evertune.ewc.examples"
"""Where in a checkpoint the batches are that all ranks hold for the next estimation."""


class EWC(ContinualCallback):
    """Elastic weight consolidation, on one device, DDP and ZeRO-1, 2 and 3.

    Adds to the loss of every later experience the penalty::

        (ewc_lambda / 2) * sum_i F_i * (theta_i - anchor_i)^2

    where ``F`` is the diagonal Fisher information at the end of the experiences before, and ``anchor`` the weights
    there (Kirkpatrick et al. 2017). The penalty acts on the gradient, on the weights as each rank holds them: nothing
    is gathered, and it costs two fragments of memory (importance and anchor) and a small buffer.

    With ``mode="online"`` there is one anchor, the latest weights, and the importance decays:
    ``F <- gamma * F + F_new`` (Schwarz et al. 2018). With ``mode="separate"`` every experience keeps its own anchor, as
    in the original paper. A sum of quadratics is a quadratic, so this costs no more memory: ``F`` is the sum of the
    importances and ``anchor`` their weighted mean (Huszar 2018).

    Args:
        ewc_lambda: strength of the penalty. The Fisher is a mean over examples, so it does not depend on the size of
            the data; values from 1 to 10,000 are common, and it is worth tuning.
        mode: ``"online"`` or ``"separate"``.
        gamma: how much of the old importance survives an experience, from 0 to 1; only for ``"online"``.
        estimator: ``"exact"``, ``"sampled"``, ``"empirical"``, ``"batched"``, or ``"auto"``: exact up to 32 classes,
            sampled above. All but ``"batched"`` are per example, so that the batch size and the number of ranks do not
            change the result (van de Ven 2025). See :func:`evertune.importance.estimate_fisher`.
        n_examples: how many training examples of an experience the Fisher is estimated on, over all ranks. 500 lose
            0.3 points of accuracy against all of them (van de Ven 2025).
        batch_size: examples at a time per rank in the estimation; changes the speed and the memory, not the result.
        logits: ``(module, batch) -> tensor [batch, classes]``; the default calls the module on the batch without its
            targets.
        targets: ``batch -> tensor [batch]`` of class numbers; only ``"empirical"`` and ``"batched"`` need it.
        seed: which examples are drawn, and which labels ``"sampled"`` draws.

    Raises:
        ValueError: for an argument out of its range; at setup, for a strategy or a number of optimizers it does not
            work with.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[EWC(ewc_lambda=100.0)])
        trainer.fit(module, first_data)  # learns freely, then remembers what mattered

        trainer = pl.Trainer(max_epochs=3, callbacks=trainer.callbacks)
        trainer.fit(module, second_data)  # learns without letting go of it
    """

    def __init__(
        self,
        ewc_lambda: float = 100.0,
        mode: Literal["online", "separate"] = "online",
        gamma: float = 1.0,
        estimator: Estimator = "auto",
        n_examples: int = 500,
        batch_size: int = 16,
        logits: Callable[[pl.LightningModule, Any], Tensor] = logits_of,
        targets: Callable[[Any], Any] = targets_of,
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
        self._state: FragmentState | None = None
        self._saved_in: Path | None = None
        self._shards: ParameterShards | None = None
        self._penalty: QuadraticPenalty | None = None
        self._examples = ExampleSampler(n_examples, batch_size, seed)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_strategy(trainer, "EWC")
            warn_about_stock_deepspeed(trainer, "EWC")
            if is_deepspeed(trainer):
                write_sidecar_with_checkpoints(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the importance and the anchor to where this fit's fragments lie."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"EWC works with one optimizer, got {len(trainer.optimizers)}")
        self._shards = ParameterShards.of(trainer)
        if self._saved_in is not None:
            self._state = FragmentState.load(self._saved_in, self._shards)
            self._saved_in = None
        elif self._state is not None:
            self._state = self._state.rearranged(self._shards)
        self._set_penalty()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._examples.see(trainer, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of the penalty, once per optimizer step, in place."""
        if self._penalty is not None and is_step_boundary(trainer):
            self._penalty.add_gradient(self.ewc_lambda)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the strategy's buffers."""
        self._shards = self._penalty = None

    def penalty(self) -> Tensor:
        """The penalty at the present weights, summed over all ranks, shape ``[]``. Call on every rank, within a fit."""
        return torch.zeros(()) if self._penalty is None else self._penalty.value(self.ewc_lambda)

    def _set_penalty(self) -> None:
        if self._state is not None and self._shards is not None:
            importance, anchor = self._state.tensors["importance"], self._state.tensors["anchor"]
            self._penalty = QuadraticPenalty(self._shards, importance, anchor)

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Estimate the importance of the weights for the experience just learnt, and anchor them."""
        shards = self._shards or ParameterShards.of(trainer)
        fisher = estimate_fisher(
            module,
            self._examples.batches(trainer),
            shards,
            estimator=self.estimator,
            logits=self.logits,
            targets=self.targets,
            seed=self.seed + self.experience_index,
            forward_context=trainer.precision_plugin.forward_context,
        )
        shards.release()
        self._examples.forget()
        self._state = FragmentState.of(shards, self._consolidate(fisher, shards.values()))
        self._set_penalty()

    def _consolidate(self, fisher: list[Tensor], values: list[Tensor]) -> dict[str, list[Tensor]]:
        anchor = [value.clone() for value in values]
        if self._state is None:
            return {"importance": fisher, "anchor": anchor}
        old_importance, old_anchor = self._state.tensors["importance"], self._state.tensors["anchor"]
        if self.mode == "online":
            for new, old in zip(fisher, old_importance, strict=True):
                new.add_(old, alpha=self.gamma)
        else:
            for new, old, here, there in zip(fisher, old_importance, anchor, old_anchor, strict=True):
                new.add_(old)
                share = torch.where(new > 0, old / new, torch.zeros_like(new))
                here.lerp_(there, share)
        return {"importance": fisher, "anchor": anchor}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"experience_index": self.experience_index}
        if self._state is not None and not self._state.sharded:
            state |= self._state.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.experience_index = state_dict["experience_index"]
        if "tensors" in state_dict:
            self._state, self._saved_in = FragmentState.from_state_dict(state_dict), None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if examples := self._examples.state_dict(trainer):
            checkpoint[_EXAMPLES] = examples

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if _EXAMPLES in checkpoint:
            self._examples.load_state_dict(checkpoint[_EXAMPLES], trainer)
        if is_deepspeed(trainer):
            read_sidecar(trainer, self)

    def save(self, directory: str | Path) -> None:
        """Write the importance and the anchor to a folder. Call on every rank.

        Raises:
            ValueError: when nothing has been learnt yet.
        """
        if self._state is None:
            raise ValueError("EWC has nothing to save: no experience has been learnt, or a loaded one not yet used")
        self._state.save(directory, {"experience_index": self.experience_index})

    def load(self, directory: str | Path) -> None:
        """Check a folder that :meth:`save` wrote and use it from the next fit on, at any world size.

        The fragments are read when that fit starts, so the folder must stay until then.

        Raises:
            FileNotFoundError: when a file is missing.
            ValueError: when a file is corrupt or of another format.
        """
        extra = FragmentState.check(directory)
        if "experience_index" not in extra:
            raise ValueError(f"{directory} holds fragments that EWC has not saved: they have no experience_index")
        self.experience_index = int(extra["experience_index"])
        self._saved_in = Path(directory)
