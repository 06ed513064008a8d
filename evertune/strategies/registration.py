"""Registers the strategies with Lightning by name; the strategies themselves are imported on first use."""

from __future__ import annotations

from functools import partial
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from evertune._lightning import Strategy

_VARIANTS = {
    "stage_1": {"stage": 1},
    "stage_2": {"stage": 2},
    "stage_3": {"stage": 3},
    "stage_2_offload": {"stage": 2, "offload_optimizer": True},
    "stage_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


def register_strategies(package: str) -> None:
    """Register the strategies with a Lightning package, so that ``strategy="evertune_deepspeed_stage_3"`` works.

    Args:
        package: ``"lightning.pytorch"`` or ``"pytorch_lightning"``, already imported.
    """
    registry = import_module(f"{package}.strategies").StrategyRegistry
    for name, settings in _VARIANTS.items():
        registry.register(
            f"evertune_deepspeed_{name}",
            partial(_make, package),
            description=f"DeepSpeed ZeRO {name.replace('_', ' ')} for one update after another, on CPU and GPU",
            override=True,
            **settings,
        )
    registry.register(
        "evertune_fsdp2",
        partial(_make_fsdp2, package),
        description="FSDP2 for one update after another, on CPU and GPU",
        override=True,
    )


def _make(package: str, **settings: Any) -> Strategy:
    from evertune.strategies.deepspeed import strategy_class

    return strategy_class(package)(**settings)


def _make_fsdp2(package: str, **settings: Any) -> Strategy:
    from evertune.strategies.fsdp2 import strategy_class

    return strategy_class(package)(**settings)
