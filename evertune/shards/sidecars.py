"""Per-rank state, saved in a folder inside a DeepSpeed checkpoint.

In a DeepSpeed checkpoint, Lightning stores the callback state of one rank and restores it on all of them.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any, Protocol

from evertune._lightning import pl, replace_method


class SavesFolder(Protocol):
    """A callback with its own state on every rank."""

    def save(self, directory: str | Path) -> None:
        """Write the folder. Called on every rank."""

    def load(self, directory: str | Path) -> None:
        """Read the folder. Called on every rank."""

    @property
    def has_state(self) -> bool:
        """Whether there is anything to save; the same on all ranks."""


def write_sidecar_with_checkpoints(trainer: pl.Trainer, callback: SavesFolder) -> None:
    """Make every later checkpoint of this trainer's strategy contain the callback's folder."""
    strategy = trainer.strategy
    save_checkpoint = strategy.save_checkpoint

    @wraps(save_checkpoint)
    def save_with_sidecar(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, filepath, storage_options)
        if callback.has_state:
            # The path may differ between ranks, so use that of rank 0.
            callback.save(_folder(strategy.broadcast(filepath), callback))

    replace_method(strategy, "save_checkpoint", save_with_sidecar)


def read_sidecar(trainer: pl.Trainer, callback: SavesFolder) -> None:
    """Load the callback's folder from the checkpoint that the trainer resumes from, if it has one."""
    folder = _folder(str(trainer.ckpt_path), callback)
    if folder.is_dir():
        callback.load(folder)


def _folder(checkpoint: str | Path, callback: SavesFolder) -> Path:
    return Path(checkpoint) / "evertune" / type(callback).__name__
