"""Triggers on the number of new records, on a schedule and on elapsed time, and their combinations."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from evertune.live.triggers.base import Situation, Trigger, positive
from evertune.utils.durations import duration
from evertune.utils.extras import library


class Volume(Trigger):
    """Due when enough new records have arrived.

    Example:
        >>> from datetime import timezone
        >>> situation = Situation(
        ...     records=list, n_pending=312, n_new=312, production=None, memory_texts=list, last_update=None,
        ...     now=datetime(2026, 3, 1, tzinfo=timezone.utc),
        ... )
        >>> Volume(200).reason(situation)
        '312 new records (200 asked for)'

    Args:
        min_records: Minimum number of new records. The records of a refused update are tried again once this many
            others have arrived. Default: 200.

    Raises:
        ValueError: If ``min_records`` is not positive.
    """

    def __init__(self, min_records: int = 200) -> None:
        super().__init__()
        self.min_records = positive("min_records", min_records)

    def reason(self, situation: Situation) -> str | None:
        self.explanation = f"{situation.n_new} new records ({self.min_records} asked for)"
        return self.explanation if situation.n_new >= self.min_records else None


class Schedule(Trigger):
    """Due at the times of a cron expression, if there is a new record.

    Scheduled times that were missed, because nothing was running or an update took longer, lead to one update. The
    first update is due at once.

    An update is due if the latest scheduled time is not the same now as it was at the last update. If the clock is set
    back, a scheduled time therefore counts again only if the clock is now before it: a correction by seconds changes
    nothing, and a last update dated in the far future by a wrong clock delays nothing.

    Args:
        cron: Five fields (minute, hour, day of month, month, day of week), or ``@daily`` and the like: ``"0 3 * * *"``
            is every night at three.
        timezone: IANA name of the time zone in which the fields are local times. Default: UTC. A time in an hour that a
            change of clock repeats counts twice, and one in an hour that it skips counts right after it.

    Raises:
        ModuleNotFoundError: If the extra ``live`` is not installed.
        ValueError: If the expression cannot be parsed or never occurs, or the time zone is unknown.
    """

    def __init__(self, cron: str, timezone: str = "UTC") -> None:
        super().__init__()
        self.cron = cron
        try:
            self.timezone = ZoneInfo(timezone)
        except (ValueError, OSError, LookupError):
            raise ValueError(f"timezone must be an IANA name, such as 'Europe/Berlin', got {timezone!r}") from None
        try:
            self._newest(datetime.now(self.timezone))
        except ValueError as error:
            raise ValueError(f"cron must be an expression such as '0 3 * * *', got {cron!r}: {error}") from None

    def reason(self, situation: Situation) -> str | None:
        newest = self._newest(situation.now)
        moment = f"{newest:%Y-%m-%d %H:%M %Z}"
        if not situation.n_new:
            self.explanation = f"no new record for the schedule {self.cron}"
        elif situation.last_update is None:
            self.explanation = f"the first update of the schedule {self.cron}"
            return self.explanation
        elif newest == self._newest(situation.last_update):
            self.explanation = f"nothing has been due by the schedule {self.cron} since {moment}"
        else:
            self.explanation = f"the schedule {self.cron} was due at {moment}"
            return self.explanation
        return None

    def _newest(self, moment: datetime) -> datetime:
        """The latest scheduled time that is not after ``moment``."""
        croniter = library("croniter", "live").croniter
        after = moment.astimezone(self.timezone) + timedelta(milliseconds=1)  # get_prev() is strictly before
        found: datetime = croniter(self.cron, after).get_prev(datetime)
        return found


class Every(Trigger):
    """Due when a period has passed since the last update, if there is a new record. The first update is due at once.

    The time since the last update counts in either direction. If the clock is set back by less than a period, the next
    update is late by that much; if it is set back by more, the update is due at once.

    Args:
        period: A number and a unit: ``"90s"``, ``"30m"``, ``"12h"``, ``"1d"``, ``"2w"``. Default: one day.

    Raises:
        ValueError: If the period cannot be parsed or is not positive.
    """

    def __init__(self, period: str = "1d") -> None:
        super().__init__()
        self.period = period
        self._length = duration("period", period)

    def reason(self, situation: Situation) -> str | None:
        if not situation.n_new:
            self.explanation = f"no new record (an update every {self.period})"
            return None
        if situation.last_update is None:
            self.explanation = f"the first update (one every {self.period})"
            return self.explanation
        self.explanation = f"the last update was at {situation.last_update:%Y-%m-%d %H:%M %Z} (one every {self.period})"
        return self.explanation if abs(situation.now - situation.last_update) >= self._length else None


class AnyOf(Trigger):
    """Due when at least one of several triggers has a reason; all reasons are named.

    Args:
        triggers: The triggers, at least one.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, triggers: list[Trigger]) -> None:
        super().__init__()
        if not triggers:
            raise ValueError(f"{type(self).__name__} needs at least one trigger")
        self.triggers = triggers

    def reason(self, situation: Situation) -> str | None:
        return "; ".join(reason for reason in self._reasons(situation) if reason) or None

    def _reasons(self, situation: Situation) -> list[str | None]:
        reasons = [trigger.reason(situation) for trigger in self.triggers]
        self.explanation = "; ".join(trigger.explanation for trigger in self.triggers)
        self.readings = {name: value for trigger in self.triggers for name, value in trigger.readings.items()}
        return reasons


class AllOf(AnyOf):
    """Due when each of several triggers has a reason: ``AllOf([Every("1d"), Volume(200)])``.

    Args:
        triggers: The triggers, at least one.

    Raises:
        ValueError: If there is none.
    """

    def reason(self, situation: Situation) -> str | None:
        reasons = self._reasons(situation)
        return "; ".join(filter(None, reasons)) if all(reasons) else None
