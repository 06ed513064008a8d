"""DeepSpeed on CPU, fit after fit, on two real ranks; and what the strategies refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.strategies import EvertuneDeepSpeedStrategy
from tests.helpers.distributed import run_ranks
from tests.helpers.shard_worker import make_bert


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bert(tmp_path_factory.mktemp("bert"))


def test_sequential_updates_leak_nothing(bert: str) -> None:
    """One engine at a time, and update 5 takes the room of update 2, but for the rows of its head."""
    for rank in run_ranks(
        "tests.helpers.strategy_worker:five_updates", 2, folder=bert, strategy="evertune_deepspeed_stage_3"
    ):
        assert rank["engines"] == [1] * 5
        assert rank["alive"] == 0
        assert rank["tensor_bytes"][-1] - rank["tensor_bytes"][1] < 1 << 20, rank["tensor_bytes"]
        assert rank["peak_kib"][-1] < 1.05 * rank["peak_kib"][1]
        assert rank["rows"] == 5
        assert rank["memory"] == 30
        assert rank["head"] in ([6, 16], None)


def test_weights_are_gathered_once_for_each_pass_and_ahead() -> None:
    """Although the training step is a call of the module in which it calls itself."""
    for rank in run_ranks("tests.helpers.strategy_worker:gathered_per_step", 2, strategy="evertune_deepspeed_stage_3"):
        weights = 3 * 512 * 512  # the biases are too small to be sharded
        assert len(rank["per_step"]) == 6
        assert weights < rank["per_step"][-1] <= 2 * weights + 2 * 3 * 512, rank["per_step"]
        assert rank["ahead"][2:] == [True] * 4  # the first step is not traced, the second is
        assert rank["hooks"] == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_the_masters_of_16_bit_training_live_on(bert: str, stage: int, tmp_path: Path) -> None:
    for rank in run_ranks(
        "tests.helpers.strategy_worker:masters_between_fits",
        2,
        folder=bert,
        out=str(tmp_path),
        strategy=f"evertune_deepspeed_stage_{stage}",
    ):
        assert rank == {"carried": True, "loaded": True, "finer_than_bf16": True, "dtype": "torch.float32"}


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_resumed_in_the_middle_of_an_update(bert: str, stage: int, tmp_path: Path) -> None:
    """Each rank's own part of the importance comes back from the checkpoint, the memory and the draws too."""
    strategy = f"evertune_deepspeed_stage_{stage}"
    for part in ("whole", "resumed"):
        run_ranks(
            "tests.helpers.strategy_worker:resume", 2, folder=bert, out=str(tmp_path), strategy=strategy, part=part
        )
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "resumed.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    if stage == 2:  # and the saved importance loads at another world size
        others = {
            "folder": bert,
            "out": str(tmp_path),
            "weights": f"{tmp_path}/whole.safetensors",
            "saved": f"{tmp_path}/ewc",
        }
        run_ranks("tests.helpers.strategy_worker:ewc_elsewhere", 1, strategy="auto", **others)
        run_ranks("tests.helpers.strategy_worker:ewc_elsewhere", 2, strategy="ddp", **others)
        one, two = load_file(tmp_path / "auto.safetensors"), load_file(tmp_path / "ddp.safetensors")
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


def test_the_configuration_given_is_left_alone() -> None:
    config = {"zero_optimization": {"stage": 2}}
    strategy = EvertuneDeepSpeedStrategy(config=config)
    strategy.config["zero_optimization"]["stage"] = 3
    assert config == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("name", ["stage_1", "stage_2", "stage_3", "stage_2_offload", "stage_3_offload"])
def test_registered_by_name(name: str) -> None:
    trainer = pl.Trainer(strategy=f"evertune_deepspeed_{name}", accelerator="cpu", devices=1, logger=False)
    assert isinstance(trainer.strategy, EvertuneDeepSpeedStrategy)
    zero = trainer.strategy.config["zero_optimization"]
    assert zero["stage"] == int(name.split("_")[1])
    assert ("offload_optimizer" in zero) == name.endswith("offload")


@pytest.mark.parametrize("method", [EWC(), Replay(memory_size=8)])
def test_lightnings_own_strategy_is_warned_of(method: pl.Callback) -> None:
    trainer = pl.Trainer(
        strategy="deepspeed_stage_2", accelerator="cpu", devices=1, accumulate_grad_batches=4, logger=False
    )
    with pytest.warns(UserWarning, match=r"every update is 4 times too small"):
        method.setup(trainer, pl.LightningModule(), "fit")
