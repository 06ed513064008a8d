"""Base class of methods that act on the gradient, or on the weights right after a step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.shards.shards import ParameterShards
from evertune.shards.support import check_strategy, is_step_boundary
from evertune.strategies.deepspeed import warn_about_stock_deepspeed


class GradientMethod(ContinualCallback):
    """Base class of methods that act on the gradient, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    At every optimizer step, once the gradients are accumulated and averaged over the ranks, all such methods of a
    trainer act together: first each may look (:meth:`observe_gradient`), then each adds its term
    (:meth:`add_to_gradient`), then each may change the whole (:meth:`project_gradient`), and after the step each may
    move the weights (:meth:`after_step`). Within each of these, they act in the order of their class names, so the
    order of the callbacks does not matter.

    Attributes:
        moves_weights: Whether :meth:`after_step` is to be called.
    """

    moves_weights: bool = False

    _shards: ParameterShards | None = None  # within a fit
    _moving: Any = None  # the handle of the hook in the optimizer's step

    def observe_gradient(self, shards: ParameterShards) -> None:
        """Look at the gradient of the training loss, before anything is added to it. Called on every rank."""

    def add_to_gradient(self, shards: ParameterShards) -> None:
        """Add to the gradient with ``shards.add_to_gradient``. Called on every rank."""

    def project_gradient(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Change the gradient, to which all methods have added. Called on every rank."""

    def after_step(self, number: int, value: Tensor, learning_rate: float) -> None:
        """Move a fragment of the weights right after the optimizer has updated it; see ``ParameterShards.after_step``.

        Called only if :attr:`moves_weights`.

        Args:
            number: Number of the fragment.
            value: Its weights, flat, to change in place.
            learning_rate: Learning rate of its parameter group.
        """

    @property
    def acts(self) -> bool:
        """Whether this method has anything to do in a step."""
        return self._shards is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_strategy(trainer, type(self).__name__)
            warn_about_stock_deepspeed(trainer, type(self).__name__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer)

    def _start(self, trainer: pl.Trainer, also: Collection[str] = ()) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"{type(self).__name__} works with one optimizer, got {len(trainer.optimizers)}")
        self._use(ParameterShards.of(trainer, also=also))

    def _use(self, shards: ParameterShards | None) -> None:
        self._shards = shards
        if self._moving is not None:
            self._moving.remove()
            self._moving = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Have all methods act, once per optimizer step."""
        methods = [one for one in trainer.callbacks if isinstance(one, GradientMethod)]  # type: ignore[attr-defined]
        if self is not methods[0] or not is_step_boundary(trainer):
            return
        acting = [(one, one._shards) for one in sorted(methods, key=lambda one: type(one).__name__) if one.acts]
        for method, shards in acting:
            assert shards is not None
            method.observe_gradient(shards)
            if method.moves_weights and method._moving is None:
                method._moving = shards.after_step(trainer.optimizers[0], method._after_step)
        for method, shards in acting:
            assert shards is not None
            method.add_to_gradient(shards)
        for method, shards in acting:
            assert shards is not None
            method.project_gradient(trainer, pl_module, shards)

    def _after_step(self, number: int, value: Tensor, learning_rate: float) -> None:
        if self.acts:
            self.after_step(number, value, learning_rate)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the strategy's buffers."""
        self._use(None)
