"""What training under SLURM needs to be disturbed at its leisure."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from evertune._lightning import pl


class SlowWhile(pl.Callback):
    """Waits a second after every batch while a file is there.

    Args:
        file: its name.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, *arguments: Any) -> None:
        if self.file.exists():
            time.sleep(1)
