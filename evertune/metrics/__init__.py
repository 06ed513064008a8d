"""Metrics: functions of the accuracy matrix, torchmetrics classes, the history of a run; scores of extracts."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.metrics.answers import answer_f1 as answer_f1
    from evertune.metrics.answers import exact_match as exact_match
    from evertune.metrics.answers import normalise_answer as normalise_answer
    from evertune.metrics.entities import Entity as Entity
    from evertune.metrics.entities import EntityScores as EntityScores
    from evertune.metrics.entities import check_tags as check_tags
    from evertune.metrics.entities import entities_in as entities_in
    from evertune.metrics.entities import entity_scores as entity_scores
    from evertune.metrics.entities import sentence_f1 as sentence_f1
    from evertune.metrics.functional import average_accuracy as average_accuracy
    from evertune.metrics.functional import backward_transfer as backward_transfer
    from evertune.metrics.functional import forgetting as forgetting
    from evertune.metrics.functional import forgetting_first_minus_last as forgetting_first_minus_last
    from evertune.metrics.functional import forward_transfer as forward_transfer
    from evertune.metrics.functional import intransigence as intransigence
    from evertune.metrics.functional import negative_flip_rate as negative_flip_rate
    from evertune.metrics.history import History as History
    from evertune.metrics.history import load_history as load_history
    from evertune.metrics.history import save_history as save_history
    from evertune.metrics.modules import AccuracyMatrix as AccuracyMatrix
    from evertune.metrics.modules import AverageAccuracy as AverageAccuracy
    from evertune.metrics.modules import BackwardTransfer as BackwardTransfer
    from evertune.metrics.modules import Forgetting as Forgetting
    from evertune.metrics.modules import ForgettingFirstMinusLast as ForgettingFirstMinusLast
    from evertune.metrics.modules import ForwardTransfer as ForwardTransfer
    from evertune.metrics.modules import Intransigence as Intransigence
    from evertune.metrics.modules import NegativeFlipRate as NegativeFlipRate
    from evertune.metrics.modules import Perplexity as Perplexity
    from evertune.metrics.ranking import RankingScores as RankingScores
    from evertune.metrics.ranking import ranking_scores as ranking_scores
    from evertune.metrics.ranking import reciprocal_ranks as reciprocal_ranks
    from evertune.metrics.relations import RelationCounts as RelationCounts
    from evertune.metrics.relations import relation_counts as relation_counts
    from evertune.metrics.relations import relation_f1 as relation_f1
    from evertune.metrics.texts import chrf as chrf
    from evertune.metrics.texts import corpus_scores as corpus_scores
    from evertune.metrics.texts import rouge_l as rouge_l

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.metrics.answers": "answer_f1 exact_match normalise_answer",
        "evertune.metrics.entities": "Entity EntityScores check_tags entities_in entity_scores sentence_f1",
        "evertune.metrics.functional": (
            "average_accuracy backward_transfer forgetting forgetting_first_minus_last forward_transfer "
            "intransigence negative_flip_rate"
        ),
        "evertune.metrics.history": "History load_history save_history",
        "evertune.metrics.modules": (
            "AccuracyMatrix AverageAccuracy BackwardTransfer Forgetting ForgettingFirstMinusLast "
            "ForwardTransfer Intransigence NegativeFlipRate Perplexity"
        ),
        "evertune.metrics.ranking": "RankingScores ranking_scores reciprocal_ranks",
        "evertune.metrics.relations": "RelationCounts relation_counts relation_f1",
        "evertune.metrics.texts": "chrf corpus_scores rouge_l",
    },
)
