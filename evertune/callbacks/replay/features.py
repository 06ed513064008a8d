"""The features of examples by which a memory chooses: the default, an early check, and one pass of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.shards.opened import shards_of
from evertune.shards.support import is_deepspeed
from evertune.tasks.base import losses, task_of
from evertune.utils.batches import logits_of, to_device
from evertune.utils.evaluation import evaluation_mode, trial

Features: TypeAlias = Callable[[pl.LightningModule, Any], Tensor]
"""A function ``(module, batch) -> tensor [batch, d]``."""


def default_features(module: pl.LightningModule, batch: Any) -> Tensor:
    """``module.features(batch)`` if the module has such a method, else its logits."""
    features = getattr(module, "features", None)
    return features(batch) if callable(features) else logits_of(module, batch)


def default_losses(module: pl.LightningModule, batch: Any) -> Tensor:
    """The loss of each example, ``[batch, 1]``, of the logits and targets that the module's task finds."""
    return losses(task_of(module).outputs(module, batch)).unsqueeze(1)


def check_features(trainer: pl.Trainer, module: pl.LightningModule, features: Features, batches: Iterable[Any]) -> None:
    """Compute the features of some batches, before hours are spent on training. Call on every rank.

    Raises:
        ValueError: If they cannot be computed, or are not vectors of one length.
    """
    advice = "pass features=, a callable (module, batch) -> tensor [batch, d]"
    what = f"Replay cannot compare examples by the features of {type(module).__name__}"
    with trial(what, advice), evaluation_mode(module), trainer.precision_plugin.val_step_context():
        shapes = [list(features(module, batch).shape) for batch in batches]
        if bad := next((shape for shape in shapes if len(shape) != 2), None):
            raise ValueError(f"features must have the shape [batch, d], got {bad}")
        if len(widths := {width for _, width in shapes}) > 1:
            raise ValueError(f"features must have one length for all examples, got {sorted(widths)}")
    if is_deepspeed(trainer):
        shards_of(trainer).release()


def features_of(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    features: Features,
    dataset: Any,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
) -> Tensor:
    """One feature vector per example ``[examples, d]``, computed by all ranks together."""
    rank, world, total = trainer.global_rank, trainer.world_size, len(dataset)
    # Equally many examples on every rank (the last one repeated), since forward passes and all_gather must match;
    # the surplus rows are cut off at the end.
    mine = np.minimum(np.arange(rank, -(-total // world) * world, world), total - 1)
    chunks = []
    with evaluation_mode(module):
        for start in range(0, len(mine), batch_size):
            batch = collate([dataset[index] for index in mine[start : start + batch_size].tolist()])
            batch = to_device(trainer, batch)
            with trainer.precision_plugin.val_step_context():
                chunks.append(features(module, batch).detach().float().flatten(1))
    vectors = torch.cat(chunks)
    everyone = trainer.strategy.all_gather(vectors).reshape(world, *vectors.shape)
    return everyone.transpose(0, 1).reshape(-1, vectors.shape[1])[:total].cpu()
