"""Strategies that run an update: DeepSpeed and FSDP2, on CPU and GPU."""

from evertune.utils.lazy import face

TYPE_CHECKING = False
if TYPE_CHECKING:
    from evertune.strategies.deepspeed import EvertuneDeepSpeedStrategy as EvertuneDeepSpeedStrategy
    from evertune.strategies.fsdp2 import EvertuneFSDP2Strategy as EvertuneFSDP2Strategy
    from evertune.strategies.registration import register_strategies as register_strategies

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.strategies.deepspeed": "EvertuneDeepSpeedStrategy",
        "evertune.strategies.fsdp2": "EvertuneFSDP2Strategy",
        "evertune.strategies.registration": "register_strategies",
    },
)
