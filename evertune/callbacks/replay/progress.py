"""Numbers of batches in a fit: how many are done, how many are loaded ahead, and where an update's draws begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from evertune._lightning import n_processed, pl

_ALL = 1 << 62


@dataclass
class Progress:
    """Which batches of a fit belong to which experience, and to the draws of which update.

    Args:
        experience: Number of the experience's first batch in the fit.
        update: Number of the first batch with this update's draws.
        before: First batch and number of the previous update in the same fit; None if it began with this one.
    """

    experience: int = 0
    update: int = 0
    before: tuple[int, int] | None = None

    def switch(self, done: int, ahead: int, accumulated: int, update: int) -> None:
        """In the middle of a fit: another experience begins after ``done`` batches, and number ``update``.

        Its draws begin after all batches that may be loaded already, rounded up to whole optimizer steps: a step must
        not mix the draws of two memories.
        """
        self.before = self.update, update - 1
        self.experience = done
        self.update = done - (-ahead // accumulated) * accumulated


def batches_done(trainer: pl.Trainer) -> int:
    """The number of batches of the fit that have been trained on."""
    return n_processed(trainer.fit_loop.epoch_loop.batch_progress.total)


def batches_ahead(loader: DataLoader[Any]) -> int:
    """Upper bound on how many batches a loader is ahead of training: later ones are not collated yet."""
    try:
        length: int | None = len(loader)
    except TypeError:
        length = None
    prefetched = loader.num_workers * (loader.prefetch_factor or 0)
    return 1 + prefetched + (length is None)


def end_of_batches(trainer: pl.Trainer) -> int:
    """The number after that of the last batch trained on, of a fit with a single loader.

    When an iterable dataset is exhausted, all its batches have been trained on, and workers with more data than the
    others may have given theirs numbers above the count of batches.
    """
    progress, limit = trainer.fit_loop.epoch_loop.batch_progress, trainer.limit_train_batches
    between_batches = progress.current.ready == n_processed(progress.current)
    at_the_end = between_batches and progress.is_last_batch and isinstance(limit, float) and limit == 1
    return _ALL if at_the_end else batches_done(trainer)
