"""An update that was interrupted on some processes goes on inside the update on another number of them."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.memory.codec import decode
from evertune.training.checkpoint import UpdateCheckpoint, latest
from evertune.training.elastic import layout, share_out
from evertune.training.manifest import CheckpointManifest, Layout
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.resume_worker import elastic, first

Undisturbed = tuple[dict[str, Any], Path]
FSDP2 = "evertune_fsdp2"
ZERO = {stage: f"evertune_deepspeed_stage_{stage}" for stage in (1, 2, 3)}


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("version")
    first(tiny_bert(tmp_path_factory.mktemp("bert")), str(folder))
    return folder


@pytest.fixture(scope="module")
def undisturbed(version: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Undisturbed]:
    """The update on one process, with a method: what it has seen, and the folder of what it has left."""

    @cache
    def learn(method: str) -> Undisturbed:
        out = tmp_path_factory.mktemp("undisturbed")
        return elastic(str(version), str(out), "auto", "undisturbed", method=method), out

    return learn


def run(processes: int, version: Path, out: Path, part: str, strategy: str, **settings: Any) -> list[dict[str, Any]]:
    strategy = "auto" if processes == 1 and strategy == "ddp" else strategy
    settings |= {"version": str(version), "out": str(out), "part": part, "strategy": strategy}
    return run_ranks("tests.helpers.resume_worker:elastic", processes, **settings)


def kill(processes: int, version: Path, out: Path, strategy: str, **settings: Any) -> Path:
    """An update that is killed in its second epoch; the folder of its last checkpoint."""
    with pytest.raises(RuntimeError, match="ended with -9"):
        run(processes, version, out, "killed", strategy, kill={"step": 14, "moment": "on_train_batch_end"}, **settings)
    checkpoint = latest(out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.parent.name == "step-12"
    return checkpoint.parent


@pytest.fixture(scope="module")
def killed(version: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an update was killed that ran on two processes under ZeRO-2."""
    out = tmp_path_factory.mktemp("killed")
    kill(2, version, out, ZERO[2])
    return out


def examples_of(ranks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The texts of each step, on all ranks together."""
    return {step: sorted(text for rank in ranks for text in rank["steps"][step]) for step in ranks[0]["steps"]}


def held(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the ranks held: numbers, and whole tensors."""
    index = json.loads((folder / "index.json").read_bytes())
    whole = {
        f"{kind} {name}": torch.full((math.prod(shape),), torch.nan)
        for kind in index["kinds"]
        for name, shape in index["shapes"].items()
    }
    for file in index["files"]:
        for key, value in load_file(folder / file).items():
            kind, start, name = key.split("|", 2)
            whole[f"{kind} {name}"][int(start) : int(start) + len(value)] = value
    return index["extra"], whole


def check_held(out: Path) -> None:
    """They went on with the very masters, optimizer state, learning rate and counters (those of DeepSpeed)."""
    told, before = held(out / "killed-held")
    told_then, then = held(out / "resumed-held")
    both = told.keys() & told_then.keys()
    assert {"scalars", "groups"} <= both
    assert {key: told[key] for key in both} == {key: told_then[key] for key in both}
    assert {"value", "exp_avg", "exp_avg_sq"} == {name.partition(" ")[0] for name in before}
    assert before.keys() == then.keys()
    assert [name for name, value in before.items() if not torch.equal(value, then[name])] == []


def check(ranks: list[dict[str, Any]], out: Path, undisturbed: Undisturbed) -> None:
    """The examples of every step, and the final weights, are those of the undisturbed update."""
    expected, folder = undisturbed
    steps = examples_of([expected])
    assert [rank["start"] for rank in ranks] == [12] * len(ranks)
    assert examples_of(ranks) == {step: steps[step] for step in list(steps)[12:]}
    assert [rank["alarms"] for rank in ranks] == [expected["alarms"]] * len(ranks)
    for file in ("model.safetensors", "head.safetensors"):
        one, other = (load_file(part / "model" / file) for part in (folder / "undisturbed", out / "resumed"))
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_node_less_inside_an_update(
    killed: Path, version: Path, undisturbed: Callable[[str], Undisturbed], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(killed, tmp_path / "out"))
    ranks = run(1, version, out, "resumed", ZERO[2])
    assert ranks[0]["layout"] == [2, 4]
    check(ranks, out, undisturbed("replay+ewc"))
    check_held(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategies", "numbers"),
    [
        *(((one, one), numbers) for one in ("ddp", *ZERO.values(), FSDP2) for numbers in ((2, 1), (1, 2))),
        *(
            (strategies, (2, 2))
            for strategies in ((ZERO[1], ZERO[3]), (ZERO[3], ZERO[2]), (ZERO[2], FSDP2), (FSDP2, ZERO[3]))
        ),
        *(((f"{ZERO[stage]}_offload",) * 2, (2, 1)) for stage in (2, 3)),
    ],
)
def test_another_number_of_processes_inside_an_update(
    strategies: tuple[str, str],
    numbers: tuple[int, int],
    version: Path,
    undisturbed: Callable[[str], Undisturbed],
    tmp_path: Path,
) -> None:
    kill(numbers[0], version, tmp_path, strategies[0])
    ranks = run(numbers[1], version, tmp_path, "resumed", strategies[1])
    assert ranks[0]["layout"] == ([2, 4] if numbers[1] == 1 else [2, 2])
    check(ranks, tmp_path, undisturbed("replay+ewc"))
    if strategies[0] != "ddp":
        check_held(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", ZERO[2]])
@pytest.mark.parametrize("numbers", [(2, 1), (1, 2)])
def test_alarms_inside_an_update_come_at_the_same_steps(
    strategy: str, numbers: tuple[int, int], version: Path, undisturbed: Callable[[str], Undisturbed], tmp_path: Path
) -> None:
    """And the replay memory, which is filled from the examples as they pass, holds the same."""
    kill(numbers[0], version, tmp_path, strategy, method="drift")
    ranks = run(numbers[1], version, tmp_path, "resumed", strategy, method="drift")
    expected, folder = undisturbed("drift")
    steps = examples_of([expected])
    assert examples_of(ranks) == {step: steps[step] for step in list(steps)[12:]}
    assert [rank["alarms"] for rank in ranks] == [expected["alarms"]] * len(ranks)
    assert any(expected["alarms"])
    memories = [
        json.loads((part / "Replay" / "memory.json").read_bytes())["sha256"]
        for part in (folder / "undisturbed", tmp_path / "resumed")
    ]
    assert memories[0] == memories[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "stages", "numbers"),
    [
        ("bf16-mixed", (2, 2), (2, 2)),
        ("bf16-mixed", (2, 3), (2, 1)),
        ("bf16-mixed", (3, 1), (1, 2)),
        pytest.param(
            *("16-mixed", (2, 3), (2, 1)),
            marks=pytest.mark.skipif(
                not (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()),
                reason="needs a GPU, or a CPU that computes in fp16",
            ),
        ),
    ],
)
def test_the_masters_of_16_bit_training_come_back_exactly(
    precision: str, stages: tuple[int, int], numbers: tuple[int, int], version: Path, tmp_path: Path
) -> None:
    kill(numbers[0], version, tmp_path, ZERO[stages[0]], precision=precision)
    ranks = run(numbers[1], version, tmp_path, "resumed", ZERO[stages[1]], precision=precision)
    assert [rank["start"] for rank in ranks] == [12] * numbers[1]
    check_held(tmp_path)
    _, tensors = held(tmp_path / "resumed-held")
    assert any(not torch.equal(value, value.bfloat16().float()) for value in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_that_are_not_trained_and_buffers_come_back(stage: int, tmp_path: Path) -> None:
    """Each rank its own buffers, as batch statistics are; though the module that goes on is made with others."""
    settings = {"out": str(tmp_path), "strategy": ZERO[2]}
    written = run_ranks("tests.helpers.resume_worker:still", 2, part="first", **settings)
    read = run_ranks("tests.helpers.resume_worker:still", 2, part="resumed", **settings | {"strategy": ZERO[stage]})
    assert [rank["mean"] for rank in read] == [rank["mean"] for rank in written]
    assert written[0]["mean"] != written[1]["mean"]
    for rank in read:
        assert rank["weight"] == [7.0]


def test_nothing_in_a_checkpoint_under_zero_needs_pickle(killed: Path) -> None:
    files = [path for path in (killed / "checkpoints" / "step-12").rglob("*") if path.is_file()]
    read: dict[str, Callable[[Path], Any]] = {
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".safetensors": load_file,
        ".json": lambda path: json.loads(path.read_bytes()),
        ".state": lambda path: decode(path.read_bytes()),
    }
    assert {path.suffix for path in files} == read.keys()
    for path in files:
        read[path.suffix](path)
    manifest = CheckpointManifest.read(killed / "checkpoints" / "step-12")
    assert manifest.layout == Layout(2, "portable", zero_stage=2, batch_size=2, accumulation=2)


def edit(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "edited":
        content[-7] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("update.ckpt/weights/fragments-00001-of-00002.safetensors", "truncated"),
        ("update.ckpt/weights/fragments-00000-of-00002.safetensors", "missing"),
        ("update.ckpt/weights/index.json", "edited"),
        ("update.ckpt/replicated.pt", "edited"),
        ("rank-00000.state", "truncated"),
        ("checkpoint.json", "truncated"),
    ],
)
def test_a_damaged_checkpoint_is_refused(name: str, damage: str, killed: Path, version: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(killed, tmp_path / "out"))
    edit(out / "checkpoints" / "step-12" / name, damage)
    if name == "checkpoint.json":
        with pytest.raises(ValueError, match=r"checkpoint.json is damaged"):
            layout(latest(out / "checkpoints"), 1, 2)
        return
    for rank in run(2, version, out, "resumed", ZERO[2]):
        assert re.search(r"damaged|corrupt|missing", rank["error"])
        assert Path(name).name in rank["error"] or "the message of another rank says which" in rank["error"]


def test_a_checkpoint_under_zero_is_refused_without_it(killed: Path, version: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(killed, tmp_path / "out"))
    told = elastic(str(version), str(out), "auto", "resumed")
    assert "was written by 2 processes with ZeRO-2, this fit has 1 process without ZeRO" in told["error"]
    assert "ZeRO works on one process" in told["error"]


@pytest.fixture
def one(version: Path, tmp_path: Path) -> Path:
    """What an update on one process leaves: its last checkpoint, at step 29 of 30."""
    elastic(str(version), str(tmp_path), "auto", "undisturbed", method="replay")
    return tmp_path


def test_a_damaged_checkpoint_of_one_process_is_refused(one: Path, version: Path) -> None:
    edit(one / "checkpoints" / "step-29" / "update.ckpt", "edited")
    told = elastic(str(version), str(one), "auto", "resumed", method="replay")
    assert re.search(r"step-29/update.ckpt is damaged or missing.*restart the update from scratch", told["error"])


def test_smaller_batches_on_as_many_processes(one: Path, version: Path) -> None:
    told = elastic(str(version), str(one), "auto", "resumed", method="replay", at_most=1)
    assert told["layout"] == [1, 8]
    assert told["start"] == 29
    assert len(told["steps"]) == 1


class Numbers(pl.LightningModule):
    """Learns something from whole batches of a plain loader."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_numbers(folder: Path, *callbacks: pl.Callback, batch_size: int = 4, accumulation: int = 2) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulation,
        callbacks=[*callbacks, UpdateCheckpoint(folder, every_n_steps=1000 if callbacks else 2)],
    )
    trainer.fit(Numbers(), DataLoader(torch.ones(40, 1), batch_size=batch_size), ckpt_path=latest(folder))


def test_a_loader_that_deals_other_examples_is_refused_in_another_layout(tmp_path: Path) -> None:
    fit_numbers(tmp_path)
    with pytest.raises(ValueError, match="only loaders of ExperienceDataModule deal the same examples"):
        fit_numbers(tmp_path, batch_size=2, accumulation=4)
    fit_numbers(tmp_path)


def test_steps_of_another_size_are_refused(tmp_path: Path) -> None:
    fit_numbers(tmp_path)
    with pytest.raises(ValueError, match=r"steps of 1 \(processes\) x 4 \(batch_size\) x 2 .* this fit has 1 .* x 5"):
        fit_numbers(tmp_path, batch_size=5)


class SaveAlways(pl.Callback):
    """Asks for a checkpoint after every batch."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        [checkpoint] = [one for one in trainer.callbacks if isinstance(one, UpdateCheckpoint)]
        self.answers.append(checkpoint.save_now(trainer))


def test_a_checkpoint_that_is_not_due(tmp_path: Path) -> None:
    """Ten batches, two a step: none inside the first step, and none at the end of the fit."""
    always = SaveAlways()
    fit_numbers(tmp_path, always)
    assert always.answers == [False, *[True] * 8, False]
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


@pytest.mark.parametrize(
    ("step_size", "processes", "at_most", "expected"),
    [(32, 4, 8, (8, 1)), (32, 1, 8, (8, 4)), (12, 1, 8, (6, 2)), (14, 2, 5, (1, 7)), (6, 3, 100, (2, 1))],
)
def test_share_out(step_size: int, processes: int, at_most: int, expected: tuple[int, int]) -> None:
    assert share_out(step_size, processes, at_most) == expected


def test_steps_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(
        ValueError, match="step of 12 examples cannot be divided among 5 processes; it can be among 1, 2, "
    ):
        share_out(12, 5, 4)
    for settings in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be positive, got 0"):
            share_out(*settings)


def test_the_layout_of_a_fit(killed: Path) -> None:
    checkpoint = latest(killed / "checkpoints")
    assert layout(None, 3, 5, 2) == (5, 2)
    assert layout(None, 2, 8, step_size=64) == (8, 4)
    assert layout(checkpoint, 2, 2, 2) == (2, 2)  # as it was
    assert layout(checkpoint, 2, 4, 1) == (4, 1)  # configured otherwise, in steps of the same size
    assert layout(checkpoint, 4, 16) == (2, 1)
    with pytest.raises(ValueError, match="step of 8 examples cannot be divided among 3 processes"):
        layout(checkpoint, 3, 2)
