"""The sensitivity of the output: how much each weight changes what the model answers, right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.importance.fisher import Estimation, Logits, Targets
from evertune.shards.shards import ParameterShards
from evertune.tasks.base import Outputs


def estimate_sensitivity(
    module: pl.LightningModule,
    batches: Iterable[Any],
    shards: ParameterShards,
    *,
    logits: Logits | None = None,
    targets: Targets | None = None,
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """The mean over examples of the magnitude of each example's gradient of the squared norm of its output::

        Omega_i = mean over x of  | d ||F(x)||^2 / d theta_i |

    (Aljundi et al. 2018, "Memory aware synapses: learning what (not) to forget", equation 4.) The output ``F(x)`` is
    the logits of the example; with several positions, the norm is over those that count. No label is used, except to
    know these. The magnitude is taken per example, so the result depends neither on the batch size nor on the number of
    ranks. One backward pass per batch.

    Args:
        module: The model, set up by its strategy.
        batches: Batches, as for :func:`~evertune.importance.estimate_fisher`.
        shards: The weights to estimate for, as this rank holds them.
        logits: Function ``(module, batch) -> tensor [batch, ..., classes]``. By default the module's task finds them.
        targets: Function ``batch -> tensor``, with -100 at positions that do not count. By default the module's task
            finds the targets.
        forward_context: Function that returns the context manager of a forward pass (autocast).

    Returns:
        One flat fp32 tensor per fragment of ``shards.fragments``, the same on all ranks that hold the same weights.

    Raises:
        TypeError: As for :func:`~evertune.importance.estimate_fisher`.
        ValueError: As for :func:`~evertune.importance.estimate_fisher`.

    Example:
        >>> class Model(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Linear(1, 2, bias=False)
        ...         torch.nn.init.constant_(self.weight.weight, 3.0)
        ...     def forward(self, x):
        ...         return self.weight(x)
        >>> from evertune.shards.replicated import ReplicatedShards
        >>> model = Model()
        >>> estimate_sensitivity(model, [(torch.ones(4, 1), torch.zeros(4).long())], ReplicatedShards(model))
        [tensor([6., 6.])]
    """
    run = Estimation(module, shards, "sampled", logits, targets, None, forward_context, power=1)
    return run.mean(batches, _of_squared_norm)


def _of_squared_norm(outputs: Outputs, indices: Sequence[int]) -> list[Tensor]:
    """The gradient of the squared norm of each example's logits; 0 for examples that only pad the batch."""
    logits = outputs.logits.detach()
    counts = outputs.counts if outputs.counts.ndim == logits.ndim else outputs.counts.unsqueeze(-1)
    real = torch.tensor([index >= 0 for index in indices], device=logits.device)
    return [2 * logits * counts * real.view(-1, *[1] * (logits.ndim - 1))]
