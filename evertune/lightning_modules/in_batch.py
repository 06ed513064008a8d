"""The loss with in-batch negatives: the items of all other queries of a step, on all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def in_batch_loss(
    queries: Tensor,
    items: Tensor,
    own: Tensor,
    query_keys: Tensor,
    item_keys: Tensor,
    asked_keys: Tensor,
    temperature: float,
) -> Tensor:
    """The mean cross-entropy of each query's positive among all items (InfoNCE, van den Oord et al. 2018).

    Left out of a query's negatives is what is right for it: copies of its positive, and positives of the same query.

    Args:
        queries: Unit vectors ``[queries, features]``.
        items: Unit vectors ``[items, features]``.
        own: Place of each query's positive among the items, int64 ``[queries]``.
        query_keys: What identifies the text of each query, int64 ``[queries]``.
        item_keys: What identifies the text of each item, int64 ``[items]``.
        asked_keys: The key of the query that an item is a positive of, int64 ``[items]``; 0 for a negative.
        temperature: Divisor of the cosines.

    Example:
        >>> vectors, keys = torch.eye(2), torch.tensor([5, 6])
        >>> in_batch_loss(vectors, vectors, torch.arange(2), keys, keys, keys, temperature=1.0)
        tensor(0.3133)
        >>> same = torch.tensor([5, 5])  # two copies of one positive are not each other's negatives
        >>> in_batch_loss(vectors, vectors, torch.arange(2), keys, same, keys, temperature=1.0)
        tensor(0.)
    """
    with torch.autocast(queries.device.type, enabled=False):  # cosines in bf16 have three digits
        logits = queries @ items.T / temperature
    right = (item_keys[own][:, None] == item_keys) | (query_keys[:, None] == asked_keys)
    right[torch.arange(len(own), device=own.device), own] = False
    return F.cross_entropy(logits.masked_fill(right, -torch.inf), own)


def keys_of(tokens: dict[str, Tensor]) -> Tensor:
    """A number for each text that two texts share only if their tokens are the same, int64 ``[texts]``.

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 0], [5, 6, 7], [5, 6, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]])
        >>> first, second, third = keys_of({"input_ids": ids, "attention_mask": mask}).tolist()
        >>> first == third, first == second
        (True, False)
    """
    ids = (tokens["input_ids"] + 1) * tokens["attention_mask"]
    # A random sum modulo 2^64 depends neither on padding nor on the rank; two texts collide once in 2^60 or so.
    limits = torch.iinfo(torch.int64)
    weights = torch.empty(ids.shape[1], dtype=torch.int64)
    weights.random_(limits.min, limits.max, generator=torch.Generator().manual_seed(0))
    return (ids * weights.to(ids.device)).sum(1)


def of_all_ranks(rows: Tensor, trainer: Any) -> tuple[Tensor, int]:
    """The rows of all ranks, in the order of ranks, and the place of this rank's first. Call on every rank.

    Gradients flow back to the rank that the rows are from. Ranks may have different numbers of rows.
    """
    if trainer is None or trainer.world_size == 1:
        return rows, 0
    gather = trainer.strategy.all_gather
    counts = gather(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows)))
    everyones = gather(padded, sync_grads=rows.requires_grad)
    parts = [one[:count] for one, count in zip(everyones, counts, strict=True)]
    return torch.cat(parts), sum(counts[: trainer.global_rank])
