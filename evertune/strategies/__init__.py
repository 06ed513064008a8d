"""Where an update runs: DeepSpeed on CPU and GPU."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.strategies.deepspeed import EvertuneDeepSpeedStrategy as EvertuneDeepSpeedStrategy
    from evertune.strategies.deepspeed import register_strategies as register_strategies

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.strategies.deepspeed": "EvertuneDeepSpeedStrategy register_strategies",
    },
)
