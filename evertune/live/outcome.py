"""The outcome of an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evertune.gate.verdict import Verdict

Status = Literal["promoted", "nothing", "refused", "stopped", "trained"]
EXIT_CODES: Mapping[Status, int] = {"promoted": 0, "nothing": 3, "refused": 4, "stopped": 5, "trained": 0}
"""The exit codes of ``evertune update``; "trained" is the status of the ranks that only take part in training."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of an update.

    Args:
        status: ``"promoted"``; ``"nothing"`` to do; ``"refused"`` by the gate after training; or ``"stopped"`` by the
            checks of the data before training.
        words: The reason, as a message for people.
        version: Number of the version that was made, whether promoted or refused; None if none was.
        verdict: Verdict of the gate with every check; None if nothing was judged.
        seconds: Seconds that each stage took, by its name; and the same time by what it was spent on, see
            :attr:`~evertune.registry.Manifest.seconds`.
        untrained: What no training would give beside this version, as a message for people; empty if not measured.
        student: What became of the student of the version in production, where students follow and one was due.
    """

    status: Status
    words: str
    version: int | None = None
    verdict: Verdict | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    untrained: str = ""
    student: Outcome | None = None

    @property
    def code(self) -> int:
        """The exit code of ``evertune update``: 0 promoted, 3 nothing to do, 4 refused, 5 stopped before training.

        Of an update that was promoted, or that had nothing to do, it is the code of its student.
        """
        if self.student is not None and self.status in ("promoted", "nothing"):
            return self.student.code
        return EXIT_CODES[self.status]


def reasons_of(verdict: Verdict) -> str:
    """The message of a verdict without the decision itself."""
    return verdict.words().partition(": ")[2]
