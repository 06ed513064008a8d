"""How well relevant items are ranked: recall, NDCG, reciprocal rank and AUC.

torchmetrics' functions are not used: for recall and reciprocal rank they leave out items with a score of 0 or below,
which a cosine may have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RankingScores(NamedTuple):
    """Scores of queries, each float32 ``[queries]`` in [0, 1].

    Args:
        recall: Share of the relevant items that are among the first ``k``.
        ndcg: Normalised discounted cumulative gain of the first ``k`` (Järvelin & Kekäläinen 2002), for items that are
            relevant or not.
        mrr: 1 / rank of the first relevant item.
        auc: Share of the pairs of a relevant and another item that are in the right order; ties count one half. NaN if
            all items are relevant.
    """

    recall: Tensor
    ndcg: Tensor
    mrr: Tensor
    auc: Tensor


def ranking_scores(scores: Tensor, relevant: Tensor, k: int = 10) -> RankingScores:
    """The scores of each query. Among items with the same score, relevant ones are ranked last.

    Args:
        scores: Score of each item for each query, higher is better: ``[queries, items]``.
        relevant: Which items are relevant, bool ``[queries, items]``.
        k: Number of items that recall and NDCG look at. Default: 10.

    Raises:
        ValueError: If the shapes differ, ``k`` is not positive, or a query has no relevant item.

    Example:
        >>> found = ranking_scores(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[False, True, False]]), k=1)
        >>> [round(value.item(), 2) for value in found]
        [0.0, 0.0, 0.5, 0.5]
    """
    if scores.shape != relevant.shape or scores.ndim != 2:
        raise ValueError(
            f"scores and relevant must both be [queries, items], got {list(scores.shape)}, {list(relevant.shape)}"
        )
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    n_relevant = relevant.sum(1)
    if bool((n_relevant == 0).any()):
        raise ValueError(f"query {int((n_relevant == 0).int().argmax())} has no relevant item: leave such queries out")
    hits = _in_order(scores, relevant, relevant_first=False)
    discounts = 1 / torch.arange(2.0, hits.shape[1] + 2, device=hits.device).log2()
    ideal = discounts.cumsum(0)[n_relevant.clamp(max=k) - 1]
    best_case = _in_order(scores, relevant, relevant_first=True)
    return RankingScores(
        recall=hits[:, :k].sum(1) / n_relevant,
        ndcg=(hits * discounts)[:, :k].sum(1) / ideal,
        mrr=1 / (hits.argmax(1) + 1.0),
        auc=(_auc(hits) + _auc(best_case)) / 2,
    )


def reciprocal_ranks(scores: Tensor) -> Tensor:
    """1 / rank of the first item among all, float32 ``[queries]``; ties count against it.

    Args:
        scores: Scores ``[queries, items]``, that of the relevant item first.

    Example:
        >>> reciprocal_ranks(torch.tensor([[0.5, 0.1, 0.9], [0.5, 0.5, 0.5]]))
        tensor([0.5000, 0.3333])
    """
    return 1 / (1.0 + (scores[:, 1:] >= scores[:, :1]).sum(1))


def _in_order(scores: Tensor, relevant: Tensor, *, relevant_first: bool) -> Tensor:
    """Whether each item is relevant, 0 or 1, from the highest score to the lowest."""
    order = relevant.int().argsort(dim=1, descending=relevant_first, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return relevant.gather(1, order).float()


def _auc(hits: Tensor) -> Tensor:
    """The share of the pairs in the right order, without ties."""
    before = hits.cumsum(1)  # relevant items up to here
    n_relevant = before[:, -1]
    return ((1 - hits) * before).sum(1) / (n_relevant * (hits.shape[1] - n_relevant))
