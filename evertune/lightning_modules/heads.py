"""Classification heads that grow: new classes are appended as rows, and old rows stay bit-identical."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evertune.lightning_modules.saving import whole

INITIAL_STD = 0.02
"""Standard deviation of a new row's weights, as in BERT's own heads."""
_LEAST_STEP = 1e-3
"""Least distance of two thresholds between classes, so that no class has the probability 0."""


def initial_rows(start: int, stop: int, in_features: int) -> Tensor:
    """The initial weights of rows ``start`` to ``stop`` (excluded), drawn from a normal distribution.

    A row depends only on the seed of the process (``seed_everything``) and on its number: a head that grows gets the
    same rows as one allocated in advance, on any number of processes.

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
    """A parameter with ``rows`` appended; the old rows stay bit-identical."""
    old = parameter if parameter.is_meta else whole(parameter)
    grown = torch.cat([old, rows.to(old)]).to(parameter.device)
    return nn.Parameter(grown, requires_grad=parameter.requires_grad)


class LinearHead(nn.Linear):
    """Class scores ``W x + b``, with one row of ``W`` per class."""

    def reset_parameters(self) -> None:
        """Draw the weights with :func:`initial_rows`; the biases are 0."""
        with torch.no_grad():
            self.weight.copy_(initial_rows(0, self.out_features, self.in_features))
            self.bias.zero_()

    def grow(self, n_rows: int) -> None:
        """Append rows until there are ``n_rows``. Call on every rank."""
        new = initial_rows(self.out_features, n_rows, self.in_features)
        self.weight = with_rows(self.weight, new)
        self.bias = with_rows(self.bias, torch.zeros(len(new)))
        self.out_features = n_rows


class CosineHead(nn.Module):
    """Class scores ``scale * cos(x, w)``: neither the norm of a row nor a bias can favour the newest classes.

    The scale is fixed. With a learned one (Hou et al. 2019), each update would grow more confident than the last, and
    its first steps would change old classes most. 14 is sharp enough for a softmax over some hundred classes; with 20
    and 30, a stream of 150 intents was learned less well.

    Args:
        in_features: Size of the features.
        out_features: Number of classes.
        scale: Factor of the cosines. Default: 14.

    >>> head = CosineHead(4, 2)
    >>> features = torch.ones(1, 4)
    >>> torch.allclose(head(features), head(7 * features))
    True
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 14.0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(initial_rows(0, out_features, in_features).to(torch.get_default_dtype()))

    def forward(self, features: Tensor) -> Tensor:
        """Scores [batch, classes] of features [batch, in_features]."""
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))

    def grow(self, n_rows: int) -> None:
        """Append rows until there are ``n_rows``. Call on every rank."""
        self.weight = with_rows(self.weight, initial_rows(self.out_features, n_rows, self.in_features))
        self.out_features = n_rows


class OrdinalHead(nn.Module):
    """Log-probabilities of classes in an order, from one number per text and thresholds between the classes.

    The probability of at most class ``k`` is ``sigmoid(t_k - w x)``: one direction ``w`` for all classes, so that the
    model cannot find the middle class likely and both of its neighbours unlikely (cumulative logits, McCullagh 1980;
    CORAL of Cao, Mirjalili & Raschka 2020 shares ``w`` in the same way). The thresholds ``t_k`` rise by construction,
    and start where all classes are equally likely for ``w x = 0``.

    Args:
        in_features: Size of the features.
        out_features: Number of classes, at least 2.

    >>> head = OrdinalHead(4, 3)
    >>> head(torch.zeros(1, 4)).exp()
    tensor([[0.3333, 0.3333, 0.3333]], grad_fn=<ExpBackward0>)
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(initial_rows(0, 1, in_features).to(torch.get_default_dtype()))
        start = torch.logit(torch.arange(1, out_features) / out_features)
        # The first threshold, and for each of the others the number of whose softplus it lies above the one below it.
        self.steps = nn.Parameter(torch.cat([start[:1], (start.diff() - _LEAST_STEP).expm1().log()]))

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities [batch, classes] of features [batch, in_features], in fp32."""
        steps = self.steps.float()
        thresholds = torch.cat([steps[:1], F.softplus(steps[1:]) + _LEAST_STEP]).cumsum(0)
        below = thresholds - F.linear(features, self.weight).float()  # log-odds of at most each class but the last
        # The probability between two thresholds a < b: sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a-b)).
        between = F.logsigmoid(below[:, 1:]) + F.logsigmoid(-below[:, :-1]) + (-(-thresholds.diff()).expm1()).log()
        return torch.cat([F.logsigmoid(below[:, :1]), between, F.logsigmoid(-below[:, -1:])], 1)


HeadKind = Literal["linear", "cosine"]
HEADS: dict[HeadKind, type[LinearHead] | type[CosineHead]] = {"linear": LinearHead, "cosine": CosineHead}
