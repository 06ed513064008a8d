"""When an update is due: enough new records, a schedule, or a changed world."""

from __future__ import annotations

import copy
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from evertune.drift import MMD, Detector, Featuriser, HashedNgrams
from evertune.streams._server import library

if TYPE_CHECKING:
    from evertune.registry.registry import Version

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a trigger decides on.

    Args:
        records: reads the pending rows, ``{"id", "origin", "record"}``, in the order in which they arrived: those that
            production has not learnt.
        n_pending: how many they are.
        n_new: how many of them no update has been tried on yet.
        production: the version in production; None before the first.
        memory_texts: reads texts of what production has learnt.
        last_update: when the last update was tried, whatever became of it; None before the first.
        now: the present moment. Both moments have a time zone.
        text: the field of a record that holds its text, or several.

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

    def __post_init__(self) -> None:
        for name, moment in (("now", self.now), ("last_update", self.last_update)):
            if moment is not None and moment.tzinfo is None:
                raise ValueError(f"{name} must have a time zone, got {moment.isoformat()}")


class Trigger(ABC):
    """Decides whether an update is due. A subclass writes :meth:`reason`.

    What it decides depends on the situation alone: a process that starts anew decides as the one before it.

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
        min_records: how many. Records of a refused update wait for so many others before they are tried again.

    Raises:
        ValueError: when ``min_records`` is not positive.
    """

    def __init__(self, min_records: int = 200) -> None:
        super().__init__()
        self.min_records = _positive("min_records", min_records)

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
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", period.strip())
        if match is None or not float(match[1]):
            raise ValueError(f"period must be a number and a unit (s, m, h, d, w), such as '12h', got {period!r}")
        self.period = period
        self._length = timedelta(**{_UNITS[match[2]]: float(match[1])})

    def reason(self, situation: Situation) -> str | None:
        if not situation.n_new:
            self.explanation = f"no new record (an update every {self.period})"
            return None
        if situation.last_update is None:
            self.explanation = f"the first update (one every {self.period})"
            return self.explanation
        self.explanation = f"the last update was at {situation.last_update:%Y-%m-%d %H:%M %Z} (one every {self.period})"
        return self.explanation if abs(situation.now - situation.last_update) >= self._length else None


class Drift(Trigger):
    """Due when what arrives no longer looks like what production has learnt.

    The detector's reference is a sample of the texts that are known of what production has learnt; then it looks at the
    pending records in order, up to the first alarm. Without a version in production, or with too few texts to hold the
    detector's false-alarm rate, there is no reason, and :attr:`explanation` says so: combine it with another trigger
    (``AnyOf``) that brings the first updates.

    Records that arrive in spells, all of a kind together, look like drift: they ask for a detector with a
    ``block_size`` (see :class:`~evertune.drift.MMD`).

    Args:
        detector: decides; used as a template, it stays as it is. Default: :class:`~evertune.drift.MMD` with one false
            alarm in 10,000 records and a reference of up to 512 texts; it needs 128.
        featuriser: a frozen view of a list of texts, ``texts -> tensor [texts, n_features]``. Default:
            :class:`~evertune.drift.HashedNgrams`, of words; :class:`~evertune.drift.FrozenEncoder` sees meaning and
            costs milliseconds a text.
        min_records: new records before it looks: records of a refused update wait for so many others.

    Raises:
        ValueError: when ``min_records`` is not positive.
    """

    def __init__(
        self, detector: Detector | None = None, featuriser: Featuriser | None = None, min_records: int = 64
    ) -> None:
        super().__init__()
        self.detector = detector
        self.featuriser = featuriser or HashedNgrams()
        self.min_records = _positive("min_records", min_records)
        # What has been looked at, so that the next look goes on from there: decisions do not depend on it.
        self._version: int | None = None
        self._ids: list[str] = []
        self._watching: Detector | str = ""  # or why it cannot
        self._n_reference = 0

    def reason(self, situation: Situation) -> str | None:
        if situation.production is None or situation.production.number != self._version:
            self.readings = {}
        if situation.production is None:
            self.explanation = "drift: nothing is in production to compare with"
            return None
        if situation.n_new < self.min_records:
            self.explanation = f"drift: {situation.n_new} new records ({self.min_records} needed for a look)"
            return None
        if self._version != situation.production.number or len(self._ids) != situation.n_pending:
            self._look(situation, situation.production.number)
        if isinstance(self._watching, str):
            self.explanation = f"drift: cannot tell, {self._watching}"
            return None
        return self._decision(self._watching)

    def _look(self, situation: Situation, production: int) -> None:
        """Look at the pending records that are new; those of one version in production only grow in number."""
        rows = situation.records()
        ids = [row["id"] for row in rows]
        version, self._version = self._version, None  # should this look fail, the next starts anew
        if version != production or ids[: len(self._ids)] != self._ids:
            self._ids, self._watching = [], self._armed(situation.memory_texts())
        if isinstance(self._watching, Detector):
            texts = [_text(row["record"], situation.text) for row in rows[len(self._ids) :]]
            for features in self._features(texts):
                if not self._watching.drift_detected:  # the first alarm stands
                    self._watching.update(features)
        self._version, self._ids = production, ids

    def _decision(self, detector: Detector) -> str | None:
        if not detector.n_tests:
            self.explanation = f"drift: no test yet ({detector.n_seen - self._n_reference} records seen)"
            return None
        self.readings = {"drift_score": detector.score, "drift_threshold": detector.threshold}
        score, threshold = f"{detector.score:.3g}", f"{detector.threshold:.3g}"
        if not detector.drift_detected or detector.detected_at is None:
            self.explanation = f"no drift: score {score}, the alarm is above {threshold}"
            return None
        record = detector.detected_at - self._n_reference
        self.explanation = f"drift: score {score} above {threshold} at record {record}"
        return self.explanation

    def _armed(self, texts: list[str]) -> Detector | str:
        """A detector whose reference is a sample of ``texts``, or why there is none."""
        if self.detector is not None:
            detector = copy.deepcopy(self.detector)
            detector.reset()
        else:
            try:
                detector = MMD(reference_size=max(1, min(len(texts), 512)))
            except ValueError as error:
                return str(error)
        for features in self._features(random.Random(0).sample(texts, len(texts))):
            for record in features:
                if not detector.armed:
                    detector.update(record)
        self._n_reference = detector.n_seen
        too_few = f"the {len(texts)} texts known of production are too few for the detector's reference"
        return detector if detector.armed else too_few

    def _features(self, texts: list[str]) -> list[Any]:
        return [self.featuriser(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]


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


def _text(record: dict[str, Any], fields: str | Sequence[str]) -> str:
    names = [fields] if isinstance(fields, str) else fields
    return " ".join(str(record.get(name) or "") for name in names)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return value
