"""Classification heads that grow: new classes are new rows at the end, and old rows stay bit-identical."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evertune.lightning_modules.saving import whole

INITIAL_STD = 0.02
"""The standard deviation of a new row's weights, as in BERT's own heads."""


def initial_rows(start: int, stop: int, in_features: int) -> Tensor:
    """The initial weights of the rows ``start`` to ``stop``, drawn from a normal distribution.

    A row depends on the seed of the process (``seed_everything``) and on its number, on nothing else: a head that
    grows gets the rows that one allocated ahead has, on any number of processes.

    Returns:
        A tensor [stop - start, in_features].

    >>> _ = torch.manual_seed(0)
    >>> torch.equal(initial_rows(0, 5, 8)[2:], initial_rows(2, 5, 8))
    True
    """
    rows = torch.empty(stop - start, in_features, dtype=torch.float32, device="cpu")
    for row in range(start, stop):
        generator = torch.Generator("cpu").manual_seed((torch.initial_seed() + 1_000_003 * (row + 1)) % 2**63)
        rows[row - start].normal_(0.0, INITIAL_STD, generator=generator)
    return rows


def with_rows(parameter: Tensor, rows: Tensor) -> nn.Parameter:
    """A parameter with ``rows`` appended; the old rows are bit for bit what they were."""
    old = whole(parameter)
    grown = torch.cat([old, rows.to(old.dtype)]).to(parameter.device)
    return nn.Parameter(grown, requires_grad=parameter.requires_grad)


class LinearHead(nn.Linear):
    """Class scores ``W x + b``, one row of ``W`` a class."""

    def reset_parameters(self) -> None:
        """Draw the weights as :func:`initial_rows` does; the biases are 0."""
        with torch.no_grad():
            self.weight.copy_(initial_rows(0, self.out_features, self.in_features))
            self.bias.zero_()

    def grow(self, n_rows: int) -> None:
        """Append rows until there are ``n_rows``; call it on every rank."""
        new = initial_rows(self.out_features, n_rows, self.in_features)
        self.weight = with_rows(self.weight, new)
        self.bias = with_rows(self.bias, torch.zeros(len(new)))
        self.out_features = n_rows


class CosineHead(nn.Module):
    """Class scores ``scale * cos(x, w)``: neither the length of a row nor a bias can favour the newest classes.

    The scale is learned (Hou et al., 2019, "Learning a Unified Classifier Incrementally via Rebalancing").

    Args:
        in_features: the size of the features.
        out_features: how many classes.
        scale: what the scale starts from. A softmax over C cosines cannot be confident without one.

    >>> head = CosineHead(4, 2)
    >>> features = torch.ones(1, 4)
    >>> torch.allclose(head(features), head(7 * features))
    True
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 10.0) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(initial_rows(0, out_features, in_features).to(torch.get_default_dtype()))
        self.scale = nn.Parameter(torch.full((1,), scale))

    def forward(self, features: Tensor) -> Tensor:
        """Scores [batch, classes] of features [batch, in_features]."""
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))

    def grow(self, n_rows: int) -> None:
        """Append rows until there are ``n_rows``; call it on every rank."""
        self.weight = with_rows(self.weight, initial_rows(self.out_features, n_rows, self.in_features))
        self.out_features = n_rows


HeadKind = Literal["linear", "cosine"]
HEADS: dict[HeadKind, type[LinearHead] | type[CosineHead]] = {"linear": LinearHead, "cosine": CosineHead}
