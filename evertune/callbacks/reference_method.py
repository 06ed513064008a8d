"""Base class of methods that compare the gradient with that of examples of the memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.gradient_method import GradientMethod
from evertune.callbacks.replay.callback import Replay
from evertune.shards.second_gradient import second_gradient
from evertune.shards.shards import ParameterShards


class ReferenceMethod(GradientMethod):
    """Base class of methods that compare the gradient with that of examples of the memory of the trainer's ``Replay``.

    The reference gradient is that of the loss that ``training_step`` returns for a batch of the memory, without what
    callbacks add to the loss, and without a loss scale. It is computed in a backward pass of its own, and averaged over
    the ranks. What ``training_step`` logs meanwhile is dropped.

    Args:
        reference_size: Number of examples in a reference batch, over all ranks.
    """

    keeps_nothing = True  # the memory is that of Replay

    def __init__(self, reference_size: int) -> None:
        if reference_size < 1:
            raise ValueError(f"reference_size must be positive, got {reference_size}")
        self.reference_size = reference_size
        self._replay: Replay | None = None  # within a fit

    @classmethod
    def bytes_per_weight(cls) -> int | None:
        """Bytes per trainable weight that a rank updates: one gradient, within a step."""
        return 4

    @property
    def acts(self) -> bool:
        return super().acts and self._replay is not None and len(self._replay.memory) > 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and find the memory."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        name = type(self).__name__
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, ReferenceMethod) and other is not self:
                raise ValueError(
                    f"{name} and {type(other).__name__} in one Trainer: each projects the gradient by the same memory, "
                    "and the second would undo what the first guarantees; use one"
                )
        self._replay = Replay.of(trainer)
        if self._replay is None:
            raise ValueError(f"{name} needs the memory of a Replay: add Replay(memory_size=...) to the callbacks")
        self._replay.check_whole(name)
        if not pl_module.automatic_optimization:
            raise ValueError(f"{name} needs automatic optimization: it runs training_step a second time")
        if self.reference_size % trainer.world_size:
            raise ValueError(
                f"reference_size must be a multiple of the number of processes, which share the examples; got "
                f"{self.reference_size} on {trainer.world_size}"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the memory and the strategy's buffers."""
        super().teardown(trainer, pl_module, stage)
        self._replay = None

    def reference_gradient(
        self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards, slots: Sequence[int]
    ) -> list[Tensor]:
        """The gradient of the mean loss on examples of the memory, one tensor per fragment. Call on every rank.

        Args:
            trainer: Trainer in training, before an optimizer step. So are ``module`` and ``shards``.
            module: The module.
            shards: The weights.
            slots: Slots of the examples of all ranks; equally many for each.
        """
        assert self._replay is not None
        own = slots[trainer.global_rank :: trainer.world_size]
        batch = self._replay.batch_of(trainer, [self._replay.memory[slot] for slot in own])
        return second_gradient(trainer, shards, lambda: training_loss(trainer, module, batch))


def training_loss(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor:
    """The loss that ``training_step`` returns for a batch, beside the batch that is being trained on.

    It is called through the module's own ``__call__``, so that the hooks which gather sharded weights run, but not
    through the strategy's wrapper. What it logs is dropped.

    Raises:
        ValueError: If there is no loss.
    """
    step = module.training_step
    takes_index = len(inspect.signature(step).parameters) > 1
    arguments = (batch, trainer.fit_loop.epoch_loop.batch_idx) if takes_index else (batch,)
    own: dict[str, Any] = {name: vars(module)[name] for name in ("forward", "log") if name in vars(module)}

    def restore() -> None:
        for name in ("forward", "log"):
            vars(module).pop(name, None)
        vars(module).update(own)

    def redirected(*arguments: Any) -> Any:
        vars(module).pop("forward")
        if "forward" in own:
            vars(module)["forward"] = own["forward"]
        return step(*arguments)

    vars(module).update(forward=redirected, log=lambda *_, **__: None)
    try:
        with trainer.precision_plugin.train_step_context():
            output = module(*arguments)
    finally:
        restore()
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step of {type(module).__name__} returned a {type(loss).__name__} for examples of the memory, "
            "and not a loss"
        )
    return loss
