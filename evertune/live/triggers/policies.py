"""Vetoes on an update that is otherwise due: cool-down, warm-up, cost budget."""

from __future__ import annotations

from datetime import timedelta

from evertune.live.triggers.base import Situation, Trigger, positive
from evertune.utils.durations import duration


class CoolDown(Trigger):
    """The reason of another trigger, but none for a while after the last update, whatever its outcome.

    The other trigger is evaluated even so, so that its readings are shown. The time since the last update counts in
    either direction, in case the clock is set back, as in :class:`~evertune.live.triggers.Every`.

    Example:
        >>> from datetime import datetime, timezone
        >>> from evertune.live.triggers import Volume
        >>> now = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
        >>> situation = Situation(
        ...     records=list, n_pending=312, n_new=312, production=None, memory_texts=list,
        ...     last_update=now - timedelta(hours=2), now=now,
        ... )
        >>> trigger = CoolDown(Volume(200), "6h")
        >>> trigger.reason(situation), trigger.explanation
        (None, '312 new records (200 asked for); too soon: cooling down until 2026-03-01 16:00 UTC (6h)')

    Args:
        trigger: The trigger whose reasons are delayed.
        period: A number and a unit: ``"30m"``, ``"6h"``, ``"1d"``. Default: six hours.

    Raises:
        ValueError: If the period cannot be parsed or is not positive.
    """

    def __init__(self, trigger: Trigger, period: str = "6h") -> None:
        super().__init__()
        self.trigger, self.period = trigger, period
        self._length = duration("period", period)

    def reason(self, situation: Situation) -> str | None:
        reason = self.trigger.reason(situation)
        self.explanation, self.readings = self.trigger.explanation, self.trigger.readings
        last = situation.last_update
        if last is None or abs(situation.now - last) >= self._length:
            return reason
        end = last + self._length
        self.explanation += f"; too soon: cooling down until {end:%Y-%m-%d %H:%M %Z} ({self.period})"
        return None


class WarmUp(Trigger):
    """The reason of another trigger, but none before the version in production has been live for a while.

    The time is counted from the creation of that version. Before the first version, only records count. The other
    trigger is evaluated even so, so that its readings are shown.

    Args:
        trigger: The trigger whose reasons are delayed.
        min_records: Minimum number of pending records, which production has not learned; None for no minimum.
        period: A number and a unit, such as ``"6h"``; None for no minimum time. If both are given, both must be met.

    Raises:
        ValueError: If neither is given, or one is out of range.
    """

    def __init__(self, trigger: Trigger, min_records: int | None = None, period: str | None = None) -> None:
        super().__init__()
        if min_records is None and period is None:
            raise ValueError("WarmUp needs min_records, period or both")
        self.trigger, self.period = trigger, period
        self.min_records = None if min_records is None else positive("min_records", min_records)
        self._length = None if period is None else duration("period", period)

    def reason(self, situation: Situation) -> str | None:
        reason = self.trigger.reason(situation)
        self.explanation, self.readings = self.trigger.explanation, self.trigger.readings
        missing = []
        if self.min_records is not None and situation.n_pending < self.min_records:
            missing.append(f"{situation.n_pending} of {self.min_records} records")
        if self._length is not None and situation.production is not None:
            made = situation.production.created
            if abs(situation.now - made) < self._length:
                missing.append(f"until {made + self._length:%Y-%m-%d %H:%M %Z}")
        if not missing:
            return reason
        self.explanation += f"; too early: warming up, {', '.join(missing)}"
        return None


class CostBudget(Trigger):
    """A reason as long as updates have not exceeded a budget: a veto in ``AllOf``.

    What counts is the time for training and evaluation in the manifests of all versions, promoted or refused, whose
    update began within the last ``per`` (for an interrupted update, the time since it was resumed). A restart therefore
    forgets nothing. Updates that failed do not count, as they leave no version, nor do versions that ``gc`` has
    removed. An update that begins within the budget is finished even if it exceeds it.

    Example::

        AllOf([AnyOf([Drift(), PerformanceDrop()]), CostBudget("2h", per="1d")])

    Args:
        budget: A number and a unit: ``"90s"``, ``"30m"``, ``"2h"``.
        per: The period to which the budget applies, in the same form. Default: one day.

    Raises:
        ValueError: If a period cannot be parsed or is not positive.
    """

    def __init__(self, budget: str, per: str = "1d") -> None:
        super().__init__()
        self.budget, self.per = budget, per
        self._budget, self._per = duration("budget", budget), duration("per", per)

    def reason(self, situation: Situation) -> str | None:
        updates = situation.updates()
        spent = sum(seconds for moment, seconds in updates if abs(situation.now - moment) < self._per)
        self.readings = {"update_seconds_spent": spent, "update_seconds_budget": self._budget.total_seconds()}
        self.explanation = f"updates have cost {_words(spent)} of {self.budget} per {self.per}"
        return self.explanation if spent < self._budget.total_seconds() else None


def _words(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
