"""Elastic training: the same optimizer steps on a different number of processes.

What an update learns depends on which examples each optimizer step sees. ``ExperienceDataModule`` deals them so that
this does not depend on the number of processes, as long as the *step size* (processes x ``batch_size`` x
``accumulate_grad_batches``) stays the same. When a node is lost or comes back, keep the step size and change the rest.
"""

from __future__ import annotations

from pathlib import Path

from evertune.training.manifest import CheckpointManifest


def share_out(step_size: int, processes: int, at_most: int) -> tuple[int, int]:
    """Distribute the examples of an optimizer step over processes.

    Args:
        step_size: Examples in an optimizer step, over all processes.
        processes: Number of processes.
        at_most: Maximum number of examples in one batch of a process.

    Returns:
        ``(batch_size, accumulate_grad_batches)``: the largest batches that divide a process's share evenly.

    Raises:
        ValueError: If a number is not positive, or the step size is not divisible by the number of processes.

    Example:
        >>> share_out(32, processes=4, at_most=16), share_out(32, processes=1, at_most=16)
        ((8, 1), (16, 2))
    """
    for name, value in (("step_size", step_size), ("processes", processes), ("at_most", at_most)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    share, rest = divmod(step_size, processes)
    if rest:
        numbers = [str(number) for number in range(1, step_size + 1) if step_size % number == 0]
        raise ValueError(
            f"an optimizer step of {step_size} examples cannot be divided among {processes} processes; it can be among "
            f"{', '.join(numbers[:-1])} or {numbers[-1]}"
        )
    batch_size = max(size for size in range(1, min(share, at_most) + 1) if share % size == 0)
    return batch_size, share // batch_size


def layout(
    checkpoint: str | Path | None,
    processes: int,
    batch_size: int,
    accumulation: int = 1,
    *,
    step_size: int | None = None,
) -> tuple[int, int]:
    """Batch size and accumulation that resume a checkpoint in the same optimizer steps on the current processes.

    Call it on every rank before the loaders of a fit are created, and set ``batch_size`` of the datamodule and
    ``accumulate_grad_batches`` of the trainer.

    Args:
        checkpoint: Result of :func:`evertune.training.checkpoint.latest`; None if the fit starts from the beginning.
        processes: Current number of processes (``trainer.world_size``).
        batch_size: Configured batch size: the maximum for a process.
        accumulation: Configured number of batches per optimizer step.
        step_size: Examples in an optimizer step of the run, for a fit without a checkpoint; a checkpoint stores its
            own.

    Returns:
        ``(batch_size, accumulate_grad_batches)``. The configured values if there is nothing to resume, or if they
        already give steps of the same size.

    Raises:
        ValueError: If the step size is not divisible by the number of processes (restart the update from scratch, or
            use another number of processes), or the checkpoint's manifest is damaged.

    Example:
        >>> layout(None, processes=1, batch_size=16), layout(None, processes=1, batch_size=16, step_size=64)
        ((16, 1), (16, 4))
    """
    if checkpoint is not None:
        step_size = CheckpointManifest.read(Path(checkpoint).parent).layout.step_size
    if step_size is None or step_size == processes * batch_size * accumulation:
        return batch_size, accumulation
    return share_out(step_size, processes, batch_size)
