"""Maximally interfered retrieval: the memory's examples that the coming step would harm most are replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from evertune._lightning import isolate_rng, pl, replace_method, return_method
from evertune.callbacks.reference_method import training_loss
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.replay.collate import Joined
from evertune.callbacks.replay.features import default_losses
from evertune.callbacks.step_logits import StepLogits
from evertune.memory.policies import Policy
from evertune.shards.opened import shards_of
from evertune.shards.second_gradient import second_gradient
from evertune.utils.batches import batch_size_of, take
from evertune.utils.evaluation import evaluation_mode, trial


class MIR(Replay):
    """Replay of the examples whose loss would rise most by the coming step, under any strategy of evertune.

    Aljundi et al. 2019, "Online Continual Learning with Maximally Interfered Retrieval". Where :class:`Replay` draws
    one example of the memory, this one draws ``candidates`` and replays the one with the highest score::

        score(x) = loss(x; theta') - loss(x; theta)
        theta' = theta - step_size * g / |g|

    with ``g`` the gradient of the loss on the new examples of the batch, over all ranks. Each rank moves the weights
    that it holds, and afterwards puts back the very same ones; nothing is gathered that a step does not gather. So the
    choice is the same on any number of processes, and no score is exchanged.

    It differs from the paper in two ways. The paper takes the examples with the highest scores of all candidates
    together; here they compete in groups, so that the ranks' batches stay of one size, and an experience whose
    losses are all high does not fill the batch. And the paper moves along the learning rate times ``g``. To first order
    the length of that move does not change which score is the highest, but with Adam's learning rates the losses would
    differ by rounding alone; so the length is given.

    A step costs one more forward and backward pass over the new examples and two more forward passes over the
    candidates: about 2.5 times the time of a step of ``Replay`` with the defaults. For the time of the choice, three
    numbers per weight that a rank updates are in memory; ZeRO-1 and 2 send the weights twice more. With
    ``accumulate_grad_batches``, each of the accumulated batches chooses for itself.

    Args:
        memory_size: Number of examples kept in memory, over all ranks.
        candidates: Examples that are drawn for each one that is replayed, at least 2. Default: 3 (the paper: 5).
        step_size: Length of the move of all weights together, ``|theta' - theta|``. Default: 0.05.
        policy, replay_ratio, label, id, features, seed, directory, extra, extra_ratio: As for :class:`Replay`.

    Raises:
        ValueError: As :class:`Replay`. If ``candidates`` is below 2, ``step_size`` is not positive, or ``replay_ratio``
            is 0. In ``setup``, if there is a :class:`LogitAdjustment`, which needs to know how often a class is
            replayed, or optimization is manual. On the first batch, if the module's task finds no loss of each example.

    Example:
        >>> from evertune.callbacks.mir import MIR
        >>> MIR(memory_size=600, candidates=5)
        MIR(0 of 600 examples, policy='reservoir', 0 experiences)
    """

    def __init__(
        self,
        memory_size: int,
        candidates: int = 3,
        step_size: float = 0.05,
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
        if candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {candidates}: with one there is nothing to choose")
        if not (step_size > 0 and math.isfinite(step_size)):
            raise ValueError(f"step_size must be positive and finite, got {step_size}")
        if replay_ratio == 0:
            raise ValueError("replay_ratio must be positive, got 0: MIR chooses what is replayed")
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
        self.candidates, self.step_size = candidates, step_size
        self._now: Joined | None = None  # the examples of the current batch
        self._has_tried = False  # whether the losses of this fit's first batch could be computed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and intercept each training batch before the callbacks see it."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError("MIR needs automatic optimization: it runs training_step a second time")
        if any(getattr(one, "adjusts_logits", False) for one in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "LogitAdjustment needs to know how often each class is replayed, and MIR replays some more often than "
                "the memory has them; use ERACE, or Replay"
            )
        self._now, self._has_tried = None, False
        transfer = trainer.strategy.batch_to_device

        def transfer_and_choose(batch: Any, *where: Any, **device: Any) -> Any:
            batch = transfer(batch, *where, **device)
            return self._chosen_of(trainer, batch) if trainer.training else batch

        replace_method(trainer.strategy, "batch_to_device", transfer_and_choose)

    def _detach(self) -> None:
        if self._trainer is not None:
            return_method(self._trainer.strategy, "batch_to_device")
        super()._detach()

    def joined(self, trainer: pl.Trainer, batch: Any) -> Joined:
        """Which examples are new and which are replayed in the batch that is being trained on."""
        assert self._now is not None
        return self._now

    def _chosen_of(self, trainer: pl.Trainer, batch: Any) -> Any:
        """A batch without the candidates that are not chosen. Call on every rank."""
        module, size = trainer.lightning_module, batch_size_of(batch)
        self._now = now = super().joined(trainer, batch)
        if not self._has_tried:
            advice = "give the module a task, a Task whose outputs() returns logits and targets"
            with trial(f"MIR cannot compute the loss of each example of {type(module).__name__}", advice):
                self._losses(trainer, take(batch, [0], size))
            self._has_tried = True
        if not len(now.view):
            return batch
        rows = range(now.replayed.start, now.replayed.stop)
        scores = self._scores(trainer, take(batch, list(range(now.n_new)), size), take(batch, list(rows) or [0], size))
        best = scores[: len(rows)].view(-1, self.candidates).argmax(1).tolist()
        chosen = [group * self.candidates + place for group, place in enumerate(best)]
        self._now = now._replace(slots=[now.slots[place] for place in chosen])
        return take(batch, [*range(now.n_new), *(rows[place] for place in chosen), *range(rows.stop, size)], size)

    def _scores(self, trainer: pl.Trainer, new: Any, candidates: Any) -> Tensor:
        """By how much the loss of each candidate would rise, float32 ``[candidates]``."""
        module, shards = trainer.lightning_module, shards_of(trainer)
        with isolate_rng():
            move = second_gradient(trainer, shards, lambda: training_loss(trainer, module, new))
        StepLogits.of(trainer).end()  # this pass was not that of the training step
        length = float(shards.dot(move, move).sqrt())
        before = self._losses(trainer, candidates)
        values = [value.clone() for value in shards.values()]
        for one, value in zip(move, values, strict=True):
            one.mul_(-self.step_size / max(length, 1e-30)).add_(value)
        shards.set_values(move)
        try:
            return self._losses(trainer, candidates) - before
        finally:
            shards.set_values(values)

    def _losses(self, trainer: pl.Trainer, batch: Any) -> Tensor:
        """The loss of each example in evaluation mode."""
        module = trainer.lightning_module
        with evaluation_mode(module), trainer.precision_plugin.val_step_context():
            losses = default_losses(module, batch).squeeze(1)
        shards_of(trainer).release()
        return losses
