"""Labels that come apart from their texts."""

import random
import time
from datetime import UTC, datetime, timedelta

import pytest

from evertune.sources.labels import Half, LabelJoin

DAY = 86_400


def text(id, number=0, **more):
    return Half(id, f"texts:{number}", {"id": id, "text": f"text {number}", **more}, has_text=True)


def label(id, name="a", number=0, **more):
    return Half(id, f"labels:{number}", {"id": id, "label": name, **more}, has_text=False)


def day(number):
    return f"2024-05-{number:02d}T00:00:00+00:00"


def ids(join):
    return [half["id"] for half in join.waiting]


def test_a_label_finds_its_text():
    join = LabelJoin(window=10)
    assert join.add(text("1")) is None
    assert join.add(text("2")) is None
    one, name = join.add(label("1", "billing"))
    assert (one.has_text, one.value["text"], name.value["label"]) == (True, "text 0", "billing")
    assert ids(join) == ["2"]
    assert join.given_up() == []


def test_a_text_finds_its_label():
    join = LabelJoin(window=10)
    assert join.add(label("1", "billing")) is None
    one, name = join.add(text("1"))
    assert (one.has_text, name.value["label"]) == (True, "billing")
    assert join.waiting == []


def test_the_newer_counts():
    join = LabelJoin(window=10)
    join.add(label("1", "old", 1))
    join.add(label("1", "new", 2))
    _, name = join.add(text("1"))
    assert name.value["label"] == "new"
    join.add(text("2", 1))
    join.add(text("2", 2))
    one, _ = join.add(label("2"))
    assert one.value["text"] == "text 2"
    gone = join.given_up()
    assert [(one.half.origin, one.reason, one.superseded) for one in gone] == [
        ("labels:1", "superseded by labels:2", True),
        ("texts:1", "superseded by texts:2", True),
    ]
    assert join.given_up() == []


def test_a_whole_record_takes_the_place_of_what_waits():
    join = LabelJoin(window=10)
    join.add(text("1"))
    join.passed("1", "texts:9", {})
    join.passed("2", "texts:10", {})
    assert join.waiting == []
    assert [one.reason for one in join.given_up()] == ["superseded by texts:9"]


def test_a_window_in_records():
    join = LabelJoin(window=3)
    join.add(text("1"))
    join.passed("x", "texts:1", {})
    join.passed("y", "texts:2", {})
    assert join.add(label("1")) is not None  # the third record after it
    join.add(text("2"))
    for number in range(3):
        join.passed(f"z{number}", "texts:3", {})
    assert ids(join) == ["2"]
    assert join.add(label("2")) is None
    assert ids(join) == ["2"]
    assert [(one.half.has_text, one.reason, one.superseded) for one in join.given_up()] == [
        (True, "no label arrived within 3 records", False)
    ]


def test_a_window_on_the_time_that_records_tell():
    join = LabelJoin(window="2d", time="at")
    join.add(text("1", at=day(1)))
    join.add(text("2", at=day(2)))
    join.add(text("3"))  # it tells no time: it has waited since the newest
    assert join.add(label("1", at=day(3))) is not None
    join.passed("x", "texts:5", {"at": "2024-05-04T00:00:01Z"})
    assert join.waiting == []
    gone = join.given_up()
    assert [one.half.id for one in gone] == ["2", "3"]
    assert gone[0].reason == "no label arrived within 2d"


def test_a_clock_that_goes_backwards_changes_nothing():
    join = LabelJoin(window="2d", time="at")
    join.passed("x", "texts:0", {"at": day(20)})
    for number in range(10, 0, -1):  # every clock now says it is weeks ago
        join.add(text(str(number), at=day(number)))
    assert len(join.waiting) == 10
    assert join.given_up() == []
    assert join.add(label("5", at=day(1))) is not None
    join.passed("y", "texts:11", {"at": day(21)})
    assert len(join.waiting) == 9
    join.passed("z", "texts:12", {"at": day(23)})
    assert len(join.given_up()) == 9


def test_before_any_time_is_told_nothing_grows_old():
    join = LabelJoin(window="1h", time="at")
    for number in range(5):
        join.add(text(str(number)))
    join.passed("x", "texts:9", {"at": day(10)})
    assert len(join.waiting) == 5
    join.passed("y", "texts:10", {"at": "2024-05-10T01:00:00Z"})
    assert len(join.waiting) == 5
    join.passed("y", "texts:10", {"at": "2024-05-10T01:00:01Z"})
    assert len(join.given_up()) == 5


def test_a_bad_time_changes_nothing():
    join = LabelJoin(window="1h", time="at")
    for bad in ("yesterday", "2024-05-10T01:00:00", 1e20):
        with pytest.raises(ValueError, match="field 'at'"):
            join.add(text("1", at=bad))
        with pytest.raises(ValueError, match="field 'at'"):
            join.passed("1", "texts:1", {"at": bad})
    assert join.waiting == []
    assert join.clock == {"in_records": False, "position": None}


def from_now(**ahead):
    return (datetime.now(UTC) + timedelta(**ahead)).isoformat()


@pytest.mark.parametrize("limit", ["3d", timedelta(days=3), 3 * DAY])
@pytest.mark.parametrize("arrives", ["half", "whole", "first"])
def test_a_time_in_the_future_is_refused_and_changes_nothing(arrives, limit):
    join = LabelJoin(window="7d", time="at", max_time_jump=limit)
    if arrives != "first":
        join.add(text("1", at=from_now(days=-1)))
    before = join.waiting, join.clock
    for wrong in (from_now(days=4), from_now(days=3650), "2099-12-31T00:00:00Z", 4e9, 4_000_000_000_000):
        with pytest.raises(ValueError, match=r"field 'at': .* is more than 3 days, 0:00:00 \(max_time_jump\) after"):
            join.add(text("2", at=wrong)) if arrives != "whole" else join.passed("2", "texts:2", {"at": wrong})
    assert (join.waiting, join.clock, join.given_up()) == (*before, [])
    join.passed("3", "texts:3", {"at": from_now(days=2)})
    assert len(join.waiting) == len(before[0])


def test_by_default_a_day_in_the_future_is_refused():
    join = LabelJoin(window="7d", time="at")
    join.passed("1", "texts:1", {"at": from_now(hours=23)})
    with pytest.raises(ValueError, match="is more than 1 day, 0:00:00"):
        join.passed("1", "texts:1", {"at": from_now(hours=25)})


@pytest.mark.parametrize("restart", [False, True])
def test_one_wrong_time_in_the_past_does_not_end_the_wait(restart):
    join = LabelJoin(window="2d", time="at")

    def again():
        fresh = LabelJoin(window="2d", time="at")
        fresh.restore(join.waiting, join.clock)
        return fresh if restart else join

    join.add(text("1", at=day(1)))
    join.add(text("wrong", at="2025-05-01T00:00:00Z"))
    join = again()
    join.add(text("2", at=day(2)))
    assert join.given_up() == [] and ids(join) == ["1", "wrong", "2"]
    assert join.add(label("1", at=day(3))) is not None
    join.passed("x", "texts:9", {"at": "2024-05-04T00:00:01Z"})
    assert [one.half.id for one in join.given_up()] == ["wrong", "2"]
    join.add(text("3", at=day(5)))
    join.add(text("4", at="2024-09-01T00:00:00Z"))  # the stream has paused for months: the next record confirms it
    join = again()
    join.add(text("5"))
    assert join.given_up() == []
    join.add(text("6", at="2024-09-01T01:00:00Z"))
    assert [one.half.id for one in join.given_up()] == ["3"]
    assert ids(join) == ["4", "5", "6"]


def test_a_clock_that_stands_in_the_future_starts_over():
    """As versions left it that let one record move the clock."""
    join = LabelJoin(window="2d", time="at")
    half = {"id": "1", "origin": "texts:1", "value": {"id": "1"}, "has_text": True, "since": time.time() + 365 * DAY}
    join.restore([half], {"in_records": False, "position": time.time() + 365 * DAY})
    join.passed("x", "texts:2", {"at": from_now(days=-9)})
    assert ids(join) == ["1"]
    join.passed("y", "texts:3", {"at": from_now(days=-6)})
    join.passed("z", "texts:4", {"at": from_now(days=-6)})
    assert [one.half.id for one in join.given_up()] == ["1"]


def test_only_so_many_wait():
    join = LabelJoin(window=1000, max_waiting=3)
    for number in range(5):
        join.add(text(str(number), number))
    assert ids(join) == ["2", "3", "4"]
    gone = join.given_up()
    assert [one.half.id for one in gone] == ["0", "1"]
    assert gone[0].reason == "no label arrived while max_waiting=3 newer ones wait"


@pytest.mark.parametrize("settings", [{"window": 20}, {"window": "3h", "time": "at"}, {"window": 20, "max_waiting": 5}])
def test_it_goes_on_where_it_stopped(settings):
    """Saved and restored after every record, or never: the same pairs, the same that are given up."""
    draw = random.Random(0)
    events = []
    for number in range(400):
        at = f"2024-05-{1 + number // 100:02d}T{draw.randrange(24):02d}:00:00Z"
        half = draw.choice([text, label])(
            str(draw.randrange(60)), number=number, **({"at": at} if draw.random() < 0.7 else {})
        )
        events.append(half)

    def play(restart):
        join, seen = LabelJoin(**settings), []
        for half in events:
            if restart:
                state = join.waiting, join.clock
                join = LabelJoin(**settings)
                join.restore(*state)
            pair = join.add(half)
            seen.append((pair and [part.origin for part in pair], [one.half.origin for one in join.given_up()]))
        return seen, join.waiting

    assert play(restart=True) == play(restart=False)
    pairs = [pair for pair, _ in play(restart=False)[0] if pair]
    assert len(pairs) > 10


def test_another_kind_of_window_starts_the_wait_anew():
    join = LabelJoin(window=5)
    join.add(text("1"))
    state = join.waiting, join.clock
    later = LabelJoin(window="1h", time="at")
    later.restore(*state)
    later.passed("x", "texts:1", {"at": day(1)})
    assert ids(later) == ["1"]
    later.passed("y", "texts:2", {"at": day(2)})
    assert later.waiting == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": "a week"}, "such as '12h', got 'a week'; or a number of records"),
        ({"window": "7d"}, "a window of 7d needs time="),
        ({"window": 0}, "must be positive"),
        ({"window": "0d", "time": "at"}, "window must be .* got '0d'"),
        ({"window": 5, "max_waiting": 0}, "must be positive"),
        ({"window": 5, "max_time_jump": "a day"}, "max_time_jump must be a number and a unit .* got 'a day'"),
        ({"window": 5, "max_time_jump": 0}, "max_time_jump must be"),
        ({"window": 5, "max_time_jump": float("nan")}, "max_time_jump must be"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        LabelJoin(**settings)


@pytest.mark.parametrize(("window", "seconds"), [("90s", 90), ("1.5 h", 5400), ("2m", 120), ("1w", 7 * DAY)])
def test_durations(window, seconds):
    join = LabelJoin(window=window, time="at")
    join.add(text("1", at=0))
    join.passed("x", "texts:1", {"at": seconds})
    assert ids(join) == ["1"]
    join.passed("x", "texts:2", {"at": seconds + 1})
    assert join.waiting == []
