"""Corrections of how Lightning resumes loaders from a checkpoint."""

from __future__ import annotations

from evertune._lightning import give_loader_states, has_loader_states, pl, reset_loaders


def resume_loaders(trainer: pl.Trainer) -> None:
    """Let the training loaders resume where the checkpoint left them. Call it in ``on_train_start``.

    Lightning does so if it sets them up when training starts. If it has set them up earlier, because a schedule asked
    for the length of ``fit``, it had not read that part of the checkpoint yet.
    """
    if trainer.fit_loop.restarting and has_loader_states(trainer):
        restart_loaders(trainer)


def restart_loaders(trainer: pl.Trainer) -> None:
    """Create a new iterator over the training loaders, at the position in the checkpoint if there is one."""
    reset_loaders(trainer)
    give_loader_states(trainer)
