"""Learning-rate schedules: a linear warm-up, then a decay, both over one update."""

from __future__ import annotations

import math
from typing import Literal, get_args

from evertune._lightning import pl

Schedule = Literal["linear", "cosine", "constant"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def learning_rate_factor(step: int, n_warmup: int, n_steps: int | None, schedule: Schedule) -> float:
    """What the learning rate is multiplied by at a step of an update.

    It rises linearly over ``n_warmup`` steps without wasting the first one on a rate of 0, then stays at 1
    (``constant``) or falls to 0 after the last step (``linear``, ``cosine``).

    Args:
        step: the step, from 0.
        n_warmup: how many steps the warm-up lasts.
        n_steps: how many steps the update has; may be None for ``constant``.
        schedule: the shape after the warm-up.

    >>> [round(learning_rate_factor(step, 2, 6, "linear"), 2) for step in range(7)]
    [0.33, 0.67, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    if schedule == "constant" or n_steps is None:
        return 1.0
    progress = min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def remaining_steps(trainer: pl.Trainer) -> int | None:
    """How many optimizer steps the ``fit`` about to start will take, or None when nobody can tell.

    Earlier ``fit`` calls of the same trainer do not count, so that each update gets a schedule of its own.
    """
    estimate = trainer.estimated_stepping_batches
    if math.isinf(estimate) or estimate < 0:
        return None
    limits = [trainer.max_steps - trainer.global_step] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches):
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        limits.append(per_epoch * (trainer.max_epochs - trainer.current_epoch))
    return max(0, min(limits))
