"""Vetoes on an update that is otherwise due: cool-down, warm-up, cost budget."""

from __future__ import annotations

from datetime import timedelta

from evertune.live.triggers.base import Situation, Trigger, duration, positive


class CoolDown(Trigger):
    """The reasons of another trigger, but none within a time after the last update, whatever became of that.

    The other trigger looks all the same, so that what it measures is shown. When the clock is set back, the time from
    the last update counts in either direction, as in :class:`~evertune.live.triggers.Every`.

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
        trigger: the other one.
        period: a number and a unit: ``"30m"``, ``"6h"``, ``"1d"``.

    Raises:
        ValueError: for a period that cannot be read or is not positive.
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
    """The reasons of another trigger, but none before the version in production has been live for a while.

    Counted from when that version was made. Before the first version only records count. The other trigger looks all
    the same, so that what it measures is shown.

    Args:
        trigger: the other one.
        min_records: pending records: those that arrived since what production has learned.
        period: a number and a unit, as ``"6h"``. With both, both must have passed.

    Raises:
        ValueError: when neither is given, or one is out of its range.
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
    """A reason as long as updates have not cost too much: a veto in ``AllOf``.

    What counts is the time of training and evaluation that the manifests of the versions hold, promoted or refused, of
    updates that began within ``per`` before now (of an update that was interrupted, the time since it went on). So a
    restart forgets nothing; but an update that failed leaves no version, and none that ``gc`` has removed counts. An
    update that begins within the budget is finished: the last one may go beyond it.

    Example::

        AllOf([AnyOf([Drift(), PerformanceDrop()]), CostBudget("2h", per="1d")])

    Args:
        budget: a number and a unit: ``"90s"``, ``"30m"``, ``"2h"``.
        per: the time over which it is spent, the same way.

    Raises:
        ValueError: for a period that cannot be read or is not positive.
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
