"""Tokens per second and MFU of fine-tuning on one GPU, with Replay and EWC and in a plain Lightning loop.

BERT-large and a Llama of 1B parameters classify random texts of fixed length (nothing is padding), with random weights:
neither changes the speed. bf16-mixed, sdpa attention, fused AdamW; each layer is compiled where that is faster. With
Replay half of each batch comes from the memory, so that both contenders train on equally many tokens. They take turns
in short fits, the loading of the batches counts, and the overhead is the median over the rounds of the ratio of their
times. The figure of each contender is the median of its turns.

MFU (model FLOPs utilisation) is as in PaLM (Chowdhery et al. 2022, appendix B): a token takes 6 N + 12 L H T
floating-point operations, N weights that are multiplied (embeddings are looked up), L layers, H features, T tokens in a
text; a causal mask is not discounted. The peak is the vendor's, of dense bf16.

Without a GPU it runs a small size on the CPU and counts CPU time: the overhead there says little, and there is no MFU.

    python benchmarks/gpu.py            # no new round after 7 minutes; where memory is short, batches are halved
    python benchmarks/gpu.py --quick    # about 1 minute without a GPU
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModel, BertConfig, LlamaConfig, PretrainedConfig

from evertune.callbacks import EWC, Replay

CLASSES, MEMORY, WARM_UP = 2, 256, 4
MAX_OVERHEAD, MIN_MFU, MFU_OF = 1.03, 0.45, "llama_1b"
PEAK_FLOPS = {  # of dense bf16, by a part of the name; the first that fits
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
CUDA = torch.cuda.is_available()
clock = time.perf_counter if CUDA else time.process_time  # CPU time: on a CPU others may be at work too


@dataclass
class Size:
    """A model and the batches it is trained on."""

    name: str
    config: PretrainedConfig
    batch: int
    tokens: int


def sizes() -> list[Size]:
    if not CUDA:
        small: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 512}
        small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
        return [
            Size("bert_small", BertConfig(**small), 16, 64),
            Size("llama_small", LlamaConfig(**small, use_cache=False), 16, 64),
        ]
    bert = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )  # BERT-large
    llama = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        max_position_embeddings=1024,
        use_cache=False,
    )  # the layers of Llama 3.2 1B
    return [Size("bert_large", bert, 64, 512), Size("llama_1b", llama, 32, 1024)]


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens."""

    def __init__(self, size: Size, number: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(size.config.vocab_size, (number, size.tokens), generator=generator)
        self.labels = torch.randint(CLASSES, (number,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Classifier(pl.LightningModule):
    """A transformer and a head on its first token, or on its last where it reads left to right."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.backbone = AutoModel.from_config(config, attn_implementation="sdpa")
        if isinstance(config, BertConfig):
            self.backbone.pooler = None
        self.place = 0 if isinstance(config, BertConfig) else -1
        self.head = nn.Linear(config.hidden_size, CLASSES)

    @property
    def layers(self) -> nn.ModuleList:
        return self.backbone.encoder.layer if self.place == 0 else self.backbone.layers

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.backbone(input_ids=input_ids).last_hidden_state[:, self.place])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["input_ids"]).float(), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6, fused=True)


def eager_logits(module: pl.LightningModule, batch: dict[str, Tensor]) -> Tensor:
    """EWC looks into the layers with hooks, which compiled ones do not call."""
    with torch.compiler.set_stance("force_eager"):
        return module(batch["input_ids"])


class Timer(pl.Callback):
    """The seconds of a step, the mean over those after the warm-up: the device is waited for before and after."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.started = self.ended = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (WARM_UP, WARM_UP + self.steps):
            if CUDA:
                torch.cuda.synchronize()
            self.started, self.ended = self.ended, clock()

    @property
    def step(self) -> float:
        return (self.ended - self.started) / self.steps


class Contest:
    """A model that is trained in turns with and without methods, which have learned one batch before."""

    def __init__(self, size: Size, batch: int, steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.data = Texts(size, (WARM_UP + steps + 4) * batch)
        with torch.device("cuda" if CUDA else "cpu"):
            self.module = Classifier(size.config)
        self.methods: list[pl.Callback] = [
            Replay(memory_size=MEMORY),
            EWC(ewc_lambda=1.0, n_examples=4, batch_size=2, logits=eager_logits),
        ]
        self.consolidation = 0.0
        self._fit(self.methods, batch // 2, 1)

    def turn(self, contender: str) -> float:
        """The seconds of a step."""
        if contender == "plain":
            return self._fit([], self.batch, self.steps)
        return self._fit(self.methods, self.batch // 2, self.steps)

    def _fit(self, methods: list[pl.Callback], batch: int, steps: int) -> float:
        timer = Timer(steps)
        loader = DataLoader(
            self.data, batch, shuffle=True, drop_last=True, num_workers=4 if CUDA else 0, pin_memory=CUDA
        )
        trainer = pl.Trainer(
            max_steps=WARM_UP + steps,
            max_epochs=-1,
            accelerator="gpu" if CUDA else "cpu",
            devices=1,
            precision="bf16-mixed",
            callbacks=[timer, *methods],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.module, loader)
        if methods:
            self.consolidation = clock() - timer.ended
        return timer.step

    def compile(self) -> bool:
        """Compile the layers, if that is possible and faster."""
        eager = self.turn("plain")
        for layer in self.module.layers:
            layer.compile(dynamic=False)
        try:
            compiled = self.turn("plain")
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may say
            print(f"    layers cannot be compiled: {str(error).splitlines()[0]}", flush=True)
            compiled = float("inf")
        print(f"    a step of the plain loop: {eager:.4f} s, compiled {compiled:.4f} s", flush=True)
        if compiled > eager:
            torch.compiler.set_stance("force_eager")
        return compiled <= eager


@dataclass
class Outcome:
    """What was measured of a size."""

    size: Size
    batch: int
    compiled: bool
    flops: float  # of a token
    consolidation: float
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def overhead(self) -> float:
        pairs = zip(self.seconds["evertune"], self.seconds["plain"], strict=True)
        return median(own / plain for own, plain in pairs)

    def tokens_per_second(self, contender: str) -> float:
        return self.batch * self.size.tokens / median(self.seconds[contender])

    def mfu(self, contender: str) -> float | None:
        peak = peak_flops()
        return None if peak is None else self.tokens_per_second(contender) * self.flops / peak


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if CUDA else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(module: Classifier, size: Size) -> float:
    looked_up = sum(p.numel() for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    multiplied = sum(p.numel() for p in module.parameters()) - looked_up
    config = size.config
    return 6 * multiplied + 12 * config.num_hidden_layers * config.hidden_size * size.tokens


@contextmanager
def device_memory() -> Iterator[None]:
    """Give the memory of a model back."""
    try:
        yield
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def measure(size: Size, batch: int, steps: int, rounds: int, until: float, may_compile: bool) -> Outcome:
    """Let the contenders take turns, for a number of rounds, or until the time is over."""
    contest = Contest(size, batch, steps)
    parameters = sum(p.numel() for p in contest.module.parameters())
    print(f"{size.name}: {parameters / 1e6:.0f}M parameters, batches of {batch} x {size.tokens} tokens", flush=True)
    contest.turn("evertune")  # the one that takes more memory, and warms the device up
    compiled = may_compile and contest.compile()
    outcome = Outcome(size, batch, compiled, flops_per_token(contest.module, size), contest.consolidation)
    contenders = ["plain", "evertune"]
    outcome.seconds = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in contenders if turn % 2 == 0 else contenders[::-1]:
            outcome.seconds[name].append(contest.turn(name))
        plain, own = (outcome.seconds[name][-1] for name in contenders)
        print(f"    round {turn + 1}: plain {plain:.4f} s, evertune {own:.4f} s, {own / plain:.4f}", flush=True)
        if turn >= 2 and time.monotonic() > until:
            break
    return outcome


def measure_what_fits(size: Size, *settings: Any) -> Outcome:
    """With half the batch, and half of that, where the memory is too small."""
    batch = size.batch
    while True:
        torch.compiler.set_stance("default")
        with device_memory():
            try:
                return measure(size, batch, *settings)
            except torch.cuda.OutOfMemoryError:
                if batch <= 2:
                    raise
        batch //= 2
        print(f"    out of memory: again with batches of {batch}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--minutes", type=float, default=7.0, help="no new round after this many minutes (7)")
    parser.add_argument("--no_compile", action="store_true", help="do not try torch.compile")
    options = parser.parse_args()
    steps, rounds = (6, 3) if options.quick else (16, 9)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)

    outcomes, failed, start, asked = [], [], time.monotonic(), sizes()
    for number, size in enumerate(asked):
        until = start + options.minutes * 60 * (number + 1) / len(asked)
        try:
            outcomes.append(measure_what_fits(size, steps, rounds, until, CUDA and not options.no_compile))
        except Exception:  # the figures of the other model are worth having
            traceback.print_exc()
            failed.append(size.name)

    where = torch.cuda.get_device_name() if CUDA else "the CPU (no GPU: small models, CPU time)"
    table = Table("", "tokens/s", "MFU", "time to plain", "limit", title=f"bf16 on {where}")
    results: dict[str, float | int | bool | None] = {}
    bars: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        name = outcome.size.name
        for contender in ("plain", "evertune"):
            speed, mfu = outcome.tokens_per_second(contender), outcome.mfu(contender)
            ratio = ["", ""] if contender == "plain" else [f"{outcome.overhead:.3f}", f"{MAX_OVERHEAD}"]
            shown = f"{mfu:.3f}" if mfu is not None else "-"
            table.add_row(f"{name}, {contender}", f"{speed:,.0f}", shown, *ratio)
            results[f"{name}_{contender}_tokens_per_second"] = round(speed, 1)
            results[f"{name}_{contender}_mfu"] = None if mfu is None else round(mfu, 4)
        results[f"{name}_batch"], results[f"{name}_compiled"] = outcome.batch, outcome.compiled
        results[f"{name}_rounds"] = len(outcome.seconds["plain"])
        results[f"{name}_consolidation_seconds"] = round(outcome.consolidation, 3)
        ok = outcome.overhead <= MAX_OVERHEAD
        bars[f"{name}_overhead"] = {"value": round(outcome.overhead, 4), "limit": MAX_OVERHEAD, "ok": ok}
    for name in failed:
        bars[f"{name}_overhead"] = {"value": None, "limit": MAX_OVERHEAD, "ok": False, "reason": "failed, see above"}
    mfu = next((outcome.mfu("evertune") for outcome in outcomes if outcome.size.name == MFU_OF), None)
    bar: dict[str, Any] = {"value": mfu and round(mfu, 4), "limit": MIN_MFU, "ok": mfu is not None and mfu >= MIN_MFU}
    if mfu is None and MFU_OF not in failed:
        bar |= {"ok": None, "reason": f"the peak of {where} is not known" if CUDA else "no GPU"}
    bars[f"{MFU_OF}_mfu"] = bar
    Console(width=100).print(table)
    said = bar.get("reason") or f"{mfu}"
    print(f"MFU of {MFU_OF} with evertune, at least {MIN_MFU}: {said}")
    print(
        json.dumps(
            {
                "benchmark": "gpu",
                "size": "gpu" if CUDA else "cpu-small",
                "device": where,
                "results": results,
                "bars": bars,
            }
        )
    )


if __name__ == "__main__":
    main()
