"""Where the time of a run goes: its seconds, split into parts that add up to all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

PARTS = ("training", "replay", "importance", "evaluation", "other")
"""The parts, in the order in which they are shown. ``other`` is whatever is not measured as one of the others."""


class Clock:
    """A stopwatch with parts. Time measured inside another measurement counts for the inner part alone.

    Args:
        spent: Seconds by part to continue from. Default: none.

    Example:
        >>> clock = Clock({"training": 3.0, "other": 1.0})
        >>> with clock.measure("evaluation"):
        ...     pass
        >>> list(clock.split), round(clock.total)
        (['training', 'replay', 'importance', 'evaluation', 'other'], 4)
    """

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0) | dict(spent or {})
        self._start = time.perf_counter() - sum(self._spent.values())

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the seconds inside the context for a part; also a decorator."""
        start, before = time.perf_counter(), sum(self._spent.values())
        try:
            yield
        finally:
            inside = sum(self._spent.values()) - before
            self._spent[part] += time.perf_counter() - start - inside

    @property
    def total(self) -> float:
        """Seconds since the clock was made, and those it continued from."""
        return time.perf_counter() - self._start

    @property
    def split(self) -> dict[str, float]:
        """The seconds by part; their sum is :attr:`total`."""
        measured = {part: self._spent[part] for part in PARTS if part != "other"}
        return {**measured, "other": max(0.0, self.total - sum(measured.values()))}


def measured(trainer: Any, part: str) -> AbstractContextManager[None]:
    """Count the seconds inside the context for a part, if the trainer has a clock (``ContinualTrainer``)."""
    clock = getattr(trainer, "clock", None)
    return clock.measure(part) if isinstance(clock, Clock) else nullcontext()
