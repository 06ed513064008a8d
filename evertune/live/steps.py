"""Notes how far the training of an update has come, for whoever watches it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from evertune._lightning import Callback, pl
from evertune.live.staging import STEPS

_PAUSE = 1.0  # seconds between two notes: what is shown need not be newer


class Steps(Callback):
    """Writes the number of optimizer steps so far, and of all, to a small file: once a second at most, and by one rank.

    It only informs. A disk that is full stops no training because of it, and nothing is read back.

    Args:
        staging: Folder of the update in progress.
    """

    across_experiences = True

    def __init__(self, staging: Path) -> None:
        self._path = staging / STEPS
        self._noted = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if time.monotonic() - self._noted >= _PAUSE:
            self._note(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(trainer)

    def _note(self, trainer: pl.Trainer) -> None:
        self._noted = time.monotonic()
        if not trainer.is_global_zero:
            return
        draft = self._path.with_suffix(".tmp")
        with suppress(OSError):
            draft.write_text(json.dumps({"step": trainer.global_step, "steps": _all(trainer)}))
            draft.replace(self._path)  # without waiting for the disk: after a power failure nobody needs it


def _all(trainer: pl.Trainer) -> int | None:
    """The number of optimizer steps of the whole fit; None if that is not known."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < float("inf") else None
