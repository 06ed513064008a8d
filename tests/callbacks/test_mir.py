"""Maximally interfered retrieval, against a loop written from the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks import MIR, DarkReplay, LogitAdjustment, Replay, SourceLosses
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader
from tests.callbacks.test_l2sp import InDouble


class MIR64(InDouble):
    """Aljundi et al., in float64: of each group of candidates the one whose loss rises most by a virtual step."""

    def losses(self, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        w = [
            part.view(old.shape)
            for part, old in zip(flat.split([w.numel() for w in self.weights]), self.weights, strict=True)
        ]
        hidden = torch.tanh(x.double() @ w[0].T + w[1])
        return nn.functional.cross_entropy(hidden @ w[2].T + w[3], y, reduction="none")

    def chosen(self, x: Tensor, y: Tensor, past: tuple[Tensor, Tensor], candidates: int, step_size: float) -> Tensor:
        g = self.gradient(x, y)
        moved = self.flat - step_size * g / g.norm()
        scores = self.losses(moved, *past) - self.losses(self.flat, *past)
        return scores.view(-1, candidates).argmax(1) + candidates * torch.arange(len(scores) // candidates)


def batch_of(view: Any, slots: Any) -> tuple[Tensor, Tensor]:
    examples = [view[int(slot)] for slot in slots]
    return torch.stack([x for x, _ in examples]), torch.stack([torch.as_tensor(y) for _, y in examples])


@pytest.mark.parametrize("steps", [1, 5])
def test_as_in_the_paper(steps: int) -> None:
    """After one step with a memory, and after two experiences; some choices differ from the first candidate."""
    module, method = Classifier(), MIR(memory_size=30, candidates=3, step_size=0.1)
    by_hand = MIR64(module).learn(1)
    fit(module, loader(1), method)
    view, others = method.memory.view, 0
    for step, (x, y) in enumerate(list(loader(2))[:steps]):
        past = batch_of(view, view.draw(np.arange(24) + 24 * step, 1))
        rows = by_hand.chosen(x, y, past, 3, 0.1)
        others += int((rows % 3 > 0).sum())
        g = by_hand.gradient(torch.cat([x, past[0][rows]]), torch.cat([y, past[1][rows]]))
        by_hand.set(by_hand.flat - 0.1 * g)
    fit(module, loader(2), method, max_steps=steps)
    torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)
    assert others > 2


def test_the_choice_leaves_no_trace() -> None:
    """The weights, the gradients of an accumulation and the random state are those of before, to the bit."""

    class Looks(MIR):
        def _scores(self, trainer: pl.Trainer, new: Any, candidates: Any) -> Tensor:
            module = trainer.lightning_module
            before = [p.detach().clone() for p in module.parameters()]
            gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            state = torch.get_rng_state()
            scores = super()._scores(trainer, new, candidates)
            assert torch.equal(torch.get_rng_state(), state)
            for p, value, gradient in zip(module.parameters(), before, gradients, strict=True):
                assert torch.equal(p, value)
                assert p.grad is gradient is None or torch.equal(p.grad, gradient)  # type: ignore[arg-type]
            seen.append(scores)
            return scores

    class Drops(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    seen: list[Tensor] = []
    module, method = Drops(), Looks(memory_size=30)
    for seed in (1, 2):
        fit(module, loader(seed), method, accumulate_grad_batches=2)
    assert len(seen) == 5
    assert all(len(scores) == 24 and scores.abs().max() > 0 for scores in seen)


def test_other_callbacks_see_the_chosen_examples() -> None:
    sizes = []

    class Sizes(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
            now = method.joined(trainer, batch)
            sizes.append((len(batch[0]), now.n_new, len(now.slots)))
            for slot, x in zip(now.slots, batch[0][now.replayed], strict=True):
                assert torch.equal(now.view[slot][0], x)

    module, method = Classifier(), MIR(memory_size=30, replay_ratio=0.5, extra=loader(9).dataset, extra_ratio=0.25)
    for seed in (1, 2):
        fit(module, loader(seed), method, Sizes(), SourceLosses())
    assert sizes == [(10, 8, 0)] * 5 + [(14, 8, 4)] * 5


def test_a_memory_of_replay_can_be_continued(tmp_path: Any) -> None:
    module, replay, method = Classifier(), Replay(memory_size=30), MIR(memory_size=30)
    fit(module, loader(1), replay)
    replay.save(tmp_path)
    method.load(tmp_path)
    fit(module, loader(2), method)
    assert method.experience_index == 2
    assert len(method.memory) == 30


def test_what_cannot_work_is_refused() -> None:
    for settings, message in (
        ({"candidates": 1}, "candidates must be at least 2, got 1"),
        ({"step_size": 0.0}, "step_size must be positive and finite, got 0.0"),
        ({"replay_ratio": 0}, "replay_ratio must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MIR(30, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LogitAdjustment needs to know how often each class is replayed"):
        fit(Classifier(), loader(1), MIR(30), LogitAdjustment())
    with pytest.raises(ValueError, match="two Replay callbacks"):
        fit(Classifier(), loader(1), MIR(30), DarkReplay(30))
    with pytest.raises(ValueError, match="MIR needs automatic optimization"):
        fit(Classifier(n_optimizers=2), loader(1), MIR(30))

    class NoLogits(Classifier):
        def forward(self, x: Tensor) -> Any:
            return "nothing"

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.hidden(batch[0])), batch[1])

    with pytest.raises(ValueError, match="MIR cannot compute the loss of each example of NoLogits"):
        fit(NoLogits(), loader(1), MIR(30))
