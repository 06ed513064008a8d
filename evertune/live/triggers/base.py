"""What a trigger is, and what it decides on."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evertune.gate.predictions import Label, Predictions
    from evertune.registry.registry import Version

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a trigger decides on.

    Args:
        records: reads the pending rows, ``{"id", "origin", "record"}``, in the order in which they arrived: those that
            production has not learned.
        n_pending: how many they are.
        n_new: how many of them no update has been tried on yet.
        production: the version in production; None before the first.
        memory_texts: reads texts of what production has learned.
        last_update: when the last update was tried, whatever became of it; None before the first.
        now: the present moment. Both moments have a time zone.
        text: the field of a record that holds its text, or several.
        label: the field that holds its label.
        memory_labels: reads labels of what production has learned.
        waiting: reads the texts that wait for their labels, as rows, in the order in which they arrived.
        held_out: reads what production said, before it was published, about the records held out of each update.
        predict: what production says about rows; costs a pass over them, and the loading of the model.
        updates: reads when each update was tried, and the seconds that its training and evaluation took.
        label_names: gives the names of the classes in a label; none for a task without classes.

    Raises:
        ValueError: for a moment without a time zone.
    """

    records: Callable[[], list[dict[str, Any]]]
    n_pending: int
    n_new: int
    production: Version | None
    memory_texts: Callable[[], list[str]]
    last_update: datetime | None
    now: datetime
    text: str | Sequence[str] = "text"
    label: str = "label"
    memory_labels: Callable[[], list[Label]] = list
    waiting: Callable[[], list[dict[str, Any]]] = list
    held_out: Callable[[], Mapping[str, Predictions]] = dict
    predict: Callable[[list[dict[str, Any]]], Predictions] | None = None
    updates: Callable[[], list[tuple[datetime, float]]] = list
    label_names: Callable[[Any], list[str]] = lambda label: [label] if isinstance(label, str) else list(label)

    def __post_init__(self) -> None:
        for name, moment in (("now", self.now), ("last_update", self.last_update)):
            if moment is not None and moment.tzinfo is None:
                raise ValueError(f"{name} must have a time zone, got {moment.isoformat()}")


class Trigger(ABC):
    """Decides whether an update is due. A subclass writes :meth:`reason`.

    What it decides depends on the situation alone: a restarted process decides as the one before it.

    Attributes:
        explanation: what the last :meth:`reason` found, in words, also where it found no reason.
        readings: what it measured, by name, to be shown as metrics: ``{"drift_score": 0.03}``.
    """

    def __init__(self) -> None:
        self.explanation = ""
        self.readings: dict[str, float] = {}

    @abstractmethod
    def reason(self, situation: Situation) -> str | None:
        """Why an update is due, in words, or None."""


def duration(name: str, period: str) -> timedelta:
    """The length of a period: a number and a unit, as ``"90s"``, ``"30m"``, ``"12h"``, ``"1d"``, ``"2w"``.

    Raises:
        ValueError: for a period that cannot be read or is not positive; ``name`` is that of the argument.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", period.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"{name} must be a number and a unit (s, m, h, d, w), such as '12h', got {period!r}")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


def positive(name: str, value: int) -> int:
    """The value, if it is positive.

    Raises:
        ValueError: when it is not.
    """
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return value
