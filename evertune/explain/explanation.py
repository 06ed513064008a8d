"""What an explanation says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from evertune.explain.neighbours import Neighbour
from evertune.explain.parts import Part


@dataclass(frozen=True)
class Said:
    """The answer of one version.

    Args:
        version: Its number.
        label: The most probable class.
        probability: Its probability.
        of_label: Probability of the class that is explained; None if the version does not know it.
        experience: Experience that the version had learned last.
    """

    version: int
    label: str
    probability: float
    of_label: float | None
    experience: str | None


@dataclass(frozen=True)
class Explanation:
    """Why a version gives a text a label.

    Args:
        text: The text.
        version: Number of the version.
        label: The label that is explained: the answer, or one that was asked about.
        method: How the effects of the words were found.
        probabilities: Probabilities of the most probable classes.
        parts: The words of the text with their effects, in the order of the text.
        neighbours: The nearest examples of the version's memory; empty if it has none.
        history: The answers of other versions, in their order.
        missing: What was asked for and is not there, each with the reason: no memory, no earlier version.
        pulling: The examples of the memory that pull the label's logit most, up or down.
    """

    text: str
    version: int
    label: str
    method: str
    probabilities: dict[str, float]
    parts: list[Part]
    neighbours: list[Neighbour]
    history: list[Said]
    missing: list[str] = field(default_factory=list)
    pulling: list[Neighbour] = field(default_factory=list)

    @property
    def flips(self) -> list[tuple[Said, Said]]:
        """Pairs of consecutive versions of the history whose answers differ: which update changed the answer."""
        pairs = zip(self.history, self.history[1:], strict=False)
        return [(before, after) for before, after in pairs if before.label != after.label]

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        flips = [[before.version, after.version] for before, after in self.flips]
        return {**asdict(self), "flips": flips}
