"""Synaptic intelligence, against a loop written from the paper."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import EWC, L2SP, SynapticIntelligence
from evertune.callbacks.synaptic_intelligence import _Step
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader
from tests.callbacks.test_l2sp import InDouble


class Path64(InDouble):
    """Zenke et al.: the path integral of the gradient of the loss alone, in float64."""

    def experience(self, seed: int, steps: int, omega: torch.Tensor, damping: float) -> torch.Tensor:
        start, path = self.flat, torch.zeros_like(self.flat)
        for x, y in list(loader(seed))[:steps]:
            gradient, before = self.gradient(x, y), self.flat
            self.set(before - 0.1 * (gradient + (0 if self.pull is None else self.pull(before))))
            if self.proximal is not None:
                self.set(self.proximal(self.flat, 0.1))
            path -= gradient * (self.flat - before)
        return omega + path.clamp(min=0) / ((self.flat - start) ** 2 + damping)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("coupling", ["coupled", "decoupled"])
def test_as_in_the_paper(coupling: Any, steps: int) -> None:
    """After one step and after three experiences, so that two importances add up."""
    module, method = Classifier(), SynapticIntelligence(2.0, damping=0.01, normalize=False, coupling=coupling)
    by_hand = Path64(module)
    omega = torch.zeros_like(by_hand.flat)
    for seed in (1, 2, 3):
        anchor, before = by_hand.flat, omega.clone()
        if coupling == "coupled":
            by_hand.pull = lambda w, f=before, a=anchor: 2.0 * f * (w - a)
        else:
            by_hand.proximal = lambda w, lr, f=before, a=anchor: (w + lr * 2.0 * f * a) / (1 + lr * 2.0 * f)
        trained = 5 if seed < 3 else steps
        omega = by_hand.experience(seed, trained, omega, 0.01)
        fit(module, loader(seed), method, max_steps=trained)
        torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)
        found = torch.cat(method.tensors["importance"]).double()
        torch.testing.assert_close(found, omega, rtol=1e-3, atol=1e-4)
        assert torch.equal(torch.cat(method.tensors["anchor"]), flat_weights(module))


def importance(*others: pl.Callback, **settings: Any) -> torch.Tensor:
    method, module = SynapticIntelligence(normalize=False), Classifier()
    data = settings.pop("data", loader(1))
    fit(module, data, *others, method, **settings)
    return torch.cat(method.tensors["importance"])


def test_the_path_is_of_whole_steps() -> None:
    small = DataLoader(loader(1).dataset, batch_size=2)
    torch.testing.assert_close(importance(), importance(data=small, accumulate_grad_batches=4), rtol=1e-3, atol=1e-4)


def test_the_loss_scale_and_skipped_steps_leave_no_trace() -> None:
    scaler = GradScaler("cpu", init_scale=2.0**40, growth_interval=1)  # overflows at first
    found = importance(plugins=[pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=20)
    assert found.isfinite().all()
    assert found.max() > 0


def test_the_gradient_is_that_of_the_loss_wherever_the_method_stands() -> None:
    found = []
    for turn in (1, -1):
        methods = [L2SP(3.0), EWC(5.0, coupling="decoupled"), SynapticIntelligence(2.0)][::turn]
        module = Classifier()
        for seed in (1, 2):
            fit(module, loader(seed), *methods)
        found.append(flat_weights(module))
    assert torch.equal(*found)


def test_a_failed_fit_leaves_no_path() -> None:
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("power cut")

    method = SynapticIntelligence(normalize=False)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Classifier(), loader(2), method, Crash())
    assert method.experience_index == 0
    fit(Classifier(), loader(1), method)
    assert torch.equal(torch.cat(method.tensors["importance"]), importance())


def test_resumed_in_the_middle_it_has_the_same_importance(tmp_path: Path) -> None:
    class SaveAfterOneEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = importance(SaveAfterOneEpoch(), max_epochs=2)
    resumed = SynapticIntelligence(normalize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Classifier(), loader(1), resumed, max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    torch.testing.assert_close(torch.cat(resumed.tensors["importance"]), whole, rtol=1e-5, atol=1e-7)


def test_new_rows_count_from_where_they_start() -> None:
    method, module = SynapticIntelligence(normalize=False), Classifier(classes=3)
    fit(module, loader(1), method)
    grown = torch.nn.Linear(6, 5)
    torch.nn.init.constant_(grown.weight, 10.0)
    module.head = grown
    fit(module, loader(2), method, max_steps=1)
    moved = (module.head.weight[3:] - 10.0).abs().max()
    names = [f.name for f in method._state.fragments]  # type: ignore[union-attr]
    found = method.tensors["importance"][names.index("head.weight")].view(5, 6)[3:]
    assert 0 < moved < 1
    assert found.max() > 1e-3  # 1e4 times less if they had moved from 0 to 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "strength must not be negative, got -1.0"),
        ({"damping": 0.0}, "damping must be positive, got 0.0"),
        ({"coupling": "none"}, "coupling must be 'coupled' or 'decoupled', got 'none'"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynapticIntelligence(**settings)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_path_of_a_sparse_gradient(scale: float) -> None:
    """A few blocks of an embedding have a gradient, and so has the end, which fills no block."""
    generator = torch.Generator().manual_seed(0)
    value, moved, path = (torch.randn(128 * 9_000 + 7, generator=generator) for _ in range(3))
    gradient = torch.zeros_like(value)
    gradient[130:140], gradient[128 * 7_000 + 3], gradient[-3:] = 1.5, -2.0, 0.5
    expected = path.double() - gradient.double() * (moved.double() - value.double())
    step = _Step(gradient * scale, value, scale)
    assert step._start.numel() == 2 * 128 + 7
    step.add_to(path, moved)
    torch.testing.assert_close(path.double(), expected, rtol=1e-6, atol=1e-6)
