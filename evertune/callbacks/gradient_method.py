"""Base class of methods that act on the gradient, or on the weights right after a step."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.shards.opened import shards_of
from evertune.shards.shards import ParameterShards
from evertune.shards.support import check_strategy, is_step_boundary
from evertune.strategies.deepspeed import warn_about_stock_deepspeed


class GradientMethod(ContinualCallback):
    """Base class of methods that act on the gradient, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    At every optimizer step, once the gradients are accumulated and averaged over the ranks, all such methods of a
    trainer act together: first each may look (:meth:`observe_gradient`), then each adds its term
    (:meth:`add_to_gradient`), then each may change the whole (:meth:`project_gradient`), after the step each may move
    the weights (:meth:`after_step`), and last each may change how they have moved (:meth:`constrain_step`). Within each
    of these, they act in the order of their class names, so the order of the callbacks does not matter.

    Attributes:
        moves_weights: Whether :meth:`after_step` is to be called.
        constrains_steps: Whether :meth:`constrain_step` is to be called.
    """

    moves_weights: bool = False
    constrains_steps: bool = False

    _shards: ParameterShards | None = None  # within a fit
    _hooks: tuple[RemovableHandle, ...] = ()  # in the optimizer's step

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

    def constrain_step(self, names: list[str], values: dict[int, Tensor]) -> None:
        """Change the weights after the step and all :meth:`after_step`; see ``ParameterShards.after_whole_step``.

        Called on every rank, and only if :attr:`constrains_steps`.

        Args:
            names: Names of the parameters that were updated on any rank.
            values: Weights of this rank's fragments of them by number, flat, to change in place.
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
        self._use(self._view(trainer, also))

    def _view(self, trainer: pl.Trainer, also: Collection[str] = ()) -> ParameterShards:
        """The weights that this method acts on, and those named although they are frozen."""
        return shards_of(trainer, also=also)

    def _use(self, shards: ParameterShards | None) -> None:
        self._shards = shards
        self._remove_hooks()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Have all methods act, once per optimizer step."""
        methods = [one for one in trainer.callbacks if isinstance(one, GradientMethod)]  # type: ignore[attr-defined]
        if self is not methods[0] or not is_step_boundary(trainer):
            return
        methods = sorted(methods, key=lambda one: type(one).__name__)
        acting = [(one, one._shards) for one in methods if one.acts and one._shards is not None]
        for method, shards in acting:
            method.observe_gradient(shards)
        _hook_into_step(trainer.optimizers[0], acting)
        for method, shards in acting:
            method.add_to_gradient(shards)
        for method, shards in acting:
            method.project_gradient(trainer, pl_module, shards)

    def _after_step(self, number: int, value: Tensor, learning_rate: float) -> None:
        if self.acts:
            self.after_step(number, value, learning_rate)

    def _constrain_step(self, names: list[str], values: dict[int, Tensor]) -> None:
        if self.acts:
            self.constrain_step(names, values)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the strategy's buffers."""
        self._use(None)


def _hook_into_step(optimizer: Optimizer, acting: list[tuple[GradientMethod, ParameterShards]]) -> None:
    """Have methods act inside the coming step, in order: whichever began first, all move before any constrains."""
    for method, _ in acting:
        method._remove_hooks()
    for method, shards in acting:
        if method.moves_weights:
            method._hooks += (shards.after_step(optimizer, method._after_step),)
    for method, shards in acting:
        if method.constrains_steps:
            method._hooks += (shards.after_whole_step(optimizer, method._constrain_step),)
