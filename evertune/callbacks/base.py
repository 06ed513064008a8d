"""The two moments every continual-learning method lives by: an experience starts, an experience ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from evertune._lightning import Callback, pl


class ContinualCallback(Callback):
    """A Lightning callback that learns across experiences.

    An experience starts with ``fit`` and ends when ``fit`` completes, so a plain ``Trainer`` needs no other call. A
    ``DriftTrigger`` ends one and starts the next in the middle of a ``fit``. A ``fit`` that raises, or that is
    interrupted, ends nothing: what was remembered stays as it was.

    Attributes:
        experience_index: how many experiences this callback has completed.
    """

    experience_index: int = 0

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Called before the first step on a new experience: restore and allocate here."""

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Called after the last step on an experience, with the strategy still set up: consolidate here."""

    def save(self, directory: str | Path) -> None:
        """Write the learning state to a folder (safetensors, Arrow and JSON). Call on every rank."""

    def load(self, directory: str | Path) -> None:
        """Read the learning state that :meth:`save` wrote, at any world size. Call on every rank."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_experience_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.interrupted:
            end_experience(self, trainer, pl_module)


def end_experience(callback: ContinualCallback, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Consolidate one callback and count the experience."""
    callback.on_experience_end(trainer, module)
    callback.experience_index += 1


def named_callbacks(trainer: pl.Trainer) -> Iterator[tuple[str, ContinualCallback]]:
    """The methods of a trainer by the names of the folders that keep what they have learnt."""
    seen: Counter[str] = Counter()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ContinualCallback):
            name = type(callback).__name__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name}-{seen[name]}", callback
