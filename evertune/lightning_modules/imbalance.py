"""Losses for classes of very different sizes: focal loss, and weights of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["cross_entropy", "focal"]
ClassWeights = Literal["balanced"] | Mapping[str, float]


def check_imbalance(loss: Any, focal_gamma: float, class_weights: Any) -> None:
    """Refuse settings that are out of range.

    Raises:
        ValueError: If they are.
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss must be one of {list(get_args(Loss))}, got {loss!r}")
    if not 0 < focal_gamma < math.inf:
        raise ValueError(f"focal_gamma must be positive and finite, got {focal_gamma}; 0 is loss='cross_entropy'")
    if class_weights is None or class_weights == "balanced":
        return
    if not isinstance(class_weights, Mapping):
        raise ValueError(
            f"class_weights must be 'balanced', a mapping of names to weights, or None; got {class_weights!r}"
        )
    for name, weight in class_weights.items():
        if not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise ValueError(f"class_weights: the weight of {name!r} must be a positive number, got {weight!r}")


def balanced_weights(shares: Tensor, multi_label: bool = False) -> Tensor:
    """The weights with which all classes count alike, float64 ``[classes]``; 1 for a class without examples.

    With one label per example, ``1 / (n * share)`` for ``n`` classes with examples, so that the mean weight of an
    example is 1. With several, ``(1 - share) / share``, the odds of not having the label.

    Args:
        shares: Share of the examples that have each class, ``[classes]``.
        multi_label: Whether an example has any number of labels. Default: False.

    Example:
        >>> balanced_weights(torch.tensor([0.75, 0.25, 0.0])), balanced_weights(torch.tensor([0.2]), multi_label=True)
        (tensor([0.6667, 2.0000, 1.0000]), tensor([4.]))
    """
    weights = (1 - shares) / shares if multi_label else 1 / (shares * (shares > 0).sum())
    return torch.where((shares > 0) & (weights > 0), weights, 1.0)


def weighted_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each example in fp32, ``[batch]``: ``weight * (1 - p) ** gamma * cross-entropy``.

    ``p`` is the probability of the label. ``gamma`` above 0 is focal loss (Lin et al. 2017, "Focal Loss for Dense
    Object Detection"): examples that the model is sure of count less. A mean of these losses depends neither on the
    batch size nor on the number of ranks, which one divided by the sum of a batch's weights would.

    Args:
        logits: Logits ``[batch, classes]``.
        targets: Class numbers ``[batch]``; or 0 and 1 ``[batch, classes]``, for which the loss is the mean over the
            classes of binary ones, and a weight counts only where the label is 1.
        weights: Weight of each class, ``[classes]``. Default: None, all 1.
        gamma: Exponent of focal loss. Default: 0, none.
        label_smoothing: Share of the target that is spread over all classes. Default: 0.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> weighted_losses(logits, torch.tensor([0, 0]), weights=torch.tensor([3.0, 1.0]), gamma=2.0)
        tensor([0.0054, 4.9502])
    """
    logits = logits.float()
    if targets.ndim == 1:
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        log_p = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        losses = losses if weights is None else weights[targets] * losses
    else:
        smooth = targets.float() * (1 - label_smoothing) + label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none", pos_weight=weights)
        log_p = F.logsigmoid(torch.where(targets > 0, logits, -logits))
    if gamma:
        # The floor keeps the gradient finite where the model is certain and gamma is below 1.
        losses = (-log_p.expm1()).clamp(min=1e-6) ** gamma * losses
    return losses if targets.ndim == 1 else losses.mean(1)
