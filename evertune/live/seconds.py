"""The seconds of an update: of each stage, and of what they were spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from evertune.utils.clock import PARTS

TO_BE_PAID = ("train", "evaluate")
"""The stages whose seconds count as the cost of an update."""
_STAGES = ("plan", "train", "evaluate")
"""The stages whose seconds a version records."""


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Write down how long a stage takes, also if it fails."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - start


def with_breakdown(seconds: Mapping[str, float]) -> dict[str, float]:
    """The seconds of an update's stages, and the same time by what it was spent on.

    Args:
        seconds: The seconds of each stage, and those of the fit by what they were spent on.
    """
    spent = {part: seconds.get(part, 0.0) for part in PARTS}
    spent["evaluation"] += seconds.get("evaluate", 0.0)
    spent["other"] = max(0.0, sum(seconds.get(stage, 0.0) for stage in _STAGES) - sum(spent.values()))
    return {**seconds, **spent}
