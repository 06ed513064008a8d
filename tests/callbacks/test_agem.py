"""A-GEM and GEM, against loops written from the papers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks import AGEM, EWC, GEM, L2SP, Replay
from evertune.callbacks.agem import _STREAM
from evertune.callbacks.gem import solve_dual
from evertune.callbacks.reference_method import training_loss
from evertune.shards.replicated import ReplicatedShards
from evertune.shards.second_gradient import second_gradient
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader
from tests.callbacks.test_l2sp import InDouble


def memory_only() -> Replay:
    """A memory of which nothing joins the batches."""
    return Replay(memory_size=30, replay_ratio=0)


def batch_of(view: Any, slots: Any) -> tuple[Tensor, Tensor]:
    examples = [view[int(slot)] for slot in slots]
    return torch.stack([x for x, _ in examples]), torch.stack([torch.as_tensor(y) for _, y in examples])


@pytest.mark.parametrize("steps", [1, 5])
def test_agem_is_as_in_the_paper(steps: int) -> None:
    """After one step with a memory, and after two experiences."""
    module, replay, method = Classifier(), memory_only(), AGEM(reference_size=12)
    by_hand = InDouble(module).learn(1)
    fit(module, loader(1), replay, method)
    view, projected = replay.memory.view, 0
    for step, (x, y) in enumerate(list(loader(2))[:steps]):
        g = by_hand.gradient(x, y)
        r = by_hand.gradient(*batch_of(view, view.draw(np.arange(12) + 12 * step, _STREAM + 1)))
        if g @ r < 0:
            g, projected = g - (g @ r) / (r @ r) * r, projected + 1
        by_hand.set(by_hand.flat - 0.1 * g)
    fit(module, loader(2), replay, method, max_steps=steps)
    torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)
    assert steps == 1 or projected > 0


def nearest(g: Tensor, r: Tensor, margin: float) -> Tensor:
    """The projection of g on the cone of all h with r h >= 0, by trying every set of active constraints."""
    for n in range(len(r) + 1):
        for active in itertools.combinations(range(len(r)), n):
            rows = r[list(active)]
            v = torch.linalg.solve(rows @ rows.T, -(rows @ g)) if n else torch.zeros(0).double()
            if (v >= 0).all() and (r @ (g + rows.T @ v) >= -1e-12).all():
                return g + rows.T @ v + margin * r.sum(0)
    raise AssertionError("no solution")


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_is_as_in_the_paper(margin: float, steps: int) -> None:
    """After one step and after a whole experience, with two past ones in the memory."""
    module, replay, method = Classifier(), memory_only(), GEM(reference_size=8, margin=margin)
    fit(module, loader(1), replay, method)
    fit(module, loader(2), replay, method)
    by_hand, view = InDouble(module), replay.memory.view
    assert set(view.experiences) == {"0", "1"}
    for step, (x, y) in enumerate(list(loader(3))[:steps]):
        references = []
        for number in range(2):
            slots = [slot for slot, name in enumerate(view.experiences) if name == str(number)]
            order = np.random.default_rng([0, 2, step, number]).permutation(slots)
            references.append(by_hand.gradient(*batch_of(view, np.resize(order, 8))))
        by_hand.set(by_hand.flat - 0.1 * nearest(by_hand.gradient(x, y), torch.stack(references), margin))
    fit(module, loader(3), replay, method, max_steps=steps)
    torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)


def test_the_dual_of_gem_against_all_active_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        r = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        g = torch.randn(6, generator=generator, dtype=torch.float64)
        found = g + r.T @ solve_dual(r @ r.T, r @ g)
        torch.testing.assert_close(found, nearest(g, r, 0.0), rtol=1e-8, atol=1e-10)


def test_the_dual_of_constraints_that_are_the_same() -> None:
    r = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).double()
    g = torch.tensor([-3.0, 1.0]).double()
    torch.testing.assert_close(g + r.T @ solve_dual(r @ r.T, r @ g), torch.tensor([0.0, 1.0]).double())


class Logs(Classifier):
    """Takes no batch index, returns a dict, and logs."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        loss = super().training_step(batch, 0)
        self.log("loss", loss)
        self.log_dict({"twice": 2 * loss})
        return {"loss": loss}


def test_the_reference_leaves_no_trace() -> None:
    class Looks(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            before = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
            batch = next(iter(loader(3)))
            shards = ReplicatedShards(pl_module)
            found = second_gradient(trainer, shards, lambda: training_loss(trainer, pl_module, batch))
            with torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(pl_module(batch[0]), batch[1])
            expected = torch.autograd.grad(loss, list(pl_module.parameters()))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other.flatten())
            assert all(torch.equal(p.grad, g) for p, g in zip(pl_module.parameters(), before, strict=True))  # type: ignore[arg-type]
            assert not {"forward", "log"} & vars(pl_module).keys()
            assert torch.equal(trainer.callback_metrics["loss"], self.logged)

        def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
            self.logged = trainer.callback_metrics["loss"].clone()

    fit(Logs(), loader(1), Looks())


def test_weights_without_a_part_in_the_loss_have_no_reference() -> None:
    module, replay = Classifier(), memory_only()
    module.unused = torch.nn.Linear(3, 3)
    for seed in (1, 2):
        fit(module, loader(seed), replay, AGEM(reference_size=8))


def test_the_order_of_methods_does_not_matter() -> None:
    found = []
    for turn in (1, -1):
        methods = [memory_only(), AGEM(reference_size=8), L2SP(0.5), EWC(5.0, n_examples=16)][::turn]
        module = Classifier()
        for seed in (1, 2):
            fit(module, loader(seed), *methods)
        found.append(flat_weights(module))
    assert torch.equal(*found)


def test_a_memory_of_which_nothing_joins_the_batches() -> None:
    sizes = []

    class Sizes(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
            sizes.append(len(batch[0]))

    replay, module, plain = memory_only(), Classifier(), Classifier()
    for seed in (1, 2):
        fit(module, loader(seed), replay, Sizes())
        fit(plain, loader(seed))
    assert set(sizes) == {8}
    assert len(replay.memory) == 30
    assert torch.equal(flat_weights(module), flat_weights(plain))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AGEM needs the memory of a Replay: add Replay\(memory_size=...\)"):
        fit(Classifier(), loader(1), AGEM())
    with pytest.raises(ValueError, match="AGEM and GEM in one Trainer: each projects the gradient by the same memory"):
        fit(Classifier(), loader(1), Replay(30), AGEM(), GEM())
    with pytest.raises(ValueError, match="AGEM needs automatic optimization: it runs training_step a second time"):
        fit(Classifier(n_optimizers=2), loader(1), Replay(30), AGEM())
    with pytest.raises(ValueError, match="reference_size must be positive, got 0"):
        AGEM(0)
    with pytest.raises(ValueError, match="margin must be finite and not negative, got -1"):
        GEM(margin=-1)
