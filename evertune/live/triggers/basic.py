"""When an update is due: enough new records, a schedule, or a changed world; and how triggers combine."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from evertune.live.triggers.base import Situation, Trigger, duration, positive
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
        min_records: how many. Records of a refused update wait for that many others before they are tried again.

    Raises:
        ValueError: when ``min_records`` is not positive.
    """

    def __init__(self, min_records: int = 200) -> None:
        super().__init__()
        self.min_records = positive("min_records", min_records)

    def reason(self, situation: Situation) -> str | None:
        self.explanation = f"{situation.n_new} new records ({self.min_records} asked for)"
        return self.explanation if situation.n_new >= self.min_records else None


class Schedule(Trigger):
    """Due at the moments of a cron expression, if there is a new record.

    A moment missed, because nothing was running or an update took longer, is made up for once. The first update is due
    at once.

    When the clock is set back, a moment counts again only if the clock now stands before it: due when the newest moment
    of the schedule is another one than it was at the last update. So a correction by seconds changes nothing, and a
    last update dated in the far future, by a clock that was wrong, delays none.

    Args:
        cron: five fields (minute, hour, day of month, month, day of week), or ``@daily`` and its like:
            ``"0 3 * * *"`` is each night at three.
        timezone: an IANA name; the fields are local time there. An hour that a change of clock repeats counts twice,
            and a moment in an hour that it skips counts right after it.

    Raises:
        ModuleNotFoundError: without the extra ``live``.
        ValueError: for an expression that cannot be read or never comes, or an unknown time zone.
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
        """The newest moment of the schedule that is not after ``moment``."""
        croniter = library("croniter", "live").croniter
        after = moment.astimezone(self.timezone) + timedelta(milliseconds=1)  # get_prev means strictly before
        found: datetime = croniter(self.cron, after).get_prev(datetime)
        return found


class Every(Trigger):
    """Due when a period has passed since the last update, if there is a new record. The first update is due at once.

    When the clock is set back, the time from the last update counts in either direction: by less than a period, and the
    next update is late by so much; by more, and it is due at once.

    Args:
        period: a number and a unit: ``"90s"``, ``"30m"``, ``"12h"``, ``"1d"``, ``"2w"``.

    Raises:
        ValueError: for a period that cannot be read or is not positive.
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
    """Due when one of several triggers has a reason; all that have one are named.

    Args:
        triggers: at least one.

    Raises:
        ValueError: when there is none.
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
        triggers: at least one.

    Raises:
        ValueError: when there is none.
    """

    def reason(self, situation: Situation) -> str | None:
        reasons = self._reasons(situation)
        return "; ".join(filter(None, reasons)) if all(reasons) else None
