"""What a new class is worth before it is trained: rows that are imprinted from a few examples, beside the update.

The preset learns the first four updates of C20 (``benchmarks/text_streams.py``: CLINC150, 30 intents in each). The 30
intents of the fifth are then imprinted from 5, 10 or 16 examples each, as ``update.imprint_after`` does. After that,
the update trains on all 20. The accuracy is on all test examples, among all classes. The time is of one thread, without
loading the model and without the gate.

    OMP_NUM_THREADS=1 python benchmarks/new_classes.py --data FOLDER [--seeds 3] [--quick]

``--quick`` learns ten intents in five updates, once.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl
from text_streams import MODEL, QUIET, task

from evertune import ContinualTrainer
from evertune.live.imprinting import name_classes
from evertune.presets import preset
from evertune.streams import ExperienceDataModule, ExperienceStream

SHOWN = (5, 10, 16)
FEW = SHOWN[0]
LEAST_NEW = 0.5
MOST_LOST = 3.0  # points of accuracy on the old intents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seeds = 1 if options.quick else options.seeds
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for seed in range(seeds):
        for name, figures in measured(options.data, seed, options.quick).items():
            found[name].append(figures)
    rows = {name: [fmean(values) for values in zip(*some, strict=True)] for name, some in found.items()}
    print(f"{'':<24}{'new intents':>14}{'old intents':>14}{'seconds':>10}")
    for name, (new, old, seconds) in rows.items():
        print(f"{name:<24}{new:>14.1%}{old:>14.1%}{seconds:>10.1f}")
    few, before = rows[f"{FEW} examples"], rows["before"]
    lost = 100 * (before[1] - few[1])
    bars = {
        f"new intents, {FEW} examples": {"value": round(few[0], 3), "limit": LEAST_NEW, "ok": few[0] >= LEAST_NEW},
        "points lost on old intents": {"value": round(lost, 2), "limit": MOST_LOST, "ok": lost <= MOST_LOST},
    }
    columns = ("new", "old", "seconds")
    results = {
        f"{name}, {column}": round(value, 4)
        for name, row in rows.items()
        for column, value in zip(columns, row, strict=True)
    }
    print(json.dumps({"benchmark": "new_classes", "size": f"{seeds} seeds", "results": results, "bars": bars}))


def measured(data: Path, seed: int, quick: bool) -> dict[str, tuple[float, float, float]]:
    """Accuracy on the new and on the old intents, and the seconds that it took, before, imprinted, and trained."""
    made = task(data, "C20", seed, "test", quick)
    pl.seed_everything(seed, verbose=False)
    chosen = preset("text_classification", memory_size=600, stream=made.learned, model=MODEL, seed=seed)
    module = chosen.make_module(MODEL)
    settings: dict[str, Any] = {"max_length": 64, "seed": seed, **chosen.data}

    def batches(experience: Any) -> ExperienceDataModule:
        return ExperienceDataModule(experience, module.tokenizer, task=module.task, **settings)

    def scored(one: Any) -> tuple[float, float]:
        judge = pl.Trainer(**QUIET)
        known = [experience for experience in made.scored if set(experience.classes) <= set(one.classes)]
        loaders = [batches(experience).test_dataloader() for experience in known]
        scores = [judge.test(one, loader, verbose=False)[0]["test_accuracy"] for loader in loaders]
        new = scores.pop() if len(scores) == len(made.scored) else 0.0
        return new, fmean(scores)

    trainer = ContinualTrainer(**{**QUIET, **chosen.trainer}, callbacks=chosen.callbacks())
    old = ExperienceStream(made.learned[:-1], label="label")
    trainer.fit_stream(module, old, datamodule=batches, untrained=False)
    last = made.learned[-1]
    found = {"before": (*scored(module), 0.0)}
    examples: dict[str, list[Any]] = defaultdict(list)
    for number, row in enumerate(last.train):
        examples[row["label"]].append({"id": str(number), "record": row})
    for n in SHOWN:
        other = copy.deepcopy(module)
        start = time.process_time()
        name_classes(other, {name: some[:n] for name, some in examples.items()}, max_length=64)
        seconds = time.process_time() - start
        found[f"{n} examples"] = (*scored(other), seconds)
    start = time.process_time()
    trainer.fit_experience(module, last, batches(last))
    seconds = time.process_time() - start
    return {**found, "trained on 20": (*scored(module), seconds)}


if __name__ == "__main__":
    main()
