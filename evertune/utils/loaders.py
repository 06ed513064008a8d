"""What Lightning leaves out when a fit resumes from a checkpoint."""

from __future__ import annotations

from evertune._lightning import give_loader_states, has_loader_states, pl, reset_loaders


def resume_loaders(trainer: pl.Trainer) -> None:
    """Let the training loaders resume where the checkpoint left them; call it in ``on_train_start``.

    Lightning does so where it sets them up when training starts. Where it has set them up before, because a schedule
    asked how long ``fit`` will be, it had not read that part of the checkpoint yet.
    """
    if trainer.fit_loop.restarting and has_loader_states(trainer):
        restart_loaders(trainer)


def restart_loaders(trainer: pl.Trainer) -> None:
    """Make a new iterator over the training loaders, from where the checkpoint left them if there is one."""
    reset_loaders(trainer)
    give_loader_states(trainer)
