"""Joins texts with labels that arrive separately: each half waits for the other, within a window."""

from __future__ import annotations

import time as clocks
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from evertune.sources.schema import time_value
from evertune.utils.durations import duration


@dataclass(frozen=True, slots=True)
class Half:
    """A text that lacks its label, or a label that lacks its text.

    Args:
        id: The id that text and label share.
        origin: Where the record is in its source.
        value: The fields of the record, JSON values.
        has_text: Whether this half is the text.
        since: Position of the stream when it began to wait; None if no record had carried a time yet.
    """

    id: str
    origin: str
    value: dict[str, Any]
    has_text: bool
    since: float | None = None


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A half that was given up because the other one has not arrived.

    Args:
        half: The half that was given up.
        reason: The reason, as a message.
        superseded: Whether a newer record with the same id replaced it.
    """

    half: Half
    reason: str
    superseded: bool = False


class LabelJoin:
    """Joins records that arrive without a label with labels that arrive separately, by their id.

    A text waits for its label, and a label for its text. Of two texts, or two labels, that wait under the same id, the
    newer one counts. A complete record does not wait, and replaces a half that waits under its id. A label for a record
    that has already been completed waits too: it is joined only if the text is sent again.

    The wait is measured on the stream, never by a clock: in records, or by the latest time of any record so far.
    Reading the same records again therefore gives the same pairs.

    One wrong time must not end the wait of all the others. A record dated in the future, by the clock of this machine,
    is refused (``max_time_jump``). A time further ahead of the stream than the window, from which all that wait would
    be given up at once, advances the stream only if the next record with a time is as far ahead.

    Args:
        id: Name of the field that text and label share.
        label: Name of the field with the label.
        window: How long one half waits for the other: a number of records, or a duration measured on the ``time``
            field, as ``"12h"`` or ``"7d"`` (units s, m, h, d, w). The default suits people who label within a week.
        time: Name of the field with the time of a record; required for a duration.
        max_waiting: Maximum number of waiting halves; beyond it, the oldest is given up. They are kept in memory, and
            written with every segment of the journal.
        max_time_jump: How far the time of a record may be ahead of the clock of this machine when it arrives: a
            duration, or seconds. Default: a day, which allows for clocks and time zones that are set wrong.

    Raises:
        ValueError: If the window is not valid, is a duration without ``time``, or a number is below 1.

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
        max_time_jump: str | float | timedelta = "1d",
    ) -> None:
        self.id, self.label, self.window, self.time, self.max_waiting = id, label, window, time, max_waiting
        self.zone: tzinfo | None = None  # of times without one; the intake sets it to the schema's
        self._span: float
        if isinstance(window, str):
            try:
                self._span = duration("window", window).total_seconds()
            except ValueError as error:
                raise ValueError(f"{error}; or a number of records") from None
            if time is None:
                raise ValueError(
                    f"a window of {window} needs time=, the field with a record's time; or pass a number of records"
                )
        else:
            self._span = window
        if self._span <= 0 or max_waiting < 1:
            raise ValueError(f"window and max_waiting must be positive, got {window!r} and {max_waiting}")
        self.max_time_jump = duration("max_time_jump", max_time_jump)
        self._jump = self.max_time_jump.total_seconds()
        self._in_records = not isinstance(window, str)
        self._waiting: OrderedDict[str, Half] = OrderedDict()
        self._given_up: list[GivenUp] = []
        self._position: float | None = None
        self._ahead: float | None = None  # a time far ahead of the position, until the next record confirms it or not

    def add(self, half: Half) -> tuple[Half, Half] | None:
        """Add one half.

        Returns:
            The text and the label, if this half completes them.

        Raises:
            ValueError: If its time cannot be read, or is in the future.
        """
        self._advance(half.value)
        other = self._waiting.pop(half.id, None)
        if other is not None and other.has_text is not half.has_text:
            return (half, other) if half.has_text else (other, half)
        if other is not None:
            self._given_up.append(GivenUp(other, f"superseded by {half.origin}", superseded=True))
        self._waiting[half.id] = replace(half, since=self._position if self._ahead is None else None)
        if len(self._waiting) > self.max_waiting:
            oldest = self._waiting.popitem(last=False)[1]
            self._give_up(oldest, f"while max_waiting={self.max_waiting} newer ones wait")
        return None

    def passed(self, id: str, origin: str, value: Mapping[str, Any]) -> None:
        """Note a record that arrived complete.

        Raises:
            ValueError: If its time cannot be read, or is in the future.
        """
        self._advance(value)
        other = self._waiting.pop(id, None)
        if other is not None:
            self._given_up.append(GivenUp(other, f"superseded by {origin}", superseded=True))

    def given_up(self) -> list[GivenUp]:
        """The halves that were given up since the last call."""
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
        """Position of the stream, as JSON values."""
        ahead = {} if self._ahead is None else {"ahead": self._ahead}
        return {"in_records": self._in_records, "position": self._position, **ahead}

    def restore(self, waiting: Sequence[Mapping[str, Any]], clock: Mapping[str, Any] | None) -> None:
        """Resume from :attr:`waiting` and :attr:`clock`. Under another kind of window, or if the clock is in the
        future, the wait starts over."""
        self._given_up = []
        kept = clock if clock is not None and clock["in_records"] == self._in_records else {}
        if not self._in_records and (kept.get("position") or 0) > clocks.time() + self._jump:
            kept = {}  # a record dated in the future had moved it there
        self._position, self._ahead = kept.get("position"), kept.get("ahead")
        halves = [Half(**half) for half in waiting]
        self._waiting = OrderedDict((half.id, half if kept else replace(half, since=None)) for half in halves)

    def _advance(self, value: Mapping[str, Any]) -> None:
        """Advance the stream's clock by one record, and give up the halves that have waited for too long."""
        unsure = self._position is None or self._ahead is not None
        if self._in_records:
            self._position = (self._position or 0) + 1
        elif self.time is not None and value.get(self.time) is not None:
            self._move(self._time_of(value[self.time]))
        if self._position is None or self._ahead is not None:
            return
        if unsure:
            self._waiting = OrderedDict(
                (id, half if half.since is not None else replace(half, since=self._position))
                for id, half in self._waiting.items()
            )
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            if oldest.since is None or self._position - oldest.since <= self._span:
                break
            del self._waiting[oldest.id]
            span = f"{self.window} records" if self._in_records else self.window
            self._give_up(oldest, f"within {span}")

    def _time_of(self, value: Any) -> float:
        try:
            own = datetime.fromisoformat(time_value(value, self.zone)).timestamp()
        except ValueError as error:
            raise ValueError(f"field {self.time!r}: {error}") from None
        now = clocks.time()
        if own > now + self._jump:
            arrived = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
            raise ValueError(
                f"field {self.time!r}: {time_value(value, self.zone)} is more than {self.max_time_jump} "
                f"(max_time_jump) after {arrived}, when it arrived"
            )
        return own

    def _move(self, own: float) -> None:
        """Move the position to a record's time, unless the time is far ahead and no other confirms it yet."""
        if self._position is not None and own - self._position > max(self._span, self._jump):
            if self._ahead is None:
                self._ahead = own
                return
            own = min(own, self._ahead)
        self._ahead = None
        self._position = own if self._position is None else max(self._position, own)

    def _give_up(self, half: Half, when: str) -> None:
        other = "label" if half.has_text else "text"
        self._given_up.append(GivenUp(half, f"no {other} arrived {when}"))
