"""Why a version answers as it does: the words that count, the nearest examples of the memory, and other versions."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.explain.explainer import Explainer as Explainer
    from evertune.explain.explainer import explain as explain
    from evertune.explain.explanation import Explanation as Explanation

__all__, __getattr__, __dir__ = face(
    __name__, {"evertune.explain.explanation": "Explanation", "evertune.explain.explainer": "Explainer explain"}
)
