"""Compares two sets of records: whether they differ, since when, and in what."""

from typing import TYPE_CHECKING

from evertune.utils.lazy import face

if TYPE_CHECKING:
    from evertune.drift.comparison.comparing import compare as compare
    from evertune.drift.comparison.comparison import Comparison as Comparison

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "evertune.drift.comparison.comparing": "compare",
        "evertune.drift.comparison.comparison": "Comparison",
    },
)
