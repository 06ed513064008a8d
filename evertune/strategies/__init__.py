"""Where an update runs: DeepSpeed on CPU and GPU, and the weights as each rank holds them."""

from evertune.strategies.deepspeed import EvertuneDeepSpeedStrategy, register_strategies
from evertune.strategies.shards import Fragment, ParameterShards, ReplicatedShards
from evertune.strategies.support import check_strategy

__all__ = [
    "EvertuneDeepSpeedStrategy",
    "Fragment",
    "ParameterShards",
    "ReplicatedShards",
    "check_strategy",
    "register_strategies",
]
