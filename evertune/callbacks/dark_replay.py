"""Dark experience replay: replayed examples are matched with the logits that the model once gave for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import n_started, pl
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.replay.collate import Joined
from evertune.callbacks.step_logits import LogitsMethod, counted_rows
from evertune.callbacks.teacher import logits_of_examples, sum_over_examples
from evertune.memory.policies import Policy
from evertune.utils.batches import batch_size_of


class DarkReplay(LogitsMethod, Replay):
    """Replay that also keeps, with each example, the logits of the model that learned it (DER and DER++).

    Buzzega et al. 2020, "Dark Experience for General Continual Learning". The loss of an update is::

        mean over new (x, y) of  loss(h(x), y)
            + alpha * mean over replayed (x, z) of  |h(x) - z|^2 / number of logits in z
            + beta  * mean over replayed (x, y) of  loss(h(x), y)

    with ``h(x)`` the logits, ``z`` those that were stored, and ``loss`` whatever the module's ``training_step``
    averages over the examples of a batch. ``beta=0`` is DER, ``beta > 0`` DER++. As in the authors' code, the squared
    distance is divided by the number of logits, so that ``alpha`` means the same for any number of classes. In
    :class:`Replay`, all examples of a batch weigh alike; here each kind has a mean of its own.

    The logits are those of the model in evaluation mode at the end of the experience in which the example was put in
    the memory. They are a column of the memory: saved, checkpointed and erased with the example. In a memory that was
    filled by :class:`Replay`, they are computed before the first step. A model that has more classes by now is compared
    on the classes that it had. For a sequence of predictions, the distance is averaged over the positions that count,
    whose target is not -100.

    No step runs anything twice: the logits come from the forward pass of the training step, and ``beta`` and the means
    are factors of the gradient through them. The loss that the module logs is that of the whole batch, as before. At
    the end of an experience there is one forward pass over the examples that are new in the memory.

    Args:
        memory_size: Number of examples kept in memory, over all ranks.
        alpha: Strength of the stored logits. Default: 0.2.
        beta: Weight of the replayed examples' own loss. Default: 0.5.
        top_k: Number of logits to store for each row, for models of many classes, such as language models: the
            largest, and ``logsumexp`` of the others as one more. Default: all.
        head: Name of the submodule that returns the logits, ``[batch, ..., classes]``. Found by itself by default.
        policy, replay_ratio, label, id, features, seed, directory, extra, extra_ratio: As for :class:`Replay`. The
            loss gets ``extra_ratio`` times the mean over extra examples of their own loss.

    Raises:
        ValueError: As :class:`Replay`. If ``alpha`` is not positive, ``beta`` is negative, or ``top_k`` is not
            positive. On the first batch, if the logits cannot be found, or the training step does not use them exactly
            once.

    Example::

        callbacks = [DarkReplay(memory_size=600, policy="class_balanced"), LogitAdjustment()]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    def __init__(
        self,
        memory_size: int,
        alpha: float = 0.2,
        beta: float = 0.5,
        top_k: int | None = None,
        head: str | None = None,
        policy: str | Policy = "reservoir",
        replay_ratio: float = 1.0,
        label: str | int | Callable[[Any], Any] | None = None,
        id: str | int | Callable[[Any], Any] | None = None,
        features: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
        directory: str | Path | None = None,
        extra: Any = None,
        extra_ratio: float = 0.05,
    ) -> None:
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        if not (beta >= 0 and math.isfinite(beta)):
            raise ValueError(f"beta must be 0 or positive, and finite, got {beta}")
        if replay_ratio == 0:
            raise ValueError(
                "replay_ratio must be positive, got 0: without replayed examples there are no logits to match"
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be positive, got {top_k}")
        super().__init__(
            memory_size,
            policy=policy,
            replay_ratio=replay_ratio,
            label=label,
            id=id,
            features=features,
            seed=seed,
            directory=directory,
            extra=extra,
            extra_ratio=extra_ratio,
        )
        self.alpha, self.beta, self.top_k, self.head = alpha, beta, top_k, head
        self._now: Joined | None = None  # the examples of the current batch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the logits that a memory lacks that was filled without them."""
        super().on_train_start(trainer, pl_module)
        if n_started(trainer) == 0:
            self._store_logits(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Weigh the new and the replayed examples of the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._step is not None
        self._now = now = self.joined(trainer, batch)
        size, n_new = batch_size_of(batch), now.n_new
        if size == n_new:
            self._step.weigh(None)
            return
        # The training step's mean over the batch becomes a mean over the new examples and one over the replayed ones.
        # The latter are divided by their expected number: on each rank there may be one more or less.
        weights = torch.full((size,), size / n_new, device=pl_module.device)
        weights[now.replayed] = self.beta * size / (n_new * self.replay_ratio)
        self._step.weigh(weights)

    def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor | None:
        """The distance of the replayed examples' logits from the stored ones."""
        assert self._step is not None
        assert self._now is not None
        outputs, now = self._step.logits(batch), self._now  # also without replayed examples: what fails, fails early
        if not now.slots:
            return None
        logits, n_rows = counted_rows(outputs, now.replayed)
        stored = now.view.logits(now.slots)
        if n_rows.tolist() != stored.n_rows.tolist():
            raise ValueError(
                f"replayed examples have {n_rows.tolist()} positions that count, and had {stored.n_rows.tolist()} when "
                "their logits were stored; DarkReplay needs the same ones, so cut and mask examples before they are "
                "replayed"
            )
        new, old, present = stored.to(logits.device).matched(logits)
        square = torch.where(present, new - old, 0.0).square().sum(1) / present.sum(1)
        return self.alpha * sum_over_examples(square, n_rows) / (now.n_new * self.replay_ratio)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the loss has come through the logits."""
        assert self._step is not None
        self._step.check_weights()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Release the batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._now = None

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the experience into the memory, with the logits of what is new in it."""
        super().on_experience_end(trainer, module)
        self._store_logits(trainer, module)

    def _store_logits(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute the logits of the examples that have none, by all ranks together."""
        view = self.memory.view
        missing = view.without_logits.tolist()
        if not missing or trainer.train_dataloader is None:
            return
        logits = logits_of_examples(
            trainer,
            module,
            missing,
            lambda slots: self.batch_of(trainer, [view[slot] for slot in slots]),
            type(self).__name__,
            lengths=view.lengths,
            top_k=self.top_k,
        )
        self.set_logits(trainer, missing, logits)

    def _release(self) -> None:
        self._now = None
        super()._release()
