"""How much each weight matters: estimators of the Fisher information, per example and under any strategy."""

from evertune.importance.fisher import Estimator, IndexedBatch, estimate_fisher

__all__ = ["Estimator", "IndexedBatch", "estimate_fisher"]
