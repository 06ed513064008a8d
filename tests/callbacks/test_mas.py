"""Memory aware synapses, against a loop written from the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks import MAS
from evertune.importance import estimate_sensitivity
from evertune.shards.replicated import ReplicatedShards
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader
from tests.callbacks.test_l2sp import InDouble


def sensitivity(by_hand: InDouble, seed: int) -> Tensor:
    """Equation 4 of Aljundi et al., one example after another, in float64."""
    total = torch.zeros_like(by_hand.flat)
    examples = loader(seed).dataset
    for x, _ in examples:
        leaves = [w.clone().requires_grad_() for w in by_hand.weights]
        output = torch.tanh(leaves[0] @ x.double() + leaves[1])
        squared_norm = (leaves[2] @ output + leaves[3]).square().sum()
        total += torch.cat([g.flatten() for g in torch.autograd.grad(squared_norm, leaves)]).abs()
    return total / len(examples)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("coupling", ["coupled", "decoupled"])
def test_as_in_the_paper(coupling: Any, steps: int) -> None:
    """After one step and after three experiences, so that two importances add up."""
    module, method = Classifier(), MAS(0.3, n_examples=40, normalize=False, coupling=coupling)
    by_hand = InDouble(module)
    omega = torch.zeros_like(by_hand.flat)
    for seed in (1, 2, 3):
        anchor, before = by_hand.flat, omega.clone()
        if coupling == "coupled":
            by_hand.pull = lambda w, f=before, a=anchor: 0.3 * f * (w - a)
        else:
            by_hand.proximal = lambda w, lr, f=before, a=anchor: (w + lr * 0.3 * f * a) / (1 + lr * 0.3 * f)
        trained = 5 if seed < 3 else steps
        by_hand.learn(seed, steps=trained)
        omega += sensitivity(by_hand, seed)
        fit(module, loader(seed), method, max_steps=trained)
        torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)
        if trained == 5:
            found = torch.cat(method.tensors["importance"]).double()
            torch.testing.assert_close(found, omega, rtol=1e-4, atol=1e-6)


class Tokens(pl.LightningModule):
    """An embedding, a normalisation, a convolution, a layer without a rule and a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.shared = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.words(x))
        hidden = self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        hidden = torch.tanh(self.shared(torch.tanh(self.shared(hidden))))
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(hidden.mean(1))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_magnitude_is_per_example_in_every_kind_of_layer(batch_size: int) -> None:
    module = Tokens()
    x = torch.randint(0, 9, (5, 6), generator=torch.Generator().manual_seed(1))
    expected = [torch.zeros_like(p) for p in module.parameters()]
    for row in x:
        squared_norm = module(row[None]).square().sum()
        gradients = torch.autograd.grad(squared_norm, list(module.parameters()))
        expected = [total + g.abs() / len(x) for total, g in zip(expected, gradients, strict=True)]
    found = estimate_sensitivity(module, [(part,) for part in x.split(batch_size)], ReplicatedShards(module))
    for (name, _), one, other in zip(module.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other.flatten(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_positions_that_do_not_count_do_not_matter() -> None:
    class Tagger(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.words(x)))

    module = Tagger()
    x = torch.randint(0, 9, (5, 6), generator=torch.Generator().manual_seed(1))
    y = torch.zeros_like(x)
    y[:, 4:] = -100
    shards = ReplicatedShards(module)
    padded = estimate_sensitivity(module, [(x, y)], shards)
    cut = estimate_sensitivity(module, [(x[:, :4], y[:, :4])], shards)
    torch.testing.assert_close(padded, cut)


def test_normalized_importance_has_mean_1() -> None:
    module, method = Classifier(), MAS(n_examples=40)
    fit(module, loader(1), method)
    assert torch.cat(method.tensors["importance"]).mean() == pytest.approx(1.0)
    assert method.notes == {"normalize": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "strength must not be negative, got -1.0"),
        ({"n_examples": 0}, "n_examples must be positive, got 0"),
        ({"batch_size": -2}, "batch_size must be positive, got -2"),
        ({"coupling": "none"}, "coupling must be 'coupled' or 'decoupled', got 'none'"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAS(**settings)


def test_a_module_without_logits_is_refused_before_the_first_step() -> None:
    class Silent(Classifier):
        def forward(self, x: Tensor) -> Any:
            return {"hidden": x}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.head(self.hidden(batch[0])).square().mean()

    with pytest.raises(ValueError, match=r"MAS cannot estimate the importance of the weights of Silent: .*logits="):
        fit(Silent(), loader(1), MAS())
