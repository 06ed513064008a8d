"""torchmetrics classes over the accuracy matrix, accumulated over batches and ranks.

Each class fills the same matrix and computes one function of it, so a ``MetricCollection`` keeps only one copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from evertune.metrics import functional
from evertune.metrics.functional import VectorLike


class AccuracyMatrix(Metric):
    """The accuracy matrix ``a[t, k]``, accumulated over batches and ranks.

    ``update`` takes the score of each example; ``compute`` returns the mean score of each cell [updates so far,
    experiences], NaN where nothing was evaluated.

    Example:
        >>> matrix = AccuracyMatrix(n_experiences=2)
        >>> matrix.update(torch.tensor([True, True]), update=0, experience=0)
        >>> matrix.update(torch.tensor([True, False]), update=1, experience=0)
        >>> matrix.update(torch.tensor([True, True]), update=1, experience=1)
        >>> matrix.compute()
        tensor([[1.0000,    nan],
                [0.5000, 1.0000]])

    Args:
        n_experiences: Number of columns of the matrix.
        n_updates: Number of rows of the matrix. By default one per experience.
        kwargs: Arguments of ``torchmetrics.Metric`` (such as ``dist_sync_on_step``).

    Raises:
        ValueError: If a number is not positive. In ``update``, if an index is out of range or a score is not in [0, 1].
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better: bool | None = None

    total: Tensor
    count: Tensor

    def __init__(self, n_experiences: int, n_updates: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_experiences = n_experiences
        self.n_updates = n_experiences if n_updates is None else n_updates
        for name in ("n_experiences", "n_updates"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        shape = (self.n_updates, self.n_experiences)
        self.add_state("total", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, update: int, experience: int) -> None:
        """Add examples of one experience, evaluated after one update.

        Args:
            scores: Score of each example in [0, 1], or whether it is correct [batch].
            update: Row: the number of updates before this one.
            experience: Column: the number of experiences before this one.
        """
        for name, index, size in (
            ("update", update, self.n_updates),
            ("experience", experience, self.n_experiences),
        ):
            if not 0 <= index < size:
                raise ValueError(f"{name} must be between 0 and {size - 1}, got {index}")
        scores = scores.detach().to(self.total.dtype)
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(f"scores must be in [0, 1], got {scores.min().item():g} to {scores.max().item():g}")
        self.total[update, experience] += scores.sum()
        self.count[update, experience] += scores.numel()

    def matrix(self) -> Tensor:
        """The mean score of each cell, up to the last evaluated row [updates so far, experiences]."""
        rows = self.count.sum(1).nonzero()
        done = int(rows.max()) + 1 if len(rows) else 0
        return (self.total / self.count)[:done]

    def compute(self) -> Tensor:
        """The metric; for this class, the matrix itself."""
        return self.matrix()

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device)


class AverageAccuracy(AccuracyMatrix):
    """``average_accuracy`` of the matrix; see ``AccuracyMatrix`` for its arguments.

    Example:
        >>> metric = AverageAccuracy(n_experiences=2)
        >>> metric.update(torch.tensor([1.0, 0.5]), update=0, experience=0)
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The mean of the last row."""
        return self._scalar(functional.average_accuracy(self.matrix()))


class Forgetting(AccuracyMatrix):
    """``forgetting`` of the matrix (Chaudhry's maximum); see ``AccuracyMatrix`` for its arguments."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The best earlier score minus the last one."""
        return self._scalar(functional.forgetting(self.matrix()))


class ForgettingFirstMinusLast(AccuracyMatrix):
    """``forgetting_first_minus_last`` of the matrix; see ``AccuracyMatrix`` for its arguments."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The score when first learned minus the last one."""
        return self._scalar(functional.forgetting_first_minus_last(self.matrix()))


class BackwardTransfer(AccuracyMatrix):
    """``backward_transfer`` of the matrix; see ``AccuracyMatrix`` for its arguments."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The last score minus the one when first learned."""
        return self._scalar(functional.backward_transfer(self.matrix()))


class ForwardTransfer(AccuracyMatrix):
    """``forward_transfer`` of the matrix over a baseline; see ``AccuracyMatrix`` for the other arguments.

    Args:
        baseline: Score of the untrained model on each experience [experiences].
        n_updates: Number of rows of the matrix. By default one per experience.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    higher_is_better = True

    def __init__(self, baseline: VectorLike, n_updates: int | None = None, **kwargs: Any) -> None:
        super().__init__(len(baseline), n_updates, **kwargs)
        self.baseline = baseline

    def compute(self) -> Tensor:
        """The score before an experience is learned minus the untrained model's."""
        return self._scalar(functional.forward_transfer(self.matrix(), self.baseline))


class Intransigence(AccuracyMatrix):
    """``intransigence`` of the matrix against joint training; see ``AccuracyMatrix`` for the other arguments.

    Args:
        joint: Score on experience ``k`` of a model trained on experiences 0..k at once [experiences].
        n_updates: Number of rows of the matrix. By default one per experience.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(self, joint: VectorLike, n_updates: int | None = None, **kwargs: Any) -> None:
        super().__init__(len(joint), n_updates, **kwargs)
        self.joint = joint

    def compute(self) -> Tensor:
        """The joint model's score minus the one when first learned."""
        return self._scalar(functional.intransigence(self.matrix(), self.joint))


class NegativeFlipRate(Metric):
    """``negative_flip_rate`` between two versions, accumulated over batches and ranks.

    Example:
        >>> metric = NegativeFlipRate()
        >>> metric.update(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
        >>> metric.compute()
        tensor(0.2500)

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False

    flips: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("flips", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, old_correct: Tensor, new_correct: Tensor) -> None:
        """Add examples: whether the old and the new version are correct on each [batch]."""
        flips, total = functional.count_negative_flips(old_correct, new_correct)
        self.flips += flips
        self.total += total

    def compute(self) -> Tensor:
        """The flips as a share of all examples."""
        return self.flips / self.total


class Perplexity(Metric):
    """The perplexity of all texts together, accumulated over batches and ranks: ``exp`` of the mean loss of a token.

    Example:
        >>> perplexity = Perplexity()
        >>> perplexity.update(torch.tensor([2.0, 4.0]), torch.tensor([1, 2]))
        >>> perplexity.compute()
        tensor(7.3891, dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False

    loss: Tensor
    n_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, losses: Tensor, n_tokens: Tensor) -> None:
        """Add texts.

        Args:
            losses: Negative log-likelihood of each text, ``[texts]``.
            n_tokens: Number of its tokens, ``[texts]``.
        """
        self.loss += losses.double().sum()
        self.n_tokens += n_tokens.sum()

    def compute(self) -> Tensor:
        """The perplexity; NaN without texts."""
        return (self.loss / self.n_tokens).exp()
