"""Recall, NDCG, reciprocal rank and AUC against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score, roc_auc_score

from evertune.metrics.ranking import ranking_scores, reciprocal_ranks


def random_queries(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores below and above 0, and one to three relevant items per query."""
    draw = np.random.default_rng(seed)
    relevant = np.zeros((50, 20), bool)
    for row in relevant:
        row[draw.choice(20, draw.integers(1, 4), replace=False)] = True
    return torch.from_numpy(draw.normal(size=(50, 20)).astype(np.float32)), torch.from_numpy(relevant)


@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_ndcg_and_auc_are_those_of_scikit_learn(k: int) -> None:
    scores, relevant = random_queries(k)
    found = ranking_scores(scores, relevant, k)
    for row in range(len(scores)):
        truth, given = relevant[row].int().numpy(), scores[row].numpy()
        assert found.ndcg[row].item() == pytest.approx(ndcg_score([truth], [given], k=k), abs=1e-6)
        assert found.auc[row].item() == pytest.approx(roc_auc_score(truth, given), abs=1e-6)


def test_recall_and_reciprocal_rank_follow_their_definitions() -> None:
    scores, relevant = random_queries(0)
    found = ranking_scores(scores, relevant, k=5)
    for row in range(len(scores)):
        order = sorted(range(20), key=lambda item: -scores[row, item])
        ranks = [rank for rank, item in enumerate(order, 1) if relevant[row, item]]
        assert found.mrr[row].item() == pytest.approx(1 / ranks[0])
        assert found.recall[row].item() == pytest.approx(sum(rank <= 5 for rank in ranks) / len(ranks))


def test_ties_count_against_the_relevant_item_and_half_in_auc() -> None:
    scores, relevant = torch.zeros(1, 4), torch.tensor([[True, False, False, False]])
    found = ranking_scores(scores, relevant, k=3)
    assert (found.recall.item(), found.ndcg.item(), found.mrr.item()) == (0.0, 0.0, 0.25)
    assert found.auc.item() == roc_auc_score([1, 0, 0, 0], [0, 0, 0, 0]) == 0.5
    assert reciprocal_ranks(scores).item() == 0.25
    assert ranking_scores(scores, relevant, k=4).ndcg.item() == pytest.approx(1 / math.log2(5))


@pytest.mark.parametrize(
    ("scores", "relevant", "k", "message"),
    [
        ((2, 3), (2, 4), 1, r"must both be \[queries, items\], got \[2, 3\], \[2, 4\]"),
        ((2, 3), (2, 3), 0, "k must be positive, got 0"),
    ],
)
def test_shapes_and_k_are_checked(scores: tuple[int], relevant: tuple[int], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranking_scores(torch.zeros(scores), torch.ones(relevant, dtype=torch.bool), k)


def test_a_query_without_relevant_items_is_refused() -> None:
    with pytest.raises(ValueError, match="query 1 has no relevant item"):
        ranking_scores(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
