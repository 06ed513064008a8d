"""The parts of a text, and how much each counts."""

from __future__ import annotations

from dataclasses import dataclass

from evertune.drift.scripts import places_of

MOST_PARTS = 200
"""Most parts of a text; those of a longer text are of several words each."""


@dataclass(frozen=True)
class Part:
    """A part of a text.

    Args:
        start: First character.
        end: Character after the last.
        text: The part.
        effect: How much it speaks for the label, or if negative against it: by occlusion the probability minus that
            without the part, by integrated gradients its share of the logit.
    """

    start: int
    end: int
    text: str
    effect: float


def parts_of(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end; of a long one, groups of words.

    Example:
        >>> parts_of("a good day"), len(parts_of("word " * 1_000))
        ([(0, 1), (2, 6), (7, 10)], 200)
    """
    words = places_of(text)
    size = max(1, -(-len(words) // MOST_PARTS))
    return [(words[i][0], words[i : i + size][-1][1]) for i in range(0, len(words), size)]
