"""Where an update runs: DeepSpeed on CPU and GPU, and the weights as each rank holds them."""

from evertune.strategies.shards import Fragment, ParameterShards

__all__ = ["Fragment", "ParameterShards", "register_strategies"]


def register_strategies() -> None:
    """Register evertune's strategies with Lightning, so that ``Trainer(strategy="evertune_deepspeed_stage_3")`` works."""
