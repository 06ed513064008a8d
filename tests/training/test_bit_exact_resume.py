"""An update that is killed and resumed ends in the same bits as an undisturbed one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import EWC, ContinualCallback, Replay
from evertune.callbacks.consolidation import end_experience
from evertune.lightning_modules import SequenceClassificationModule
from evertune.streams import ExperienceDataModule
from evertune.tasks.texts import PadCollator
from evertune.training.checkpoint import UpdateCheckpoint, latest
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.quiet import QUIET
from tests.helpers.resume_worker import first
from tests.helpers.shard_worker import CLASSES, SmallBert, experience, make_bert
from tests.helpers.shard_worker import fit as fit_on_one


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bert(tmp_path_factory.mktemp("bert"))


class Seen(pl.Callback):
    """The batches trained on; saves a checkpoint after a step."""

    def __init__(self, path: Path | None = None, step: int = -1) -> None:
        self.path, self.step = path, step
        self.batches: list[Any] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.path is not None and self.step == -1 and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self.batches.append(batch["input_ids"].tolist())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("loader", "step"), [("resumable", 3), ("resumable", 7), ("resumable", -1), ("plain", -1), ("workers", -1)]
)
def test_a_schedule_that_asks_for_the_length_of_the_fit_resumes_with_the_next_batch(
    bert: str, loader: str, step: int, tmp_path: Path
) -> None:
    """Lightning then sets the loader up before it has read where the checkpoint left it."""

    def fit(module: pl.LightningModule, callbacks: list[pl.Callback], n_epochs: int, ckpt_path: Any = None) -> None:
        trainer = pl.Trainer(
            max_epochs=n_epochs,
            accelerator="cpu",
            devices=1,
            callbacks=callbacks,
            **QUIET,
        )
        data: Any = ExperienceDataModule(
            experience(str(n_epochs), 5, CLASSES, n_epochs), batch_size=12, collate_fn=PadCollator(0), label="labels"
        )
        if loader != "resumable":
            data = DataLoader(
                data.experience.train, batch_size=12, collate_fn=PadCollator(0), num_workers=2 * (loader == "workers")
            )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)

    whole, resumed = Seen(tmp_path / "a.ckpt", step), Seen()
    module, twin = (SequenceClassificationModule(bert, classes=CLASSES, dropout=0.0) for _ in range(2))
    replay, another = Replay(memory_size=10), Replay(memory_size=10)
    fit(module, [replay], 1)
    fit(module, [replay, whole], 2)
    fit(twin, [another, resumed], 2, tmp_path / "a.ckpt")
    assert resumed.batches == whole.batches[5 if step == -1 else step :]
    assert another.memory.ids == replay.memory.ids
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


class Split(pl.Callback):
    """Ends an experience in the middle of a fit, as a ``DriftTrigger`` does."""

    splits_fit = True

    def __init__(self, method: ContinualCallback, step: int) -> None:
        self.method, self.step = method, step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            end_experience([self.method], trainer, pl_module)
            self.method.on_experience_start(trainer, pl_module)


@pytest.mark.parametrize("step", [4, 9])
def test_what_ewc_has_seen_comes_back_and_the_folder_it_was_loaded_from_does_not(
    bert: str, step: int, tmp_path: Path
) -> None:
    def fit(seed: int, ewc: EWC, *callbacks: pl.Callback, ckpt_path: Any = None) -> pl.LightningModule:
        pl.seed_everything(0, verbose=False)
        module = SmallBert(bert, CLASSES, "adamw")
        data = experience("one", 14, CLASSES, seed)
        fit_on_one(module, data, "auto", 1, [ewc, *callbacks], ckpt_path)
        return module

    first = EWC(n_examples=24)
    fit(1, first)
    first.save(tmp_path / "ewc")
    whole, resumed = EWC(n_examples=48), EWC(n_examples=48)
    whole.load(tmp_path / "ewc")
    resumed.load(tmp_path / "ewc")
    module = fit(2, whole, Split(whole, 6), Seen(tmp_path / "a.ckpt", step))
    twin = fit(2, resumed, Split(resumed, 6), ckpt_path=tmp_path / "a.ckpt")
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "whole/index.json").read_bytes() == (tmp_path / "resumed/index.json").read_bytes()


def test_what_is_replayed_does_not_depend_on_when_the_loader_is_set_up(bert: str) -> None:
    def batches(module: pl.LightningModule) -> list[Any]:
        replay, seen = Replay(memory_size=10), Seen()
        for name, classes in (("first", ["a", "b"]), ("second", ["b", "c"])):
            fit_on_one(module, experience(name, 5, classes, len(name)), "auto", 1, [replay, seen])
        return seen.batches

    schedule_asks = SequenceClassificationModule(bert, classes=CLASSES, dropout=0.0)
    assert batches(schedule_asks) == batches(SmallBert(bert, CLASSES, "adamw"))


# --- killed processes

STRATEGIES = {
    "one": ("auto", 1),
    "ddp": ("ddp", 2),
    "zero_2": ("evertune_deepspeed_stage_2", 2),
    "zero_3": ("evertune_deepspeed_stage_3", 2),
    "fsdp2": ("evertune_fsdp2", 2),
}
MOMENTS = ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def text_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("text_bert"))


@pytest.fixture(scope="module")
def version(text_bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("version")
    first(text_bert, str(folder))
    return folder


def kill(on: str, method: str, version: Path, out: Path, step: int, moment: str) -> None:
    """Learn an update undisturbed, then once more until it is killed."""
    strategy, world_size = STRATEGIES[on]
    print(f"killed at step {step}: {moment}")
    with pytest.raises(RuntimeError, match="ended with -9"):
        run_ranks(
            "tests.helpers.resume_worker:update",
            world_size,
            version=str(version),
            out=str(out),
            strategy=strategy,
            method=method,
            kill={"step": step, "moment": moment},
        )


def resume(on: str, method: str, version: Path, out: Path) -> dict[str, Any]:
    """Go on in new processes; the weights and the learning state are those of the undisturbed update."""
    strategy, world_size = STRATEGIES[on]
    told = run_ranks(
        "tests.helpers.resume_worker:update",
        world_size,
        version=str(version),
        out=str(out),
        strategy=strategy,
        method=method,
        resume=True,
    )
    undisturbed, resumed = files_of(out / "undisturbed"), files_of(out / "resumed")
    assert {"model/model.safetensors", "model/head.safetensors", "EWC/index.json"} <= undisturbed.keys()
    assert undisturbed.keys() == resumed.keys()
    assert [name for name, content in undisturbed.items() if resumed[name] != content] == []
    rank_0: dict[str, Any] = told[0][0]
    return rank_0


@pytest.mark.parametrize(
    ("on", "method", "first_step", "last_step"),
    [
        ("one", "drift", 11, 29),
        ("zero_2", "replay+ewc", 4, 29),
        *(
            pytest.param(on, method, *steps, marks=pytest.mark.slow)
            for on in STRATEGIES
            for method in ("replay+ewc", "drift")
            for steps in ((4, 9), (10, 29))
        ),
    ],
)
def test_bit_exact_resume(on: str, method: str, first_step: int, last_step: int, version: Path, tmp_path: Path) -> None:
    """Killed at a random step; three epochs of ten steps, a checkpoint every four (not at the end of an epoch)."""
    chance = random.Random(f"{on} {method} {first_step}")
    step, moment = chance.randint(first_step, last_step), chance.choice(MOMENTS)
    kill(on, method, version, tmp_path, step, moment)
    checkpoint = latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    told = resume(on, method, version, tmp_path)
    assert f"step-{told['start']}" == checkpoint.parent.name
    assert 0 < told["start"] <= step
    assert any(told["alarms"]) == (method == "drift")


@pytest.mark.slow
@pytest.mark.parametrize("on", STRATEGIES)
@pytest.mark.parametrize("moment", ["half", "unnamed", "removing"])
def test_killed_while_a_checkpoint_is_written(on: str, moment: str, version: Path, tmp_path: Path) -> None:
    """The one before it is good, until the new one is whole; what the killed process left is removed."""
    kill(on, "replay+ewc", version, tmp_path, 13, moment)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == ({"step-12", "step-16"} if moment == "removing" else {"step-12", ".step-16"})
    start = resume(on, "replay+ewc", version, tmp_path)["start"]
    assert start == (16 if moment == "removing" else 12)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-29"]


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_starts_anew(version: Path, tmp_path: Path) -> None:
    kill("one", "replay+ewc", version, tmp_path, 2, "on_train_batch_end")
    assert latest(tmp_path / "checkpoints") is None


@pytest.mark.slow
def test_another_kind_of_strategy_inside_an_update_is_refused(version: Path, tmp_path: Path) -> None:
    kill("ddp", "replay+ewc", version, tmp_path, 6, "on_train_batch_end")
    told = run_ranks(
        "tests.helpers.resume_worker:resume_elsewhere",
        2,
        version=str(version),
        out=str(tmp_path),
        strategy="evertune_deepspeed_stage_2",
    )
    assert "was written by 2 processes without ZeRO, this fit has 2 processes with ZeRO-2" in told[0]
    assert "delete the checkpoint and restart the update" in told[0]


@pytest.mark.slow
def test_another_number_of_processes_between_updates(text_bert: str, tmp_path: Path) -> None:
    """2 -> 1 -> 2 processes: the examples of every step and the weights are those of one process throughout."""
    told: dict[str, list[Any]] = {}
    for name, numbers in (("one", (1, 1, 1)), ("changing", (2, 1, 2))):
        parent = None
        for number, processes in enumerate(numbers):
            out = tmp_path / name / str(number)
            ranks = run_ranks(
                "tests.helpers.resume_worker:one_of_three",
                processes,
                bert=text_bert,
                parent=parent,
                out=str(out),
                strategy="auto" if processes == 1 else "evertune_deepspeed_stage_2",
                number=number,
            )
            steps = {step: sorted(text for rank in ranks for text in rank[step]) for step in ranks[0]}
            told.setdefault(name, []).append(steps)
            parent = str(out)
    assert told["one"] == told["changing"]
    assert [len(steps) for steps in told["one"]] == [12, 12, 12]
    for file in ("model.safetensors", "head.safetensors"):
        one, changing = (load_file(tmp_path / name / "2/model" / file) for name in ("one", "changing"))
        for weight, value in one.items():
            torch.testing.assert_close(changing[weight], value, rtol=1e-5, atol=1e-6)


def test_settings_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_steps must be positive, got 0"):
        UpdateCheckpoint(tmp_path, every_n_steps=0)
    (tmp_path / ".step-8").mkdir()
    (tmp_path / "step-9").mkdir()  # without its manifest
    assert latest(tmp_path) is None
