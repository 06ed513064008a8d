"""Nothing that evertune writes can run code when it is loaded."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from evertune._lightning import pl
from evertune.callbacks import EWC, ContinualEvaluation, DriftTrigger, Replay
from evertune.drift import MMD
from evertune.lightning_modules import SequenceClassificationModule
from evertune.memory import ReplayMemory
from evertune.metrics.history import History, load_history, save_history
from evertune.shards.fragments import FragmentState
from evertune.shards.replicated import ReplicatedShards
from tests.helpers.lightning_modules import loader, tiny_bert
from tests.helpers.quiet import QUIET

CLASSES = ["business", "sport"]
READ_BY_TORCH = {"fit.ckpt": "Weights only load failed"}  # it names no file


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def callbacks_of(folder: Path) -> dict[str, Any]:
    return {
        "replay": Replay(memory_size=6, directory=folder / "working"),
        "ewc": EWC(n_examples=6),
        "evaluation": ContinualEvaluation(split="val"),
        "drift": DriftTrigger(MMD(arl=100, reference_size=16, window_size=4)),
    }


def fit(module: pl.LightningModule, callbacks: dict[str, Any], bert: str, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        **QUIET,
        callbacks=list(callbacks.values()),
    )
    trainer.fit(module, loader(bert, CLASSES, repeat=2), loader(bert, CLASSES), **settings)
    return trainer


class Written:
    """A folder with everything that evertune writes, and how to read each of its parts back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bert = tiny_bert(folder.parent / "bert")
        self.module = SequenceClassificationModule(self.bert, classes=CLASSES)
        self.callbacks = callbacks_of(folder)
        trainer = fit(self.module, self.callbacks, self.bert)
        trainer.save_checkpoint(folder / "fit.ckpt")
        for name, callback in self.callbacks.items():
            callback.save(folder / name)
        self.module.save_pretrained(folder / "model")
        save_history(folder / "history.json", {"run": History(["a"], [[1.0]], 1.0)})

    def files(self) -> list[Path]:
        return sorted(path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())

    def readers(self, folder: Path) -> dict[str, Callable[[], Any]]:
        """By first part of the path: what reads it from a copy of the folder."""
        fresh = callbacks_of(folder.parent / "other")

        def read_model() -> None:
            module = SequenceClassificationModule.from_pretrained(folder / "model")
            _ = module.tokenizer

        def read_ewc() -> None:
            fresh["ewc"].load(folder / "ewc")
            FragmentState.load(folder / "ewc", ReplicatedShards(self.module))

        def read_checkpoint() -> None:
            again = SequenceClassificationModule(self.bert, classes=CLASSES)
            fit(again, fresh, self.bert, ckpt_path=folder / "fit.ckpt")

        def read_working_file() -> None:
            (generation,) = {int(path.stem.removeprefix("memory-")) for path in (folder / "working").rglob("*.arrow")}
            memory = ReplayMemory(6)
            memory._directory, memory.generation = next((folder / "working").iterdir()), generation
            _ = memory.ids

        return {
            "replay": lambda: fresh["replay"].load(folder / "replay"),
            "ewc": read_ewc,
            "evaluation": lambda: fresh["evaluation"].load(folder / "evaluation"),
            "drift": lambda: fresh["drift"].load(folder / "drift"),
            "model": read_model,
            "history.json": lambda: load_history(folder / "history.json"),
            "fit.ckpt": read_checkpoint,
            "working": read_working_file,
        }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("written") / "all")


def test_no_pickle(written: Written) -> None:
    """Every file is safetensors, JSON or Arrow, or a checkpoint that loads with ``weights_only=True``."""
    kinds = {".json": 0, ".safetensors": 0, ".arrow": 0, ".ckpt": 0}
    for name in written.files():
        path = written.folder / name
        kinds[path.suffix] += 1
        match path.suffix:
            case ".json":
                json.loads(path.read_text())
            case ".safetensors":
                assert load_file(path)
            case ".arrow":
                assert pa.ipc.open_file(pa.memory_map(str(path))).read_all().num_rows == 6
            case ".ckpt":
                state = torch.load(path, weights_only=True)
                assert {name.split("{")[0] for name in state["callbacks"]} == {
                    type(callback).__name__ for callback in written.callbacks.values()
                }
    assert min(kinds.values()) >= 1
    for part in written.readers(written.folder).values():
        part()


def test_no_pickle_is_loaded_in_place_of_any_file(written: Written, tmp_path: Path) -> None:
    """A pickle planted in place of each file in turn is refused by name, and does not run."""
    marker = tmp_path / "ran"
    bombs = pickle.dumps(Bomb(marker)), saved_by_torch(Bomb(marker), tmp_path)
    for number, (bomb, name) in enumerate(itertools.product(bombs, written.files())):
        folder = tmp_path / str(number)
        shutil.copytree(written.folder, folder)
        (folder / name).write_bytes(bomb)
        with pytest.raises(Exception) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written.readers(folder)[name.parts[0]]()
        assert not marker.exists(), f"{name} ran code"
        assert READ_BY_TORCH.get(name.name, name.name) in str(caught.value), name


def saved_by_torch(value: Any, folder: Path) -> bytes:
    path = folder / "bomb.pt"
    torch.save(value, path)
    return path.read_bytes()
