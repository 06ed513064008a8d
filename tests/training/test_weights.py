"""``evertune.save_weights``: a user's own module, whole, whatever the strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model

import evertune
from evertune._lightning import pl
from tests.helpers.distributed import run_ranks
from tests.helpers.strategy_worker import Tied


def test_the_weights_of_an_own_module_are_whole(tmp_path: Path) -> None:
    """One process, and ZeRO-3 and FSDP2 on two write the same file, in the middle of a fit and after it."""
    for world_size, strategy in ((1, "auto"), (2, "evertune_deepspeed_stage_3"), (2, "evertune_fsdp2")):
        run = {"out": str(tmp_path / strategy), "strategy": strategy}
        for files in run_ranks("tests.helpers.strategy_worker:save_own_module", world_size, **run):
            assert files == ["after.safetensors", "inside.safetensors"]  # on every rank, and no draft is left
    for strategy in ("evertune_deepspeed_stage_3", "evertune_fsdp2"):
        two = tmp_path / strategy
        for name in ("after.safetensors", "new/inside.safetensors"):
            expected, found = load_file(tmp_path / "auto" / name), load_file(two / name)
            assert set(expected) == set(found) == {"embed.weight", "hidden.weight", "hidden.bias", "temperature"}
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
        module = Tied()
        load_model(module, two / "after.safetensors")
        assert torch.equal(module.out.weight, load_file(two / "after.safetensors")["embed.weight"])
        assert not torch.equal(load_file(two / "new/inside.safetensors")["hidden.weight"], module.hidden.weight)


def test_without_a_module(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="the trainer has no module whose weights could be saved; call fit first"):
        evertune.save_weights(trainer, tmp_path / "weights.safetensors")
