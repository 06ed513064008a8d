"""Learning-rate schedules: a linear warm-up, then a decay or a constant rate with a cool-down, within each update."""

from __future__ import annotations

import math
from typing import Literal, get_args

from evertune._lightning import pl

Schedule = Literal["linear", "cosine", "constant", "infinite"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def check_schedule(schedule: str, warmup_ratio: float, final_ratio: float, cooldown_ratio: float) -> None:
    """Refuse settings that are out of range or do not go together.

    Raises:
        ValueError: If they are.
    """
    if not 0 <= warmup_ratio < 1:
        raise ValueError(f"warmup_ratio must be in [0, 1), got {warmup_ratio}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {list(SCHEDULES)}, got {schedule!r}")
    if not 0 <= final_ratio < 1:
        raise ValueError(f"final_ratio must be in [0, 1), got {final_ratio}")
    if final_ratio and schedule == "constant":
        raise ValueError(f"final_ratio={final_ratio} is where a decay ends, and schedule='constant' has none")
    if not 0 < cooldown_ratio <= 1:
        raise ValueError(f"cooldown_ratio must be in (0, 1], got {cooldown_ratio}")
    if schedule == "infinite" and warmup_ratio + cooldown_ratio > 1:
        raise ValueError(
            f"warmup_ratio={warmup_ratio} and cooldown_ratio={cooldown_ratio} are more than the whole update"
        )


def learning_rate_factor(
    step: int, n_warmup: int, n_steps: int | None, schedule: Schedule, final: float = 0.0, n_cooldown: int = 0
) -> float:
    """The factor of the learning rate at a step of an update.

    It rises linearly from ``final`` to 1 over ``n_warmup`` steps, starting above ``final`` so that the first step is
    not wasted. Then it stays at 1 (``constant``), falls to ``final`` after the last step (``linear``, ``cosine``), or
    does first the one and then the other (``infinite``; ``1 - sqrt`` in the cool-down).

    Args:
        step: Index of the step, from 0.
        n_warmup: Number of warm-up steps.
        n_steps: Number of steps of the update; may be None for ``constant``.
        schedule: Shape after the warm-up.
        final: Factor at which the update ends.
        n_cooldown: Number of steps of the cool-down of ``infinite``.

    >>> [round(learning_rate_factor(step, 2, 6, "linear"), 2) for step in range(7)]
    [0.33, 0.67, 1.0, 0.75, 0.5, 0.25, 0.0]
    >>> [round(learning_rate_factor(step, 1, 6, "infinite", final=0.1, n_cooldown=2), 2) for step in range(7)]
    [0.55, 1.0, 1.0, 1.0, 1.0, 0.36, 0.1]
    """
    if step < n_warmup:
        return final + (1.0 - final) * (step + 1) / (n_warmup + 1)
    if schedule == "constant" or n_steps is None:
        return 1.0
    n_constant = n_steps - n_cooldown if schedule == "infinite" else n_warmup
    progress = min(1.0, max(0, step - n_constant) / max(1, n_steps - n_constant))
    if schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = 1.0 - (math.sqrt(progress) if schedule == "infinite" else progress)
    return final + (1.0 - final) * left


def learning_rate_for(n_weights: int) -> float:
    """The peak learning rate of AdamW that suits a pretrained transformer with ``n_weights``.

    In inverse proportion to its size, from 5e-5 for BERT's 110 million (Devlin et al. 2019), between 1e-5 and 2e-4.

    >>> [f"{learning_rate_for(millions * 10**6):.1e}" for millions in (22, 110, 335, 7000)]
    ['2.0e-04', '5.0e-05', '1.6e-05', '1.0e-05']
    """
    return min(2e-4, max(1e-5, 5e-5 * 110e6 / n_weights))


def remaining_steps(trainer: pl.Trainer) -> int | None:
    """Number of optimizer steps of the ``fit`` that is about to start, or None if it is unknown.

    Earlier ``fit`` calls of the same trainer do not count, so that each update gets its own schedule.
    """
    estimate = trainer.estimated_stepping_batches
    if math.isinf(estimate) or estimate < 0:
        return None
    limits = [trainer.max_steps - trainer.global_step] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches):
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        limits.append(per_epoch * (trainer.max_epochs - trainer.current_epoch))
    return max(0, min(limits))
