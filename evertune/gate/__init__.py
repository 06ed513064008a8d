"""Decides whether a new version may replace the one in production, by paired tests in plain numpy."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.gate.gate import Gate as Gate
    from evertune.gate.verdict import Check as Check
    from evertune.gate.verdict import Verdict as Verdict

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.gate.gate": "Gate",
        "evertune.gate.verdict": "Check Verdict",
    },
)
