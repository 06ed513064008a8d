"""The view of the weights for a trainer's strategy."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from evertune._lightning import pl
from evertune.shards.fsdp2 import FSDP2Shards
from evertune.shards.replicated import ReplicatedShards
from evertune.shards.shards import ParameterShards
from evertune.shards.support import check_strategy, is_deepspeed, is_fsdp2
from evertune.shards.zero import FrozenZero3Shards, Zero3Shards, Zero12Shards


def shards_of(trainer: pl.Trainer, also: Collection[str] = ()) -> ParameterShards:
    """The trainable parameters as this rank holds them; the strategy must be set up (from ``on_fit_start`` on).

    Args:
        trainer: Trainer in training.
        also: Names of parameters to include although they are frozen at present; what is added to their gradient is
            discarded. Not under ZeRO, whose engine holds nothing for them.

    Raises:
        ValueError: If evertune does not support the strategy.

    Example::

        shards = shards_of(trainer)
        shards.add_to_gradient(weight_decay * value for value in shards.values())
    """
    check_strategy(trainer, "shards_of")
    module = trainer.lightning_module
    if is_fsdp2(trainer):
        return FSDP2Shards(module, trainer.optimizers, also=also)
    if not is_deepspeed(trainer):
        return ReplicatedShards(module, scaler=_scaler_until_step(trainer), also=also)
    engine: Any = trainer.strategy.model
    return Zero3Shards(module, engine) if engine.zero_optimization_stage() == 3 else Zero12Shards(module, engine)


def frozen_shards_of(trainer: pl.Trainer) -> ParameterShards:
    """The weights that are not trained: sharded under FSDP2 and ZeRO-3, replicated elsewhere. No gradients."""
    module = trainer.lightning_module
    if is_fsdp2(trainer):
        return FSDP2Shards(module, frozen=True)
    engine: Any = trainer.strategy.model
    if is_deepspeed(trainer) and engine.zero_optimization_stage() == 3:
        return FrozenZero3Shards(module, engine)
    return ReplicatedShards(module, frozen=True)


def _scaler_until_step(trainer: pl.Trainer) -> Any:
    """Lightning's loss scaler if a fused optimizer unscales the gradients inside its step, else None."""
    in_step = any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers)
    return getattr(trainer.precision_plugin, "scaler", None) if in_step else None
