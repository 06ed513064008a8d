"""Labels that arrive later than their texts, or earlier: each waits for the other, within a window."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from evertune.sources.schema import time_value

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*")


@dataclass(frozen=True, slots=True)
class Half:
    """A text that lacks its label, or a label that lacks its text.

    Args:
        id: what the two have in common.
        origin: where it came from.
        value: its fields, JSON values.
        has_text: whether it is the text.
        since: where the stream stood when it began to wait; None when no record had told a time yet.
    """

    id: str
    origin: str
    value: dict[str, Any]
    has_text: bool
    since: float | None = None


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A half that waits no longer though the other has not come.

    Args:
        half: what is given up.
        reason: why, in words.
        superseded: whether something newer with the same id took its place.
    """

    half: Half
    reason: str
    superseded: bool = False


class LabelJoin:
    """Joins records that arrive without a label with labels that arrive apart, by their id.

    A text waits for its label, and a label for its text. Of two texts, or two labels, that wait under one id, the newer
    counts. A record that arrives whole waits for nothing, and takes the place of what waits under its id. A label for a
    record that has already been completed waits too: it finds a text only if that is sent again.

    How long is measured on the stream, never by a clock: in records, or on the newest time that a record has told.
    Reading the same again, sooner or later, gives the same pairs.

    Args:
        id: the field that text and label have in common.
        label: the field with the label.
        window: how long one half waits for the other: a number of records, or a duration on the ``time`` field, as
            ``"12h"`` or ``"7d"`` (units s, m, h, d, w). The default is for people who label within the week.
        time: the field that says when a record is from; a duration needs it.
        max_waiting: how many halves may wait; when there are more, the oldest is given up. They are kept in memory, and
            written with every segment of the journal.

    Raises:
        ValueError: for a window that is neither, a duration without ``time``, or a number below 1.

    Example:
        >>> join = LabelJoin(window=100)
        >>> join.add(Half("t-1", "tickets:1", {"id": "t-1", "text": "Charged twice"}, has_text=True))
        >>> text, label = join.add(Half("t-1", "labels:7", {"id": "t-1", "label": "billing"}, has_text=False))
        >>> text.value["text"], label.value["label"]
        ('Charged twice', 'billing')
    """

    def __init__(
        self,
        id: str = "id",
        label: str = "label",
        window: int | str = "7d",
        time: str | None = None,
        max_waiting: int = 100_000,
    ) -> None:
        self.id, self.label, self.window, self.time, self.max_waiting = id, label, window, time, max_waiting
        self._span: float
        if isinstance(window, str):
            duration = _DURATION.fullmatch(window)
            if duration is None:
                raise ValueError(f'window is a number of records or a duration such as "12h" or "7d", got {window!r}')
            if time is None:
                raise ValueError(
                    f"a window of {window} needs time=, the field with the record's time; or count records"
                )
            self._span = float(duration[1]) * _UNITS[duration[2]]
        else:
            self._span = window
        if self._span <= 0 or max_waiting < 1:
            raise ValueError(f"window and max_waiting must be positive, got {window!r} and {max_waiting}")
        self._in_records = not isinstance(window, str)
        self._waiting: OrderedDict[str, Half] = OrderedDict()
        self._given_up: list[GivenUp] = []
        self._position: float | None = None

    def add(self, half: Half) -> tuple[Half, Half] | None:
        """Take one half.

        Returns:
            The text and the label when this makes them complete.

        Raises:
            ValueError: when its time cannot be read.
        """
        self._advance(half.value)
        other = self._waiting.pop(half.id, None)
        if other is not None and other.has_text is not half.has_text:
            return (half, other) if half.has_text else (other, half)
        if other is not None:
            self._given_up.append(GivenUp(other, f"superseded by {half.origin}", superseded=True))
        self._waiting[half.id] = replace(half, since=self._position)
        if len(self._waiting) > self.max_waiting:
            oldest = self._waiting.popitem(last=False)[1]
            self._give_up(oldest, f"while max_waiting={self.max_waiting} newer ones wait")
        return None

    def passed(self, id: str, origin: str, value: Mapping[str, Any]) -> None:
        """Note a record that arrived whole.

        Raises:
            ValueError: when its time cannot be read.
        """
        self._advance(value)
        other = self._waiting.pop(id, None)
        if other is not None:
            self._given_up.append(GivenUp(other, f"superseded by {origin}", superseded=True))

    def given_up(self) -> list[GivenUp]:
        """What has been given up since this was last asked."""
        given_up, self._given_up = self._given_up, []
        return given_up

    @property
    def waiting(self) -> list[dict[str, Any]]:
        """The halves that wait, as JSON values, oldest first."""
        return [
            {"id": half.id, "origin": half.origin, "value": half.value, "has_text": half.has_text, "since": half.since}
            for half in self._waiting.values()
        ]

    @property
    def clock(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        return {"in_records": self._in_records, "position": self._position}

    def restore(self, waiting: Sequence[Mapping[str, Any]], clock: Mapping[str, Any] | None) -> None:
        """Go on from :attr:`waiting` and :attr:`clock`. Under another kind of window the wait starts anew."""
        self._given_up = []
        same = clock is not None and clock["in_records"] == self._in_records
        self._position = clock["position"] if clock is not None and same else None
        halves = [Half(**half) for half in waiting]
        self._waiting = OrderedDict((half.id, half if same else replace(half, since=None)) for half in halves)

    def _advance(self, value: Mapping[str, Any]) -> None:
        """Move the stream's clock on by one record, and give up those whose time is over."""
        before = self._position
        if self._in_records:
            self._position = (before or 0) + 1
        elif self.time is not None and value.get(self.time) is not None:
            try:
                told = datetime.fromisoformat(time_value(value[self.time])).timestamp()
            except ValueError as error:
                raise ValueError(f"field {self.time!r}: {error}") from None
            self._position = told if before is None else max(before, told)
        if self._position is None:
            return
        if before is None:
            self._waiting = OrderedDict((id, replace(half, since=self._position)) for id, half in self._waiting.items())
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            if oldest.since is None or self._position - oldest.since <= self._span:
                break
            del self._waiting[oldest.id]
            span = f"{self.window} records" if self._in_records else self.window
            self._give_up(oldest, f"within {span}")

    def _give_up(self, half: Half, when: str) -> None:
        other = "label" if half.has_text else "text"
        self._given_up.append(GivenUp(half, f"no {other} came {when}"))
