"""Shrink and perturb: what an experience starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks import EWC, ShrinkPerturb
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader


class First(pl.Callback):
    """The weights before the first step of each fit."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found.append(flat_weights(pl_module).clone())


def test_every_experience_but_the_first_starts_from_smaller_and_noisier_weights() -> None:
    method, module, first = ShrinkPerturb(shrink=0.5, noise=0.1), Classifier(), First()
    ends = [flat_weights(module).clone()]
    for seed in (1, 2, 3):
        fit(module, loader(seed), EWC(n_examples=8), method, first)
        ends.append(flat_weights(module).clone())
    assert torch.equal(first.found[0], ends[0])
    added = [start - 0.5 * end for start, end in zip(first.found[1:], ends[1:], strict=False)]
    for one in added:
        assert 0.07 < one.std() < 0.13
        assert one.mean().abs() < 0.05
    assert (added[0] - added[1]).abs().max() > 0.05
    assert len(added[0].unique()) == len(added[0])  # no two parameters have the same noise


def test_the_noise_is_the_same_in_another_process_and_a_resumed_fit_adds_none(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    method, module, first = ShrinkPerturb(), Classifier(), First()
    fit(module, loader(1), method)
    method.save(tmp_path)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, loader(2), method, first, Save())

    again, other = Classifier(), ShrinkPerturb()
    again.load_state_dict(state)
    other.load(tmp_path)
    fit(again, loader(2), other, first)
    assert torch.equal(*first.found)

    third = ShrinkPerturb()
    resumed = Classifier()
    fit(resumed, loader(2), third, first, ckpt=tmp_path / "middle.ckpt")
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(first.found[-1], torch.cat([value.flatten() for value in saved.values()]))
    assert third.experience_index == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrink": 0.0}, "shrink must be above 0 and at most 1, got 0.0"),
        ({"noise": -0.1}, "noise must be finite and not negative, got -0.1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShrinkPerturb(**settings)
