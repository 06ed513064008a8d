"""Features of batches that may be bad, in one order over all ranks, without deadlocking a collective."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.examples import count_new
from evertune.drift import Featuriser
from evertune.utils.batches import batch_size_of
from evertune.utils.collectives import gather_bytes

_BAD_INPUT = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)
_MAX_WORDS = 200


@dataclass
class Features:
    """The features of one rank's batch.

    Args:
        values: Features, float32 ``[examples, n_features]``; zero columns if the featuriser failed.
        good: Which examples can be used, bool ``[examples]``.
        problems: Number of unusable examples by error message.
        failure: Exception raised by the featuriser, or None.
    """

    values: Tensor
    good: Tensor
    problems: Counter[str] = field(default_factory=Counter)
    failure: Exception | None = None

    def refuse(self, words: str) -> None:
        """Mark all examples as unusable, with one message."""
        self.problems = Counter({words: len(self.good)})
        self.good = torch.zeros_like(self.good)


@dataclass
class Dealt:
    """The examples of all ranks in one order: round-robin over the ranks.

    Args:
        width: Number of features; 0 if no rank has any.
        good: Which examples can be used, bool ``[longest batch, ranks]``, to be read row by row.
        problems: Number of unusable examples of all ranks by error message.
    """

    width: int
    good: Tensor
    problems: Counter[str]

    @property
    def places(self) -> Tensor:
        """The position of each usable example among all usable ones, ``[longest batch, ranks]``."""
        return self.good.flatten().cumsum(0).reshape(self.good.shape) - 1


def features_of(featuriser: Featuriser, batch: Any, trainer: pl.Trainer, batch_idx: int) -> Features:
    """Compute the features of a batch's new examples. Bad input is reported in the result instead of raised."""
    try:
        with torch.no_grad():
            values = featuriser(batch)
        if not isinstance(values, Tensor) or values.ndim != 2:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"the featuriser must return a tensor [examples, n_features], got {got}")
    except torch.OutOfMemoryError:
        raise
    except _BAD_INPUT as error:
        n = count_new(trainer, _size(batch), batch_idx)
        words = f"{type(error).__name__}: {error}"[:_MAX_WORDS]
        return Features(torch.empty(n, 0), torch.zeros(n).bool(), Counter({words: n}), error)
    values = values[: count_new(trainer, len(values), batch_idx)].float()
    good = values.isfinite().all(1).cpu()
    problems = Counter[str]()
    if not len(values):
        problems["the batch is empty"] = 0
    elif not good.all():
        problems["NaN or infinite features"] = int((~good).sum())
    return Features(values, good, problems)


def deal(mine: Features, width: int | None, setup: bool, trainer: pl.Trainer) -> Dealt:
    """Exchange with the other ranks which examples can be used. Call on every rank.

    Args:
        mine: Features of this rank's batch. They are refused if their number of features differs from ``width``.
        width: Number of features in the experience so far; None before the first usable batch.
        setup: Whether no batch has been featurised yet: a featuriser that then fails on every rank is misconfigured.
        trainer: Trainer that connects the ranks.

    Raises:
        Exception: The featuriser's own exception, on every rank, if it has never succeeded.
    """
    # Every rank takes part in this exchange, whatever happened to its batch. The decisions below use only the gathered
    # numbers, so that all ranks enter the second exchange, or none does.
    summary = [len(mine.good), mine.values.shape[1], len(mine.problems)]
    told = torch.tensor([summary])
    if trainer.world_size > 1:
        everyones = trainer.strategy.all_gather(told.to(trainer.strategy.root_device))
        told = everyones.reshape(trainer.world_size, len(summary)).cpu()
    counts, widths, n_problems = told.unbind(1)
    if setup and mine.failure is not None and not widths.any():
        raise mine.failure
    if not width:
        # The lowest rank with features sets the width, the same choice on every rank.
        width = next((int(one) for one in widths if one), 0)
    if mine.failure is None and mine.values.shape[1] != width:
        mine.refuse(f"the number of features changed from {width} to {mine.values.shape[1]}")
    good = torch.arange(int(counts.max())).unsqueeze(1) < counts
    problems = Counter[str]()
    if n_problems.any() or (widths != width).any():
        bad = (~mine.good).nonzero().flatten().tolist()
        for rank, part in enumerate(gather_bytes(json.dumps([bad, mine.problems]).encode(), trainer)):
            places, words = json.loads(part)
            good[places, rank] = False
            for one, n in words.items():
                problems[one] += n
    return Dealt(width, good, problems)


def gathered(values: Tensor, dealt: Dealt, trainer: pl.Trainer) -> Tensor:
    """The usable examples of all ranks in order, on the CPU: ``[examples, n_features]``. Call on every rank."""
    if trainer.world_size == 1:
        return values.cpu()[dealt.good[:, 0]]
    # all_gather needs the same shape on every rank.
    padded = torch.zeros(len(dealt.good), dealt.width, device=trainer.strategy.root_device)
    if values.shape[1] == dealt.width:
        padded[: len(values)] = values
    return trainer.strategy.all_gather(padded).cpu().transpose(0, 1)[dealt.good]


def _size(batch: Any) -> int:
    """The number of examples in a batch that could not be read, as far as it can be determined; at least 1."""
    try:
        return max(batch_size_of(batch), 1)
    except Exception:  # no tensor in it, or no batch at all
        value = next(iter(batch.values()), None) if isinstance(batch, Mapping) else batch
        return max(len(value), 1) if isinstance(value, list | tuple) else 1
