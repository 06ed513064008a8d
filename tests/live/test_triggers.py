"""When an update is due: by volume, schedule, period and drift; with clocks that go wrong, and after restarts."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evertune.drift import MMD
from evertune.live.triggers import AllOf, AnyOf, Drift, Every, Schedule, Situation, Trigger, Volume

NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)
BUSINESS = ["profit", "shares", "market", "bank", "sales", "growth", "economy", "firm", "price", "dollar", "rate"]
SPORT = ["match", "striker", "goal", "coach", "cup", "injury", "league", "team", "season", "final", "win", "referee"]


def texts(words: list[str], n: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=20)) for _ in range(n)]


def rows(of: list[str]) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "origin": f"in:{n}", "record": {"text": text}} for n, text in enumerate(of)]


def situation(
    pending: list[str] | int = 0,
    new: int | None = None,
    version: int | None = 1,
    memory: list[str] | None = None,
    last: datetime | None = None,
    now: datetime = NOON,
) -> Situation:
    pending = [f"text {n}" for n in range(pending)] if isinstance(pending, int) else pending
    return Situation(
        records=lambda: rows(pending),
        n_pending=len(pending),
        n_new=len(pending) if new is None else new,
        production=None if version is None else SimpleNamespace(number=version),
        memory_texts=lambda: list(memory or []),
        last_update=last,
        now=now,
    )


def test_a_moment_without_a_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="now must have a time zone, got 2026-03-10T12:00:00"):
        situation(now=NOON.replace(tzinfo=None))
    with pytest.raises(ValueError, match="last_update must have a time zone"):
        situation(last=NOON.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("pending", "version", "last", "words"),
    [
        (0, None, None, "nothing to do: no usable record has arrived yet"),
        (0, 7, NOON, "nothing to do: version 7 has learned every record that has arrived"),
        (3, 7, NOON, "3 records are pending, and an update was tried on all of them, last at 2026-03-10 12:00 UTC: "),
        (300, None, NOON, "300 records are pending, and an update was tried on all of them, last at "),
    ],
    ids=["before the first", "all learned", "refused or promoted by hand", "first refused"],
)
def test_nothing_new_says_why(pending: int, version: int | None, last: datetime | None, words: str) -> None:
    assert situation(pending, new=0, version=version, last=last).nothing_new.startswith(words)


def test_volume_counts_records_that_no_update_was_tried_on() -> None:
    trigger = Volume(200)
    assert trigger.reason(situation(312)) == "312 new records (200 asked for)"
    assert trigger.reason(situation(312, new=12)) is None
    assert trigger.explanation == "12 new records (200 asked for)"
    assert trigger.reason(situation(200)) is not None
    with pytest.raises(ValueError, match="min_records must be positive, got 0"):
        Volume(0)


def test_schedule_fires_once_for_each_moment_and_makes_up_for_missed_ones_once() -> None:
    trigger = Schedule("0 3 * * *")
    assert trigger.reason(situation(1)) == "the first update of the schedule 0 3 * * *"
    last = NOON - timedelta(days=5)
    assert trigger.reason(situation(1, last=last)) == "the schedule 0 3 * * * was due at 2026-03-10 03:00 UTC"
    assert trigger.reason(situation(1, last=NOON.replace(hour=4))) is None
    assert trigger.explanation == "nothing has been due by the schedule 0 3 * * * since 2026-03-10 03:00 UTC"
    three = NOON.replace(hour=3) + timedelta(days=1)
    assert trigger.reason(situation(1, last=NOON, now=three - timedelta(seconds=1))) is None
    assert trigger.reason(situation(1, last=NOON, now=three)) is not None
    assert trigger.reason(situation(1, last=three, now=three)) is None


def test_schedule_waits_for_a_new_record() -> None:
    trigger = Schedule("0 3 * * *")
    assert trigger.reason(situation(9, new=0, last=NOON - timedelta(days=5))) is None
    assert trigger.explanation == "no new record for the schedule 0 3 * * *"
    assert trigger.reason(situation(0)) is None


def test_schedule_is_local_time_of_its_zone() -> None:
    last = datetime(2026, 7, 1, 0, 30, tzinfo=UTC)  # 02:30 in Berlin
    now = last + timedelta(minutes=45)  # 03:15 in Berlin
    berlin = Schedule("0 3 * * *", timezone="Europe/Berlin")
    assert berlin.reason(situation(1, last=last, now=now)) == (
        "the schedule 0 3 * * * was due at 2026-07-01 03:00 CEST"
    )
    assert Schedule("0 3 * * *").reason(situation(1, last=last, now=now)) is None


def test_schedule_in_an_hour_that_summer_time_skips_fires_once() -> None:
    trigger = Schedule("30 2 * * *", timezone="Europe/Berlin")
    last = datetime(2026, 3, 28, 12, 0, tzinfo=UTC)
    fired = []
    for minute in range(0, 22 * 60, 10):
        now = last + timedelta(minutes=minute)
        if trigger.reason(situation(1, last=last, now=now)):
            fired.append(now)
            last = now
    assert fired == [datetime(2026, 3, 29, 1, 0, tzinfo=UTC)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cron": "0 3 * *"}, "cron must be an expression such as '0 3 \\* \\* \\*', got '0 3 \\* \\*'"),
        ({"cron": "61 3 * * *"}, "cron must be an expression"),
        ({"cron": "0 0 30 2 *"}, "cron must be an expression"),  # 30 February never comes
        ({"cron": "0 3 * * *", "timezone": "Mars/Olympus"}, "timezone must be an IANA name.* got 'Mars/Olympus'"),
        ({"cron": "0 3 * * *", "timezone": "../etc"}, "timezone must be an IANA name"),
    ],
)
def test_schedule_refuses_what_it_cannot_read(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


def test_every_counts_from_the_last_update() -> None:
    trigger = Every("12h")
    assert trigger.reason(situation(1)) == "the first update (one every 12h)"
    assert trigger.reason(situation(1, last=NOON - timedelta(hours=11))) is None
    reason = trigger.reason(situation(1, last=NOON - timedelta(hours=12)))
    assert reason == "the last update was at 2026-03-10 00:00 UTC (one every 12h)"
    assert trigger.reason(situation(3, new=0, last=NOON - timedelta(hours=12))) is None
    for period in ("1", "h", "0h", "-1h", "1 fortnight", ""):
        with pytest.raises(ValueError, match="period must be a number and a unit"):
            Every(period)


@pytest.mark.parametrize("trigger", [Schedule("0 * * * *"), Every("1h")], ids=["schedule", "every"])
@pytest.mark.parametrize("back", [timedelta(seconds=5), timedelta(minutes=50), timedelta(days=400)])
def test_a_clock_that_goes_backwards_neither_fires_repeatedly_nor_never_again(
    trigger: Trigger, back: timedelta
) -> None:
    """An update every hour; then the clock is set back. Every minute a record arrives; an update takes its moment."""
    true_time = NOON + timedelta(minutes=20)
    last: datetime | None = true_time  # the last update, by the clock that was ahead
    fired: list[datetime] = []
    for _ in range(6 * 60):
        true_time += timedelta(minutes=1)
        clock = true_time - back
        if trigger.reason(situation(1, last=last, now=clock)):
            fired.append(true_time)
            last = clock
    assert 5 <= len(fired) <= 7
    gaps = [b - a for a, b in zip([NOON + timedelta(minutes=20), *fired], fired, strict=False)]
    assert max(gaps) <= timedelta(hours=2)


def test_drift_finds_another_world_and_says_where() -> None:
    memory = texts(BUSINESS, 300, seed=0)
    trigger = Drift()
    assert trigger.reason(situation(texts(BUSINESS, 400, seed=1), memory=memory)) is None
    assert trigger.explanation.startswith("no drift: score ")
    assert trigger.readings["drift_score"] <= trigger.readings["drift_threshold"]

    pending = texts(BUSINESS, 320, seed=1) + texts(SPORT, 100, seed=2)
    reason = trigger.reason(situation(pending, version=2, memory=memory))
    score, threshold = trigger.readings["drift_score"], trigger.readings["drift_threshold"]
    assert score > threshold
    assert reason == f"drift: score {score:.3g} above {threshold:.3g} at record 352"


def test_drift_decides_the_same_after_a_restart_and_however_the_records_arrived() -> None:
    memory = texts(BUSINESS, 300, seed=0)
    pending = texts(BUSINESS, 200, seed=1) + texts(SPORT, 200, seed=2)
    watching, decisions = Drift(), []
    for n in [70, 77, 150, 201, 231, 240, 400]:
        decisions.append((watching.reason(situation(pending[:n], memory=memory)), dict(watching.readings)))
        restarted = Drift()
        assert (restarted.reason(situation(pending[:n], memory=memory)), restarted.readings) == decisions[-1]
    reasons = [reason for reason, _ in decisions]
    assert reasons[:4] == [None] * 4 and reasons[-1] is not None
    assert reasons[-1].endswith("at record 224") and reasons[-1] == reasons[-2] == reasons[-3]


def test_drift_looks_anew_at_another_version_or_after_a_rollback() -> None:
    business, sport = texts(BUSINESS, 300, seed=0), texts(SPORT, 300, seed=1)
    trigger, pending = Drift(), texts(SPORT, 100, seed=2)
    assert trigger.reason(situation(pending, version=1, memory=business)) is not None
    assert trigger.reason(situation(pending[:5], version=2, memory=sport)) is None and trigger.readings == {}
    assert trigger.reason(situation(pending, version=2, memory=sport)) is None
    given_back = texts(SPORT, 90, seed=4) + pending
    assert trigger.reason(situation(given_back, version=2, memory=sport)) is None
    assert trigger.reason(situation(given_back, version=1, memory=business)) is not None


def test_drift_waits_for_new_records_after_a_refusal() -> None:
    memory, pending = texts(BUSINESS, 300, seed=0), texts(SPORT, 100, seed=1)
    trigger = Drift(min_records=50)
    assert trigger.reason(situation(pending, new=49, memory=memory)) is None
    assert trigger.explanation == "drift: 49 new records (50 needed for a look)"
    assert trigger.reason(situation(pending, new=50, memory=memory)) is not None


@pytest.mark.parametrize(
    ("detector", "words"),
    [
        (None, "a reference of 30 records is too small .* reference_size must be at least 128"),
        (MMD(reference_size=256), "the 30 texts known of production are too few for the detector's reference"),
    ],
)
def test_drift_with_too_small_a_reference_gives_no_reason_and_says_why(detector: MMD | None, words: str) -> None:
    trigger = Drift(detector)
    here = situation(texts(SPORT, 100, seed=1), memory=texts(BUSINESS, 30, seed=0))
    for _ in range(2):
        assert trigger.reason(here) is None
        assert re.search(f"^drift: cannot tell, {words}", trigger.explanation)
    assert trigger.readings == {}


def test_drift_without_production_reads_nothing() -> None:
    def unread() -> list[Any]:
        raise AssertionError("nothing should be read")

    here = dataclasses.replace(situation(999, version=None), records=unread, memory_texts=unread)
    trigger = Drift()
    assert trigger.reason(here) is None
    assert trigger.explanation == "drift: nothing is in production to compare with"


def test_drift_reads_no_record_again_until_there_are_more() -> None:
    pending, memory = texts(BUSINESS, 100, seed=1), texts(BUSINESS, 300, seed=0)
    read: list[int] = []
    trigger = Drift()

    def look(n: int) -> None:
        here = situation(pending[:n], memory=memory)
        assert trigger.reason(dataclasses.replace(here, records=lambda: read.append(n) or here.records())) is None

    for n in (70, 70, 80, 80, 80, 100):
        look(n)
    assert read == [70, 80, 100]


def test_drift_uses_the_detector_and_featuriser_it_is_given_and_leaves_them_alone() -> None:
    seen: list[int] = []

    def length(batch: list[str]) -> torch.Tensor:
        seen.append(len(batch))
        return torch.tensor([[float(len(text.split()))] for text in batch])

    detector = MMD(reference_size=128, window_size=16, arl=1_000)
    trigger = Drift(detector, length)
    memory = [" ".join(["w"] * (10 + n % 5)) for n in range(200)]
    here = situation([" ".join(["w"] * 40)] * 64, memory=memory)
    assert trigger.reason(here) is not None
    assert seen == [200, 64]
    assert detector.n_seen == 0 and not detector.armed


def test_drift_reads_the_declared_text_fields() -> None:
    seen: list[str] = []

    def look(batch: list[str]) -> torch.Tensor:
        seen.extend(batch)
        return torch.zeros(len(batch), 2)

    pending = [{"id": str(n), "record": {"title": f"T{n}", "body": "b" if n else None}} for n in range(64)]
    here = situation(64, memory=["m"] * 128)
    here = dataclasses.replace(here, records=lambda: pending, text=["title", "body"])
    Drift(featuriser=look).reason(here)
    assert seen[128:131] == ["T0 ", "T1 b", "T2 b"]


def test_a_look_that_fails_leaves_the_next_one_right() -> None:
    memory, pending = texts(BUSINESS, 300, seed=0), texts(BUSINESS, 64, seed=1) + texts(SPORT, 64, seed=2)
    trigger, fail = Drift(), [True]

    def broken() -> list[str]:
        if fail[0]:
            raise OSError("gone")
        return memory

    here = dataclasses.replace(situation(pending), memory_texts=broken)
    with pytest.raises(OSError):
        trigger.reason(here)
    fail[0] = False
    assert trigger.reason(here) == Drift().reason(here) is not None


class Says(Trigger):
    def __init__(self, words: str | None, **readings: float) -> None:
        super().__init__()
        self.words, self.readings, self.explanation = words, readings, words or "no"

    def reason(self, situation: Situation) -> str | None:
        return self.words


def test_any_of_names_every_reason_and_passes_on_what_was_measured() -> None:
    here = situation(1)
    trigger = AnyOf([Says("a"), Says(None, drift_score=0.5), Says("c", other=1.0)])
    assert trigger.reason(here) == "a; c"
    assert trigger.explanation == "a; no; c"
    assert trigger.readings == {"drift_score": 0.5, "other": 1.0}
    assert AnyOf([Says(None)]).reason(here) is None


def test_all_of_needs_every_one() -> None:
    here = situation(1)
    assert AllOf([Says("a"), Says("b")]).reason(here) == "a; b"
    trigger = AllOf([Says("a"), Says(None)])
    assert trigger.reason(here) is None
    assert trigger.explanation == "a; no"
    nested = AnyOf([AllOf([Every("1d"), Volume(200)]), Volume(1_000)])
    assert nested.reason(situation(250, last=NOON - timedelta(days=2))) is not None
    assert nested.reason(situation(250, last=NOON)) is None
    assert nested.reason(situation(1_250, last=NOON)) == "1250 new records (1000 asked for)"


@pytest.mark.parametrize("kind", [AnyOf, AllOf])
def test_a_choice_of_nothing_is_refused(kind: Callable[[list[Trigger]], Trigger]) -> None:
    with pytest.raises(ValueError, match="Of needs at least one trigger"):
        kind([])
