"""Adversarial training: the formulas of the papers, what it composes with, what it leaves alone, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks import AdversarialTraining, Distillation, LogitAdjustment, RDrop, Replay
from tests.helpers.quiet import QUIET
from tests.helpers.shard_worker import SmallBert, experience, fit, make_bert

SETTINGS = {**QUIET, "max_epochs": 1, "accelerator": "cpu", "devices": 1}
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LABELS = torch.tensor([0, 1])


class Words(pl.LightningModule):
    """Means of word vectors, classified; notes the losses that it logs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dropout, self.head = nn.Embedding(10, 4), nn.Dropout(dropout), nn.Linear(4, 3)
        self.logged: list[float] = []

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(tokens).tanh().mean(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.logged.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def one_step(module: pl.LightningModule, *callbacks: pl.Callback) -> pl.Trainer:
    trainer = pl.Trainer(callbacks=list(callbacks), **SETTINGS)
    trainer.fit(module, torch.utils.data.DataLoader(list(zip(TOKENS, LABELS, strict=True)), batch_size=2))
    return trainer


def reference(epsilon: float, size: float, steps: int, over_all: bool) -> Words:
    """One step of gradient descent on the loss of the papers, written down once more."""
    module = Words()

    def loss(move: Tensor) -> Tensor:
        vectors = module.embedding(TOKENS) + move
        return F.cross_entropy(module.head(vectors.tanh().mean(1)), LABELS)

    move, moves = torch.zeros(2, 3, 4), []
    for _ in range(steps):
        move = move.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(move), move)
        move = move.detach() + size * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
        lengths = move.flatten(1).norm(dim=1)[:, None, None]
        move = torch.where(lengths > epsilon, move * epsilon / lengths, move)
        moves.append(move)
    learned = moves if over_all else moves[-1:]
    total = loss(torch.zeros(2, 3, 4)) + 0.7 * sum(loss(one) for one in learned) / len(learned)
    total.backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    return module


@pytest.mark.parametrize(
    ("attack", "size", "steps", "over_all"),
    [("fgm", 2.0, 1, False), ("pgd", 1.5, 3, False), ("freelb", 1.5, 3, True)],
)
def test_the_weights_are_those_of_the_papers(attack: Any, size: float, steps: int, over_all: bool) -> None:
    module = Words()
    one_step(module, AdversarialTraining(attack, 2.0, 0.7, steps=3, step_size=1.5))
    expected = reference(2.0, size, steps, over_all)
    for (name, found), value in zip(module.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, value, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(found, dict(Words().named_parameters())[name])


def test_the_module_logs_and_draws_as_without_it() -> None:
    plain, moved = Words(dropout=0.5), Words(dropout=0.5)
    torch.manual_seed(3)
    before = one_step(plain).callback_metrics["loss"]
    torch.manual_seed(3)
    trainer = one_step(moved, AdversarialTraining(strength=1e-9))
    assert trainer.callback_metrics["loss"] == before
    assert moved.logged[1] == plain.logged[0]  # the first is that of the attack
    assert not moved.embedding._forward_hooks
    torch.testing.assert_close(moved.head.weight, plain.head.weight)


def test_it_composes_with_replay_distillation_and_adjusted_logits(tmp_path: Any) -> None:
    found = {}
    for name, more in {"plain": [], "moved": [AdversarialTraining(epsilon=0.5)]}.items():
        module = SmallBert(make_bert(tmp_path / name), ["a", "b", "c"], "sgd")
        callbacks = [Replay(20), LogitAdjustment(), Distillation(examples="all"), *more]
        pl.seed_everything(1, verbose=False)
        fit(module, experience("first", 2, ["a", "b"], 1), "auto", 1, list(callbacks))
        fit(module, experience("second", 3, ["b", "c"], 2), "auto", 1, list(callbacks))
        found[name] = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    assert found["moved"].isfinite().all() and not torch.equal(found["plain"], found["moved"])


class Two(Words):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding(3, 3)


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (Two, {}, "it has 2 embeddings, not one; pass embedding="),
        (Two, {"embedding": "vectors"}, "it has no submodule 'vectors'"),
        (Two, {"embedding": "other"}, "training_step used the embedding 0 times, not once"),
    ],
)
def test_refused_on_the_first_batch(module: Any, arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        one_step(module(), AdversarialTraining(**arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attack": "fgsm"}, "attack must be one of"),
        ({"epsilon": 0}, "epsilon must be positive and finite, got 0"),
        ({"strength": float("inf")}, "strength must be positive and finite, got inf"),
        ({"steps": 0}, "steps must be positive and finite, got 0"),
        ({"step_size": -1.0}, "step_size must be positive and finite, got -1.0"),
    ],
)
def test_bad_settings(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdversarialTraining(**arguments)


# --- R-Drop


class Noted(Words):
    """Notes the logits of each pass in training."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.passes: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        if self.training and torch.is_grad_enabled():
            logits.retain_grad()
            self.passes.append(logits)
        return logits


def test_rdrop_learns_both_passes_and_draws_them_together() -> None:
    torch.manual_seed(5)
    module = Noted()
    one_step(module, RDrop(strength=2.0))
    first, second = module.passes
    assert not torch.equal(first, second)
    p, q = (one.detach().clone().requires_grad_() for one in (first, second))
    kl = [
        F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="batchmean", log_target=True)
        for a, b in ((p, q), (q, p))
    ]
    (F.cross_entropy(p, LABELS) + F.cross_entropy(q, LABELS) + 2.0 * sum(kl) / 2).backward()
    torch.testing.assert_close(first.grad, p.grad)
    torch.testing.assert_close(second.grad, q.grad)


def test_rdrop_needs_dropout() -> None:
    with pytest.raises(ValueError, match="Words has none: set its dropout"):
        one_step(Words(), RDrop())
    with pytest.raises(ValueError, match="strength must be positive and finite, got 0"):
        RDrop(0)
