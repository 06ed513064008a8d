"""What a run under chaos tells of itself, so that it can be compared with one that nobody disturbed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay


class Told(pl.Callback):
    """Writes down where each attempt starts, what each rank trains on, and what has been learned; the last callback.

    Args:
        folder: with a file for each rank, in which a line is one attempt's start or one step.
        seconds: that a step takes at least, so that there is time to disturb it.
    """

    across_experiences = True

    def __init__(self, folder: str, seconds: float = 0.1) -> None:
        self.folder, self.seconds = Path(folder), seconds

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self._tell(trainer, start=True)

    def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        self._tell(trainer, examples=[[token for token, on in zip(*row, strict=True) if on] for row in rows])
        time.sleep(self.seconds)

    def on_fit_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        if not trainer.interrupted:
            for callback in trainer.callbacks:
                if isinstance(callback, EWC | Replay):
                    callback.save(self.folder / trainer.experience.name / type(callback).__name__)

    def _tell(self, trainer: Any, **facts: Any) -> None:
        facts |= {"experience": trainer.experience.name, "step": trainer.global_step, "pid": os.getpid()}
        facts["attempt"] = os.environ.get("MASTER_PORT")  # torchrun's agents agree on another one for each
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")
