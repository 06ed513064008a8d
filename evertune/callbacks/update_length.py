"""How long an update trains: the number of epochs follows from the number of new examples."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

from torch.utils.data import DataLoader

from evertune._lightning import Callback, pl, rank_zero_info, train_data_source


class UpdateLength(Callback):
    """Sets ``max_epochs`` of each fit by the size of its training data: few examples are seen several times.

    An update of ``n`` examples gets ``examples / n`` epochs, rounded, at least 1 and at most ``max_epochs``. So a night
    with 200 records and one with 20,000 need no settings of their own. The trainer's own ``max_epochs`` does not apply;
    its ``max_steps`` and ``max_time`` do.

    Args:
        examples: Examples to train on in an update, repetitions counted. Default: 1,800, three
            epochs of 600 examples.
        max_epochs: Most epochs. Default: 3.

    Raises:
        ValueError: If an argument is not positive, or the training data have no length.

    Example:
        >>> [UpdateLength().epochs(n_examples) for n_examples in (60, 600, 900, 15_000)]
        [3, 3, 2, 1]
    """

    across_experiences = True

    def __init__(self, examples: int = 1800, max_epochs: int = 3) -> None:
        for name, value in (("examples", examples), ("max_epochs", max_epochs)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.examples = examples
        self.max_epochs = max_epochs

    def epochs(self, n_examples: int) -> int:
        """The number of epochs for an update of ``n_examples``."""
        return max(1, min(self.max_epochs, math.floor(self.examples / max(1, n_examples) + 0.5)))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the number of epochs."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        n_examples = _n_training_examples(trainer)
        trainer.fit_loop.max_epochs = self.epochs(n_examples)
        rank_zero_info(f"{n_examples} new examples: {trainer.max_epochs} epochs")


def _n_training_examples(trainer: pl.Trainer) -> int:
    """The length of the training data, before Lightning has set up the loaders."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    data = getattr(getattr(datamodule, "experience", None), "train", None)
    if data is None:
        loader = train_data_source(trainer).dataloader()
        data = loader.dataset if isinstance(loader, DataLoader) else None
    if not isinstance(data, Sized):
        raise ValueError(
            "UpdateLength needs training data with a length: a DataLoader over a map-style dataset, or a datamodule "
            "with an experience; set max_epochs on the trainer instead"
        )
    return len(data)
