"""Ends a run over a stream early where its scores promise nothing."""

from __future__ import annotations

from collections.abc import Callable

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback


class RunPruned(Exception):  # noqa: N818  (it is no error)
    """A run was ended because its scores so far are below those of others."""


class Pruning(ContinualCallback):
    """Asks after each experience whether the run is worth going on with.

    Must come after the :class:`~evertune.callbacks.ContinualEvaluation` whose average it reports. One process only:
    ranks that end at different times would wait for each other.

    Args:
        is_hopeless: Function ``(number of experiences learned, average accuracy on them) -> bool``.

    Raises:
        ValueError: In ``setup``, if there are several processes.
        RunPruned: After an experience, if the run is hopeless.

    Example:
        >>> Pruning(lambda experience, score: experience == 1 and score < 0.5).across_experiences
        True
    """

    keeps_nothing = True

    def __init__(self, is_hopeless: Callable[[int, float], bool]) -> None:
        self.is_hopeless = is_hopeless

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if trainer.world_size > 1:
            raise ValueError(f"Pruning works on one process, got {trainer.world_size}")

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Report the average, and end the run if it is hopeless."""
        learned, score = self.experience_index + 1, float(trainer.callback_metrics["average_accuracy"])
        if self.is_hopeless(learned, score):
            raise RunPruned(f"after experience {learned} the average is {100 * score:.1f} %")
