"""Adam's second moment as an importance: it is there at the end of a fit, and costs nothing."""

from __future__ import annotations

from torch import Tensor

from evertune._lightning import pl
from evertune.shards.shards import ParameterShards


def second_moment(trainer: pl.Trainer, shards: ParameterShards) -> list[Tensor]:
    """The running mean of the squared gradients of the steps that Adam keeps, corrected for its start at 0::

        v_i / (1 - beta2^t)

    Near the end of training, where the mean gradient is small, this is about the Fisher information with true labels
    (``"empirical"``) divided by the number of examples in a step. It contains what methods add to the gradient, and
    clipping.

    Args:
        trainer: Trainer in training, after its first step.
        shards: The weights.

    Returns:
        One new flat fp32 tensor per fragment; zero for weights that have had no gradient.

    Raises:
        ValueError: If the optimizer keeps no second moment, or has several values of ``beta2``.
    """
    optimizer = trainer.optimizers[0]
    found = shards.optimizer_tensors(optimizer, "exp_avg_sq")
    rates = {float(group["betas"][1]) for group in optimizer.param_groups if "betas" in group}
    if found is None or not rates:
        raise ValueError(
            f'estimator="optimizer" reads the second moment of Adam or AdamW; {type(optimizer).__name__} keeps none'
        )
    if len(rates) > 1:
        raise ValueError(f'estimator="optimizer" needs one beta2 for all parameter groups, got {sorted(rates)}')
    correction = 1 - rates.pop() ** trainer.global_step
    return [value.float() / correction for value in found]
