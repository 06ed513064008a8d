"""Why a version answers as it does: the words that count, the nearest examples of the memory, and other versions."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.explain.explanation import Explanation as Explanation
    from evertune.explain.explanation import explain as explain

__all__, __getattr__, __dir__ = face(__name__, {"evertune.explain.explanation": "Explanation explain"})
