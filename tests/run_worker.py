"""What the tests of interrupted runs put into their configuration."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytorch_lightning as pl


class KillAt(pl.Callback):
    """SIGKILL in the n-th batch of this process, where the environment says so (``KILL_AT``)."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == int(os.environ.get("KILL_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
