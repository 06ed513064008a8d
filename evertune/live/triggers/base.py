"""The interface of a trigger, and the situation that it decides on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evertune.gate.predictions import Label, Predictions
    from evertune.registry.version import Version


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The information on which a trigger decides.

    Args:
        records: Reads the pending rows, ``{"id", "origin", "record"}``, which production has not learned, in the order
            in which they arrived.
        n_pending: Number of pending rows.
        n_new: Number of pending rows on which no update has been tried yet.
        production: The version in production; None before the first.
        memory_texts: Reads texts that production has learned.
        last_update: When the last update was tried, whatever its outcome; None before the first.
        now: The present time. This and ``last_update`` must have a time zone.
        text: Name of the field with the text of a record, or several names.
        label: Name of the field with the label; None without labels.
        memory_labels: Reads labels that production has learned.
        waiting: Reads the texts that are waiting for their labels, as rows, in the order in which they arrived.
        held_out: Reads the predictions of production, from before it was published, on the records held out of each
            update.
        predict: Returns the predictions of production on rows, at the cost of loading the model and a pass over the
            rows; None before the first version.
        updates: Reads the time at which each update was tried, and the seconds that its training and evaluation took.
        label_names: Returns the names of the classes in a label; an empty list for a task without classes.

    Raises:
        ValueError: If a time has no time zone.
    """

    records: Callable[[], list[dict[str, Any]]]
    n_pending: int
    n_new: int
    production: Version | None
    memory_texts: Callable[[], list[str]]
    last_update: datetime | None
    now: datetime
    text: str | Sequence[str] = "text"
    label: str | None = "label"
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

    @property
    def nothing_new(self) -> str:
        """Why there is nothing to do when no pending record is new, as a message; whatever the trigger says."""
        if self.n_pending:
            since = "" if self.last_update is None else f", last at {self.last_update:%Y-%m-%d %H:%M} UTC"
            return (
                f"{self.n_pending:,} records are pending, and an update was tried on all of them{since}: "
                "the next one waits for more records, or for other settings"
            )
        texts = len(self.waiting())
        waiting = f"; {texts:,} texts are waiting for their labels" if texts else ""
        if self.production is None:
            return f"nothing to do: no usable record has arrived yet{waiting}"
        return f"nothing to do: version {self.production.number} has learned every record that has arrived{waiting}"


class Trigger(ABC):
    """Decides whether an update is due. A subclass implements :meth:`reason`.

    The decision depends on the situation alone, so that a restarted process decides like the one before it.

    Attributes:
        explanation: What the last :meth:`reason` found, as a message, even if it found no reason.
        readings: What it measured, by name, to be shown as metrics: ``{"drift_score": 0.03}``.
    """

    def __init__(self) -> None:
        self.explanation = ""
        self.readings: dict[str, float] = {}

    @abstractmethod
    def reason(self, situation: Situation) -> str | None:
        """Why an update is due, as a message; None if it is not."""


def positive(name: str, value: int) -> int:
    """Return the value if it is positive.

    Raises:
        ValueError: If it is not.
    """
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return value
