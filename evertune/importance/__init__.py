"""Importance of each weight: estimators of the Fisher information, per example and under any strategy."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.importance.fisher import Estimator as Estimator
    from evertune.importance.fisher import IndexedBatch as IndexedBatch
    from evertune.importance.fisher import estimate_fisher as estimate_fisher
    from evertune.importance.moments import second_moment as second_moment
    from evertune.importance.sensitivity import estimate_sensitivity as estimate_sensitivity

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.importance.fisher": "Estimator IndexedBatch estimate_fisher",
        "evertune.importance.moments": "second_moment",
        "evertune.importance.sensitivity": "estimate_sensitivity",
    },
)
