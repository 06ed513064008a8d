"""The strategies that evertune's callbacks support, checked before training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evertune._lightning import data_parallel_size, either, pl, start_method

if TYPE_CHECKING:
    from evertune._lightning import DeepSpeedStrategy, Strategy

FSDP2 = "evertune_fsdp2"
"""Name of evertune's FSDP2 strategy."""
_LAUNCHERS_THAT_COPY = ("spawn", "fork", "forkserver")


def is_deepspeed(trainer: pl.Trainer) -> bool:
    """Whether the trainer runs under DeepSpeed."""
    return isinstance(trainer.strategy, either("DeepSpeedStrategy"))


def is_fsdp2(trainer: pl.Trainer) -> bool:
    """Whether the trainer runs under evertune's FSDP2."""
    return getattr(trainer.strategy, "strategy_name", None) == FSDP2


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether each rank holds its part of the training state and writes it to a folder, the checkpoint."""
    return is_deepspeed(trainer) or is_fsdp2(trainer)


def is_step_boundary(trainer: pl.Trainer) -> bool:
    """Whether ``on_before_optimizer_step`` really precedes a step: DeepSpeed calls it on every micro-batch."""
    engine: Any = trainer.strategy.model
    return not is_deepspeed(trainer) or bool(engine.is_gradient_accumulation_boundary())


def check_strategy(trainer: pl.Trainer, who: str) -> None:
    """Reject unsupported strategies by name. Call it in ``setup``.

    Args:
        trainer: Trainer with its strategy chosen, set up or not.
        who: Name of the callback, used in the messages.

    Raises:
        ValueError: If the strategy hides its weights from evertune (FSDP of version 1 and others), the ZeRO stage is 0,
            the launcher copies the process (what a callback learns there would be lost), or ``round_robin_gradients``
            is enabled.
    """
    strategy = trainer.strategy
    name = _name_of(strategy)
    # a DeepSpeedStrategy is a DDPStrategy
    if not (isinstance(strategy, either("SingleDeviceStrategy") + either("DDPStrategy")) or is_fsdp2(trainer)):
        raise ValueError(
            f"{who} does not support strategy {name!r}{_reason(strategy)}; use one device, 'ddp', "
            f"'evertune_deepspeed_stage_1', '_2' or '_3', or {FSDP2!r}"
        )
    method = start_method(strategy)
    if method in _LAUNCHERS_THAT_COPY:
        raise ValueError(
            f"{who} does not support the {method!r} launcher of strategy {name!r}: what it learns would be lost "
            "with the copied process; use strategy='ddp', torchrun, or one device"
        )
    if isinstance(strategy, either("DeepSpeedStrategy")):
        _check_deepspeed(strategy, who)


def _check_deepspeed(strategy: DeepSpeedStrategy, who: str) -> None:
    config: Any = strategy.config
    zero = (config or {}).get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(f"{who} supports ZeRO stages 1, 2 and 3, got stage {stage!r} in the DeepSpeed config")
    if zero.get("round_robin_gradients"):
        raise ValueError(
            f"{who} does not support round_robin_gradients=True: it reorders the gradients of a rank; "
            "remove it from zero_optimization in the DeepSpeed config"
        )


def _reason(strategy: Strategy) -> str:
    """Why a strategy is not supported, where it is likely to be wanted."""
    if isinstance(strategy, either("FSDPStrategy")):
        return f" (FSDP of version 1, which flattens the weights: {FSDP2!r} shards each of them)"
    if not isinstance(strategy, either("ModelParallelStrategy")):
        return ""
    data, ranks = data_parallel_size(strategy), strategy.world_size  # type: ignore[attr-defined]
    if data != ranks:
        return (
            f" with data_parallel_size={data} for {ranks} ranks: {ranks // data} of them would train on the same data"
        )
    return f": {FSDP2!r} shards the module itself, and keeps what configure_model has sharded"


def _name_of(strategy: Strategy) -> str:
    name = getattr(strategy, "strategy_name", None) or type(strategy).__name__
    return str(name)
