"""FSDP2 on CPU, fit after fit, on two real ranks, beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from evertune._lightning import pl
from evertune.strategies import EvertuneFSDP2Strategy
from evertune.utils.sharding import blocks
from tests.helpers.distributed import run_ranks
from tests.helpers.fsdp2_worker import SCENES
from tests.helpers.shard_worker import make_bert

STRATEGY = "evertune_fsdp2"
Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def played(bert: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told, Told]:
    """All scenes on one process and on two."""
    folder = tmp_path_factory.mktemp("scenes")
    told = []
    for number, strategy in ((1, "auto"), (2, STRATEGY)):
        out = folder / str(number)
        out.mkdir()
        target = "tests.helpers.fsdp2_worker:learn"
        told.append(run_ranks(target, number, bert=bert, out=str(out), strategy=strategy, scenes=list(SCENES)))
    return folder, *told


@pytest.mark.parametrize("scene", SCENES)
def test_two_ranks_learn_what_one_process_learns(scene: str, played: tuple[Path, Told, Told]) -> None:
    folder, [alone], ranks = played
    expected, found = (load_file(folder / number / f"{scene}.safetensors") for number in ("1", "2"))
    assert expected.keys() == found.keys()
    rtol, atol = (2e-2, 2e-2) if scene == "bf16" else (1e-5, 2e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert ranks[0][scene] == ranks[1][scene]  # whole, and the same, on all ranks
    assert ranks[0][scene]["matrix"] == alone[scene]["matrix"]
    if scene == "stream":
        assert found["head.weight"].shape == (4, 16)


def test_what_is_outside_of_all_blocks_is_gathered_once_in_a_step(bert: str) -> None:
    """And each block twice, before its forward and its backward pass."""
    for found in run_ranks("tests.helpers.fsdp2_worker:gathered_in_a_step", 2, bert=bert):
        assert found.pop("FSDP::all_gather") == 1
        assert len(found) == 2 and set(found.values()) == {2}, found


def test_nothing_of_fsdp2_is_left_after_a_fit(tmp_path: Path) -> None:
    for rank in run_ranks("tests.helpers.fsdp2_worker:left_behind", 2, out=str(tmp_path)):
        assert rank["kinds"] == rank["expected"]
        assert rank["hooks"] == rank["attributes"] == []
        assert all(rank["sharded"])  # each rank keeps its part
        assert rank["copied"]
        assert rank["failed"] == "Own"
        assert rank["kept"]
        assert rank["learned"]


def test_resumed_from_lightnings_own_checkpoint(tmp_path: Path) -> None:
    """Bit for bit on as many ranks, up to rounding on one; the buffers, too."""
    target = "tests.helpers.fsdp2_worker:resume"
    for part in ("whole", "resumed"):
        ranks = run_ranks(target, 2, out=str(tmp_path), strategy=STRATEGY, part=part)
        assert [rank["seen"] for rank in ranks] == [8.0, 8.0]
    whole, resumed = (load_file(tmp_path / f"{part}.safetensors") for part in ("whole", "resumed"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    suffixes = {path.suffix for path in (tmp_path / "middle.ckpt").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".pt"}
    [alone] = run_ranks(target, 1, out=str(tmp_path), strategy=STRATEGY, part="tested")
    ranks = run_ranks(target, 2, out=str(tmp_path), strategy=STRATEGY, part="tested")
    assert alone["seen"] == 4.0
    assert [rank["loss"] for rank in ranks] == pytest.approx([alone["loss"]] * 2, rel=1e-6)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for said in run_ranks("tests.helpers.fsdp2_worker:refused", 2, out=str(tmp_path)):
        assert (
            "ValueError: FSDP2 cannot shard 'scale', which is a single number: give it the shape [1]" in said["scalar"]
        )
        assert "other.ckpt is not a checkpoint that strategy 'evertune_fsdp2' can read" in said["checkpoint"]
        assert "the importance of the weights of Outside: ValueError: no per-example rule reaches" in said["outside"]
        assert "head.weight" in said["outside"].partition(", which sharded weights require")[0]


def test_registered_by_name() -> None:
    trainer = pl.Trainer(strategy=STRATEGY, accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, EvertuneFSDP2Strategy)
    with pytest.raises(TypeError, match="tensor_parallel_size"):
        EvertuneFSDP2Strategy(tensor_parallel_size=2)


def test_the_blocks_of_a_model() -> None:
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]))

    layers = nn.ModuleList(layer() for _ in range(3))
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"layers": layers}),
            "heads": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),  # not repeated layers: nothing inside
            "empty": nn.ModuleList(),
            "no_weights": nn.ModuleList([nn.Sequential(nn.ReLU())]),
        }
    )
    assert blocks(model) == list(layers)
