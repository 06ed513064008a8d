"""Averages of weights as the end of an experience."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune._lightning import pl
from evertune.callbacks import EMA, L2SP, DriftTrigger, VersionAveraging
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader
from tests.callbacks.test_l2sp import InDouble


def test_the_moving_average_by_hand() -> None:
    """In float64, over two experiences; anchors are taken of the average, wherever the methods stand."""
    for turn in (1, -1):
        module, ema, l2sp = Classifier(), EMA(decay=0.7), L2SP(0.0, to="previous")
        by_hand = InDouble(module)
        for seed in (1, 2):
            average = by_hand.flat
            for x, y in loader(seed):
                by_hand.set(by_hand.flat - 0.1 * by_hand.gradient(x, y))
                average = 0.7 * average + 0.3 * by_hand.flat
            by_hand.set(average)
            fit(module, loader(seed), *[ema, l2sp][::turn])
            torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)
            assert torch.equal(torch.cat(l2sp.tensors["anchor"]), flat_weights(module))


def test_between_the_version_before_and_the_one_after() -> None:
    module, plain = Classifier(), Classifier()
    before = flat_weights(module)
    fit(plain, loader(1))
    fit(module, loader(1), VersionAveraging(previous=0.25))
    torch.testing.assert_close(flat_weights(module), 0.25 * before + 0.75 * flat_weights(plain))


@pytest.mark.parametrize("method", [EMA, VersionAveraging])
def test_rows_that_another_callback_sets_belong_to_the_weights_before(method: Any) -> None:
    """Wherever it stands in the list, as Imprinting does."""

    class SetWeights(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for parameter in pl_module.parameters():
                torch.nn.init.constant_(parameter, 0.5)

    ends = []
    for turn in (1, -1):
        module = Classifier()
        fit(module, loader(1), *[method(), SetWeights()][::turn])
        ends.append(flat_weights(module))
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", [EMA, VersionAveraging])
def test_resumed_in_the_middle_it_ends_on_the_same_weights(method: Any, tmp_path: Path) -> None:
    class SaveAfterOneEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, resumed = Classifier(), Classifier()
    fit(whole, loader(1), method(), SaveAfterOneEpoch(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, loader(1), method(), max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    torch.testing.assert_close(flat_weights(resumed), flat_weights(whole), rtol=1e-6, atol=1e-7)


def test_a_fit_that_failed_leaves_no_average() -> None:
    class Crash(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power cut")

    ema, module, other = EMA(), Classifier(), Classifier()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Classifier(), loader(2), ema, Crash())
    fit(module, loader(1), ema)
    fit(other, loader(1), EMA())
    assert torch.equal(flat_weights(module), flat_weights(other))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="EMA and VersionAveraging in one Trainer: each sets the final weights"):
        fit(Classifier(), loader(1), EMA(), VersionAveraging())
    with pytest.raises(ValueError, match="EMA sets the weights where a fit ends, and DriftTrigger ends"):
        fit(Classifier(), loader(1), EMA(), DriftTrigger())
    with pytest.raises(ValueError, match="decay must be between 0 and 1, got 1"):
        EMA(1)
    with pytest.raises(ValueError, match="previous must be between 0 and 1, got 0"):
        VersionAveraging(0)
