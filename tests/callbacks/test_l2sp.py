"""L2-SP, and the penalties that act after the optimizer's step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import EWC, L2SP
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader


class InDouble:
    """The same classifier and data by hand in float64: a loop written from the papers.

    Args:
        module: Where to start.
        pull: Function ``weights -> gradient`` added to that of the loss.
        proximal: Function ``(weights, learning rate) -> weights`` after each step.
    """

    def __init__(self, module: nn.Module, pull: Any = None, proximal: Any = None) -> None:
        self.weights = [p.detach().double() for p in module.parameters()]
        self.pull, self.proximal = pull, proximal

    @property
    def flat(self) -> Tensor:
        return torch.cat([w.flatten() for w in self.weights])

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        leaves = [w.clone().requires_grad_() for w in self.weights]
        hidden = torch.tanh(x.double() @ leaves[0].T + leaves[1])
        loss = nn.functional.cross_entropy(hidden @ leaves[2].T + leaves[3], y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    def set(self, flat: Tensor) -> None:
        parts = flat.split([w.numel() for w in self.weights])
        self.weights = [part.view(w.shape) for part, w in zip(parts, self.weights, strict=True)]

    def learn(self, seed: int, lr: float = 0.1, steps: int | None = None) -> InDouble:
        for x, y in list(loader(seed))[:steps]:
            gradient = self.gradient(x, y)
            if self.pull is not None:
                gradient = gradient + self.pull(self.flat)
            self.set(self.flat - lr * gradient)
            if self.proximal is not None:
                self.set(self.proximal(self.flat, lr))
        return self


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("coupling", ["coupled", "decoupled"])
@pytest.mark.parametrize("to", ["pretrained", "previous"])
def test_as_in_the_paper(to: Any, coupling: Any, steps: int) -> None:
    """After one step and after two experiences."""
    module, method = Classifier(), L2SP(2.0, to=to, coupling=coupling)
    by_hand = InDouble(module)
    start = by_hand.flat

    def act(anchor: Tensor) -> None:
        if coupling == "coupled":
            by_hand.pull = lambda w: 2.0 * (w - anchor)
        else:
            by_hand.proximal = lambda w, lr: (w + lr * 2.0 * anchor) / (1 + lr * 2.0)

    if to == "pretrained":
        act(start)
    fit(module, loader(1), method, max_steps=steps)
    by_hand.learn(1, steps=steps)
    torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)
    act(start if to == "pretrained" else by_hand.flat)
    fit(module, loader(2), method, max_steps=steps)
    by_hand.learn(2, steps=steps)
    torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda **s: EWC(estimator="exact", n_examples=40, **s), L2SP], ids=["EWC", "L2SP"])
def test_a_strength_at_which_the_coupled_penalty_diverges(make: Any) -> None:
    """At 1000 times the strength that gradient descent bears, the decoupled one holds the weights at the anchor."""
    norms = {}
    for coupling in ("coupled", "decoupled"):
        settings = {"normalize": False} if make is not L2SP else {"to": "previous"}
        method, module = make(**settings, coupling=coupling), Classifier()
        fit(module, loader(1), method)
        anchor = flat_weights(module)
        curvature = method.tensors["importance"][0].max() if make is not L2SP else 1.0
        method.strength = float(1000 * 2 / 0.1 / curvature)
        fit(module, loader(2), method)
        norms[coupling] = float((flat_weights(module) - anchor).norm())
    assert norms["coupled"] > 1e6
    assert 0 < norms["decoupled"] < 0.5


class TwoGroups(Classifier):
    """The head learns ten times as fast, and both slow down."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.hidden.parameters()}, {"params": self.head.parameters(), "lr": 1.0}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_decoupled_follows_the_learning_rate_of_each_group() -> None:
    module, method = TwoGroups(), L2SP(2.0, coupling="decoupled")
    by_hand = InDouble(module)
    start, n_hidden = by_hand.flat, 30
    rates = torch.full_like(start, 0.1)
    rates[n_hidden:] = 1.0
    for step, (x, y) in enumerate(loader(1)):
        lr = rates / (1 + step)
        moved = by_hand.flat - lr * by_hand.gradient(x, y)
        by_hand.set((moved + lr * 2.0 * start) / (1 + lr * 2.0))
    fit(module, loader(1), method)
    torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)


def test_decoupled_acts_once_per_step_and_ends_with_the_fit() -> None:
    found = []
    for accumulation in (1, 4):
        module, method = Classifier(), L2SP(2.0, coupling="decoupled")
        data = DataLoader(loader(1).dataset, batch_size=8 // accumulation)
        trainer = fit(module, data, method, accumulate_grad_batches=accumulation)
        found.append(flat_weights(module))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizers[0].step()
    assert torch.equal(flat_weights(module), found[1])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_decoupled_in_other_precisions(precision: str) -> None:
    module, method = Classifier(), L2SP(1e6, coupling="decoupled")
    anchor = flat_weights(module)
    fit(module, loader(1), method, precision=precision)
    torch.testing.assert_close(flat_weights(module).float(), anchor, rtol=1e-2, atol=1e-4)


def test_the_order_of_methods_does_not_matter() -> None:
    found = []
    for turn in (1, -1):
        methods = [
            EWC(5.0, estimator="exact", n_examples=40, coupling="decoupled"),
            L2SP(3.0, coupling="decoupled"),
        ][::turn]
        module = Classifier()
        for seed in (1, 2):
            fit(module, loader(seed), *methods)
        found.append(flat_weights(module))
    assert torch.equal(*found)


def test_weights_that_are_frozen_stay_and_those_unfrozen_are_anchored_where_they_were() -> None:
    module, method = Classifier(), L2SP(1e6, coupling="decoupled")
    pretrained = module.hidden.weight.detach().clone()
    module.hidden.requires_grad_(False)
    fit(module, loader(1), method)
    assert torch.equal(module.hidden.weight, pretrained)
    module.hidden.requires_grad_(True)
    fit(module, loader(2), method)
    torch.testing.assert_close(module.hidden.weight.detach(), pretrained, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        module.hidden.weight.add_(1.0)
    module.hidden.requires_grad_(False)
    fit(module, loader(3), method)
    assert (module.hidden.weight - pretrained).min() > 0.99


def test_channels_last_weights_are_pulled() -> None:
    class Picture(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[assignment]
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x[:, :2, None, None].expand(-1, -1, 2, 2)).flatten(1))

    module, method = Picture(), L2SP(1e6, coupling="decoupled")
    assert not module.hidden.weight.is_contiguous()
    before = module.hidden.weight.detach().clone()
    fit(module, loader(1), method)
    torch.testing.assert_close(module.hidden.weight.detach(), before, rtol=1e-3, atol=1e-4)


def test_a_failed_fit_and_a_resumed_one_keep_the_pretrained_anchor(tmp_path: Path) -> None:
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "middle.ckpt")
            raise RuntimeError("power cut")

    module, method = Classifier(), L2SP(1.0, coupling="decoupled")
    pretrained = flat_weights(module)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, loader(1), method, Crash())
    fresh = L2SP(1.0, coupling="decoupled")
    fit(Classifier(), loader(1), fresh, ckpt=tmp_path / "middle.ckpt")
    assert torch.equal(torch.cat(fresh.tensors["anchor"]), pretrained)
    assert method.experience_index == 0
    assert fresh.experience_index == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2SP(-1.0), "strength must not be negative, got -1.0"),
        (lambda: L2SP(float("inf")), "strength must be finite, got inf"),
        (lambda: L2SP(to="start"), "to must be 'pretrained' or 'previous', got 'start'"),  # type: ignore[arg-type]
        (lambda: L2SP(coupling="loose"), "coupling must be 'coupled' or 'decoupled', got 'loose'"),  # type: ignore[arg-type]
        (lambda: EWC(coupling="loose"), "coupling must be 'coupled' or 'decoupled', got 'loose'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
