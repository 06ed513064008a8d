"""The same optimizer steps on another number of processes: how a step's examples are shared out.

What an update learns depends on which examples each optimizer step sees. ``ExperienceDataModule`` deals them so that
this is the same on any number of processes, as long as the *step size* is: processes x ``batch_size`` x
``accumulate_grad_batches``. When a node is lost, or comes back, keep the step size and change the rest.
"""

from __future__ import annotations

from pathlib import Path

from evertune.training.checkpoint import read_manifest, step_size_of


def share_out(step_size: int, processes: int, at_most: int) -> tuple[int, int]:
    """Share the examples of an optimizer step out among processes.

    Args:
        step_size: examples in a step, over all processes.
        processes: how many there are.
        at_most: examples that a process can hold in one batch.

    Returns:
        ``(batch_size, accumulate_grad_batches)``: the largest batches that divide a process's share evenly.

    Raises:
        ValueError: when a number is not positive, or the step does not divide among the processes.

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
            f"an optimizer step of {step_size} examples does not divide among {processes} processes; it does among "
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
    """The batches with which a fit goes on from a checkpoint, in the same optimizer steps, on the processes at hand.

    Call it before the loaders of a fit are made, on every rank, and set ``batch_size`` of the datamodule and
    ``accumulate_grad_batches`` of the trainer.

    Args:
        checkpoint: what :func:`evertune.training.checkpoint.latest` gave; None when the fit starts anew.
        processes: how many there are now (``trainer.world_size``).
        batch_size: as configured: what a process can hold.
        accumulation: as configured.
        step_size: of the run, for a fit that starts anew in it; a checkpoint knows its own.

    Returns:
        ``(batch_size, accumulate_grad_batches)``. Those configured, where there is nothing to go on from, or where
        they make steps of the same size.

    Raises:
        ValueError: when the steps do not divide among the processes (learn the update anew, or use another number),
            or the checkpoint's manifest is damaged.

    Example:
        >>> layout(None, processes=1, batch_size=16), layout(None, processes=1, batch_size=16, step_size=64)
        ((16, 1), (16, 4))
    """
    if checkpoint is not None:
        saved = read_manifest(Path(checkpoint).parent)
        step_size = step_size_of(saved)
    if step_size is None or step_size == processes * batch_size * accumulation:
        return batch_size, accumulation
    return share_out(step_size, processes, batch_size)
