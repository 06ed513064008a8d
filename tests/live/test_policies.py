"""Policies of updates: loss of accuracy, drift of labels, thresholds, budgets, pauses; composed, and after restarts."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evertune.cli.update import _parser
from evertune.drift import MMD
from evertune.gate.predictions import Predictions
from evertune.live import (
    AllOf,
    AnyOf,
    CoolDown,
    CostBudget,
    Drift,
    LabelDrift,
    PerformanceDrop,
    Quantile,
    RollingAverage,
    Situation,
    Static,
    Threshold,
    Trigger,
    Volume,
    WarmUp,
)
from evertune.live.triggers.performance import fisher
from evertune.registry.registry import Registry
from evertune.sources.labels import LabelJoin
from evertune.tasks import TokenClassificationTask
from tests.helpers.live_worker import feed, prepare, updater

NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


def said(rows: list[dict[str, Any]]) -> Predictions:
    """What a version says that is right where the record says so, and as sure."""
    predicted = ["a" if row["record"]["right"] else "b" for row in rows]
    sure = np.array([row["record"].get("sure", 0.9) for row in rows])
    return Predictions([str(n) for n in range(len(rows))], ["a"] * len(rows), predicted, sure, sure)  # type: ignore[arg-type]


def answers(n: int, n_right: int, seed: int = 0, name: str = "r") -> list[dict[str, Any]]:
    """Records of which production has so many right, in any order; it is surer where it is right."""
    draw = random.Random(seed)
    right = [True] * n_right + [False] * (n - n_right)
    draw.shuffle(right)
    return [
        {
            "id": f"{name}{seed}-{i}",
            "origin": f"in:{i}",
            "record": {"right": one, "sure": draw.uniform(0.5, 1.0) if one else 0.5},
        }
        for i, one in enumerate(right)
    ]


def situation(
    pending: list[dict[str, Any]] | int = 0, new: int | None = None, version: int | None = 1, **others: Any
) -> Situation:
    pending = answers(pending, pending) if isinstance(pending, int) else pending
    made = None if version is None else SimpleNamespace(number=version, created=NOON - timedelta(hours=3))
    fields: dict[str, Any] = {
        "records": lambda: list(pending),
        "n_pending": len(pending),
        "n_new": len(pending) if new is None else new,
        "production": made,
        "memory_texts": list,
        "last_update": None,
        "now": NOON,
        "held_out": lambda: {"one": said(answers(200, 180)), "two": said(answers(300, 270))},
        "predict": said,
    }
    return Situation(**fields | others)


class Says(Trigger):
    def __init__(self, words: str | None, **readings: float) -> None:
        super().__init__()
        self.words, self.readings, self.explanation = words, readings, words or "no"

    def reason(self, situation: Situation) -> str | None:
        return self.words


# --- thresholds


@pytest.mark.parametrize(
    ("threshold", "readings", "limit"),
    [
        (Static(0.05), [], 0.05),
        (Static(-1.0), [9.0, 9.0], -1.0),
        (Quantile(0.5, window=3), [9.0, 1.0, 2.0], 2.0),
        (Quantile(0.5, window=4), [100.0, 9.0, 1.0, 2.0, 3.0], 2.5),
        (Quantile(1.0, window=2), [9.0, 1.0, 2.0], 2.0),
        (Quantile(0.9, window=3), [9.0, 1.0], None),
        (RollingAverage(factor=2.0, window=2), [9.0, 1.0, 2.0], 3.0),
        (RollingAverage(delta=0.5, window=2), [-1.0, 1.0], 0.5),
        (RollingAverage(delta=0.5, window=2), [1.0], None),
    ],
)
def test_limits_follow_from_the_readings_alone(threshold: Threshold, readings: list[float], limit: float) -> None:
    assert threshold.limit(readings) == threshold.limit(readings) == limit


def test_quantiles_are_numpys() -> None:
    readings = np.random.default_rng(0).normal(size=50).tolist()
    for q in (0.01, 0.37, 0.5, 0.95):
        assert Quantile(q, window=17).limit(readings) == pytest.approx(np.quantile(readings[-17:], q), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Static(math.nan), "value must be finite, got nan"),
        (lambda: Quantile(0.0), "q must be above 0 and at most 1, got 0.0"),
        (lambda: Quantile(0.9, window=0), "window must be positive, got 0"),
        (RollingAverage, "one of them more than that, got factor=1.0 and delta=0.0"),
        (lambda: RollingAverage(factor=0.5), "factor must be at least 1 and delta at least 0"),
        (lambda: RollingAverage(delta=-0.1), "got factor=1.0 and delta=-0.1"),
        (lambda: PerformanceDrop(window=0), "window must be positive, got 0"),
        (lambda: PerformanceDrop(alpha=1.0), "alpha must be between 0 and 1, got 1.0"),
        (lambda: PerformanceDrop(min_records=0), "min_records must be positive, got 0"),
        (lambda: CoolDown(Volume(), "soon"), "period must be a number and a unit .* got 'soon'"),
        (lambda: CostBudget("2 hours"), "budget must be a number and a unit .* got '2 hours'"),
        (lambda: CostBudget("2h", per="0d"), "per must be a number and a unit .* got '0d'"),
        (lambda: WarmUp(Volume()), "WarmUp needs min_records, period or both"),
        (lambda: WarmUp(Volume(), min_records=0), "min_records must be positive, got 0"),
        (lambda: WarmUp(Volume(), period="1y"), "period must be a number and a unit"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- performance


def test_the_test_of_two_shares_is_exact() -> None:
    for before, n_before, now, n_now in ((450, 500, 150, 200), (9, 10, 3, 10), (10, 10, 0, 10), (0, 5, 5, 5)):
        total, successes = n_before + n_now, before + now
        tables = range(max(0, successes - n_before), now + 1)
        exact = sum(math.comb(n_now, k) * math.comb(n_before, successes - k) for k in tables)
        expected = exact / math.comb(total, successes)
        assert fisher(before, n_before, now, n_now) == pytest.approx(expected, rel=1e-9)


def test_a_loss_of_accuracy_is_found_and_told() -> None:
    trigger = PerformanceDrop(window=200)
    assert trigger.reason(situation(answers(200, 182))) is None
    assert trigger.explanation == (
        "no performance drop: accuracy 0.910 on the newest 200 records, 0.900 when published, no loss above 0.05"
    )
    reason = trigger.reason(situation(answers(200, 182) + answers(200, 150, seed=1)))
    assert reason == (
        "performance drop: accuracy 0.750 on the newest 200 records, 0.900 when published, a loss above 0.05 "
        "(p=7.5e-07)"
    )
    assert trigger.readings == {
        "accuracy": 0.75,
        "accuracy_published": 0.9,
        "accuracy_loss": pytest.approx(0.15),
        "accuracy_loss_threshold": 0.05,
    }


def test_few_records_do_not_alarm_by_chance() -> None:
    few = PerformanceDrop(window=20, min_records=1)
    assert few.reason(situation(answers(20, 16))) is None
    assert few.explanation.endswith("0.900 when published, it may be chance (p=0.14)")
    assert few.reason(situation(answers(20, 8), version=2)) is not None  # so bad is no chance
    draw = np.random.default_rng(0)
    alarms = sum(
        PerformanceDrop(window=60, min_records=1).reason(situation(answers(60, int(draw.binomial(60, 0.9)), seed=one)))
        is not None
        for one in range(300)
    )
    assert alarms <= 3  # 1 of 100 at most


def test_a_window_is_looked_at_once_it_is_whole_and_as_long_as_it_is_new() -> None:
    trigger, bad = PerformanceDrop(window=100, min_records=10), answers(100, 50)
    assert trigger.reason(situation(bad[:99])) is None
    assert trigger.explanation == "performance: 99 of 100 labelled records for the next look"
    assert trigger.reason(situation(bad)) is not None
    assert trigger.reason(situation(bad, new=9)) is None
    assert trigger.explanation == "performance: 9 new records (10 needed for a look)"
    more = bad + answers(99, 99, seed=1)
    assert trigger.reason(situation(more)) is not None
    assert trigger.reason(situation(more, new=99)) is None  # an update was tried on the bad window
    assert trigger.reason(situation(more + answers(1, 1, seed=2), new=100)) is None
    assert trigger.explanation.startswith("no performance drop: accuracy 1.000 on")


def test_production_predicts_no_window_twice() -> None:
    asked: list[int] = []

    def predict(rows: list[dict[str, Any]]) -> Predictions:
        asked.append(len(rows))
        return said(rows)

    records = answers(450, 420)
    watching = PerformanceDrop(RollingAverage(delta=0.05, window=2), window=100)
    for n in (99, 100, 100, 150, 230, 450):
        watching.reason(situation(records[:n], predict=predict))
    assert asked == [100, 100, 200]
    asked.clear()
    PerformanceDrop(RollingAverage(delta=0.05, window=2), window=100).reason(situation(records, predict=predict))
    assert asked == [300]  # after a restart: the newest and the two before it


@pytest.mark.parametrize(
    "threshold",
    [None, Quantile(0.9, window=2), RollingAverage(delta=0.03, window=3)],
    ids=["static", "quantile", "mean"],
)
def test_a_restarted_process_decides_as_the_one_before_it(threshold: Threshold | None) -> None:
    records = [row for i, right in enumerate([92, 90, 88, 91, 60, 89, 62]) for row in answers(100, right, seed=i)]
    watching, decisions = PerformanceDrop(threshold, window=100, min_records=1), []
    for n in (60, 130, 250, 310, 430, 520, 610, 700):
        decision = watching.reason(situation(records[:n]))
        restarted = PerformanceDrop(threshold, window=100, min_records=1)
        assert restarted.reason(situation(records[:n])) == decision
        assert (restarted.readings, restarted.explanation) == (watching.readings, watching.explanation)
        decisions.append(decision is not None)
    assert decisions == [False] * 5 + [True, False, True]


def test_a_threshold_without_enough_readings_says_so() -> None:
    trigger = PerformanceDrop(Quantile(0.9, window=2), window=100)
    assert trigger.reason(situation(answers(100, 20))) is None
    assert trigger.explanation.endswith("0.900 when published; too few readings before it to say what is unusual")
    assert "accuracy_loss_threshold" not in trigger.readings


def test_late_labels_are_stood_in_for_by_confidence() -> None:
    unsure = [{"id": f"w{n}", "origin": "in", "record": {"right": False, "sure": 0.5}} for n in range(120)]
    sure = answers(120, 108, seed=7, name="w")
    trigger = PerformanceDrop(window=100, min_records=1)
    assert trigger.reason(situation(30, waiting=lambda: sure)) is None
    assert trigger.explanation.startswith("no performance drop: estimated accuracy 0.9")
    reason = trigger.reason(situation(30, waiting=lambda: sure + unsure[:60]))
    assert reason is not None
    assert reason.startswith(
        "performance drop: estimated accuracy 0.434 on the newest 100 texts without a label, 0.900"
    )
    restarted = PerformanceDrop(window=100, min_records=1)
    assert restarted.reason(situation(30, waiting=lambda: sure + unsure[:60])) == reason
    told = [row | {"record": {"right": False, "sure": 0.99}} for row in answers(100, 0)]
    confident = [row | {"record": {"right": False, "sure": 0.99}} for row in unsure]
    assert PerformanceDrop(window=100).reason(situation(64, waiting=lambda: confident)) is None
    mistaken = situation(told + answers(64, 64), new=64, waiting=lambda: confident)  # as labels have told before
    assert PerformanceDrop(window=100).reason(mistaken) is not None
    newer = [row | {"origin": "later", "record": {"right": False, "sure": 0.5}} for row in sure]  # under the same ids
    assert trigger.reason(situation(30, waiting=lambda: newer)) is not None
    labelled = situation(answers(100, 92), waiting=lambda: unsure)
    assert trigger.reason(labelled) is None  # labels are better
    assert PerformanceDrop(window=100, estimate=False).reason(situation(64, waiting=lambda: unsure)) is None


def test_a_loss_of_score_is_found_where_labels_are_not_classes() -> None:
    """As of a regression: scores in [0, 1], of which no answer is right or wrong."""

    def scored(rows: list[dict[str, Any]]) -> Predictions:
        scores = np.array([row["record"]["score"] for row in rows])
        return Predictions.scored([row["id"] for row in rows], [0.0] * len(rows), scores)

    def rows(n: int, mean: float, seed: int) -> list[dict[str, Any]]:
        scores = np.random.default_rng(seed).uniform(mean - 0.2, mean + 0.2, n)
        return [{"id": f"{seed}-{i}", "origin": f"in:{i}", "record": {"score": one}} for i, one in enumerate(scores)]

    def here(pending: list[dict[str, Any]]) -> Situation:
        return situation(pending, held_out=lambda: {"update-1": scored(rows(300, 0.7, 0))}, predict=scored)

    trigger = PerformanceDrop(window=100)
    assert trigger.reason(here(rows(100, 0.7, 1))) is None
    assert trigger.explanation.startswith("no performance drop: score 0.")
    reason = trigger.reason(here(rows(100, 0.7, 1) + rows(100, 0.6, 2)))
    assert reason is not None and "0.716 when published, a loss above 0.05" in reason
    assert trigger.readings["accuracy_loss"] == pytest.approx(0.124, abs=0.001)
    few = PerformanceDrop(Static(-1.0), window=3, min_records=1)
    assert few.reason(here(rows(3, 0.68, 3))) is None and "it may be chance (p=" in few.explanation
    late = situation(30, held_out=here([]).held_out, predict=scored, waiting=lambda: rows(300, 0.1, 4))
    assert (
        PerformanceDrop(window=100, min_records=1).reason(late) is None
    )  # a score has no confidence to stand in for it


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (situation(99, version=None), "performance: nothing is in production"),
        (
            situation(999, held_out=dict),
            "performance: cannot tell, nothing is known of it when production was published",
        ),
        (
            situation(999, predict=None),
            "performance: cannot tell, nothing is known of it when production was published",
        ),
    ],
)
def test_without_anything_to_compare_with_there_is_no_reason(here: Situation, words: str) -> None:
    trigger = PerformanceDrop()
    assert trigger.reason(here) is None
    assert (trigger.explanation, trigger.readings) == (words, {})


def test_another_version_is_looked_at_anew_and_a_look_that_fails_leaves_the_next_one_right() -> None:
    def gone(*_: Any) -> Any:
        raise OSError("gone")

    trigger, bad = PerformanceDrop(window=100), situation(answers(100, 50))
    for broken in ({"held_out": gone}, {"predict": gone}, {"records": gone}):
        with pytest.raises(OSError, match="gone"):
            trigger.reason(dataclasses.replace(bad, **broken))
    assert trigger.reason(bad) == PerformanceDrop(window=100).reason(bad) is not None
    better = dataclasses.replace(bad, production=SimpleNamespace(number=2), predict=lambda rows: said(answers(100, 95)))
    assert trigger.reason(better) is None


# --- drift


def labelled(shares: dict[str, int], n: int, seed: int) -> list[dict[str, Any]]:
    chosen = random.Random(seed).choices(list(shares), list(shares.values()), k=n)
    return [{"id": f"{seed}-{i}", "record": {"label": one}} for i, one in enumerate(chosen)]


def test_labels_in_other_shares_and_new_classes_are_drift() -> None:
    known = [row["record"]["label"] for row in labelled({"a": 5, "b": 4, "c": 1}, 600, seed=0)]
    usual = labelled({"a": 5, "b": 4, "c": 1}, 300, seed=1)
    for shares in ({"a": 1, "b": 4, "c": 5}, {"a": 5, "b": 4, "d": 1, "e": 3}):
        trigger = LabelDrift()
        assert trigger.reason(situation(usual, memory_labels=lambda: known)) is None
        assert trigger.explanation.startswith("no label drift: score ")
        pending = usual + labelled(shares, 200, seed=2)
        reason = trigger.reason(situation(pending, memory_labels=lambda: known))
        assert reason is not None
        assert reason.startswith("label drift: score ")
        assert 300 < int(reason.rsplit(" ", 1)[1]) <= 400
        assert trigger.readings["label_drift_score"] > trigger.readings["label_drift_threshold"]
        restarted = LabelDrift()
        assert restarted.reason(situation(pending, memory_labels=lambda: known)) == reason
        assert restarted.readings == trigger.readings


def test_label_drift_counts_each_combination_of_several_labels_and_needs_enough_of_them() -> None:
    known: list[Any] = [["x", "y"], ["y"]] * 100
    pending = [{"id": str(i), "record": {"label": [["y", "x"], ["y"]][i % 2]}} for i in range(128)]
    trigger = LabelDrift()
    assert trigger.reason(situation(pending, memory_labels=lambda: known)) is None
    assert trigger.explanation.startswith("no label drift")
    assert trigger.reason(situation(pending, version=2, memory_labels=lambda: known[:30])) is None
    assert trigger.explanation.startswith("label drift: cannot tell, a reference of 30 records is too small")


def graded(n: int, seed: int, turned: bool = False) -> list[dict[str, Any]]:
    """Records with two numbers as a label: stars, a few values, and a price. Turned, only the stars differ."""
    draw = random.Random(seed)
    stars = [[1, 2, 3, 4, 5], [5, 5, 5, 5, 1]][turned]
    return [{"id": f"{seed}-{i}", "record": {"label": [draw.choice(stars), draw.gauss(40, 12)]}} for i in range(n)]


@pytest.mark.parametrize("several", [False, True])
def test_numbers_that_are_distributed_otherwise_are_label_drift(several: bool) -> None:
    def rows(*arguments: Any) -> list[dict[str, Any]]:
        found = graded(*arguments)
        return found if several else [{**row, "record": {"label": row["record"]["label"][0]}} for row in found]

    known = [row["record"]["label"] for row in rows(600, 0)]
    names = lambda label: []  # noqa: E731
    trigger, usual = LabelDrift(), rows(300, 1)
    assert trigger.reason(situation(usual, memory_labels=lambda: known, label_names=names)) is None
    assert trigger.explanation.startswith("no label drift: score ")
    pending = usual + rows(200, 2, True)
    reason = trigger.reason(situation(pending, memory_labels=lambda: known, label_names=names))
    assert reason is not None and reason.startswith("label drift: score ")
    assert 300 < int(reason.rsplit(" ", 1)[1]) <= 400
    assert LabelDrift().reason(situation(pending, memory_labels=lambda: known, label_names=names)) == reason
    few = LabelDrift()
    assert few.reason(situation(pending, memory_labels=lambda: known[:30], label_names=names)) is None
    assert few.explanation.startswith("label drift: cannot tell, a reference of 30 records is too small")


def test_entities_drift_by_their_types_and_not_by_their_words() -> None:
    """Each text has tags of its own, so that whole labels never come again."""

    def rows(n: int, seed: int, share: float) -> list[dict[str, Any]]:
        draw = random.Random(seed)
        kinds = [draw.choices(["ORG", "LOC"], [1 - share, share])[0] for _ in range(n)]
        tags = [[*["O"] * draw.randrange(50), f"B-{kind}", *["O"] * draw.randrange(50)] for kind in kinds]
        return [{"id": f"{seed}-{i}", "record": {"label": one}} for i, one in enumerate(tags)]

    names = TokenClassificationTask().label_names
    known = [row["record"]["label"] for row in rows(600, 0, 0.3)]
    usual, trigger = rows(300, 1, 0.3), LabelDrift()
    assert trigger.reason(situation(usual, memory_labels=lambda: known, label_names=names)) is None
    assert trigger.explanation.startswith("no label drift: score ")
    assert trigger.reason(situation(usual + rows(200, 2, 0.9), memory_labels=lambda: known, label_names=names))


def numbers(n: int, seed: int, shift: float = 0.0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"id": f"{seed}-{i}", "record": {"text": f"{draw.gauss(shift, 1.0):.6f}"}} for i in range(n)]


def read_number(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(text)] for text in texts])


def test_a_threshold_decides_on_drifts_score_in_the_detectors_place() -> None:
    memory = [row["record"]["text"] for row in numbers(256, seed=0)]
    pending = numbers(800, seed=1, shift=0.6) + numbers(300, seed=2, shift=2.0)

    def trigger(threshold: Threshold | None) -> Drift:
        return Drift(MMD(arl=2_000, reference_size=256, window_size=32), read_number, threshold=threshold)

    own = trigger(None)
    assert own.reason(situation(pending, memory_texts=lambda: memory)) is not None
    assert int(own.explanation.rsplit(" ", 1)[1]) < 400  # the small, lasting shift
    watching = trigger(RollingAverage(factor=4.0, window=10))
    decisions = []
    for n in (70, 333, 801, 860, 1_100):  # whatever the cuts
        decisions.append(watching.reason(situation(pending[:n], memory_texts=lambda: memory)))
        restarted = trigger(RollingAverage(factor=4.0, window=10))
        assert restarted.reason(situation(pending[:n], memory_texts=lambda: memory)) == decisions[-1]
        assert (restarted.explanation, restarted.readings) == (watching.explanation, watching.readings)
        if n == 70:
            assert watching.explanation.endswith("too few before it to say what is unusual (2 tests so far)")
            assert set(watching.readings) == {"drift_score"}
    assert [decision is not None for decision in decisions] == [False, False, False, True, True]
    assert decisions[-1] == decisions[-2]
    assert str(decisions[-1]).endswith("at record 832")


def test_a_detector_of_single_numbers_watches_through_a_featuriser() -> None:
    pytest.importorskip("river")
    from evertune.drift.scalars import PageHinkley

    memory = [row["record"]["text"] for row in numbers(300, seed=0)]
    pending = numbers(200, seed=1) + numbers(100, seed=2, shift=2.0)
    trigger = Drift(PageHinkley(arl=5_000, reference_size=200), read_number)
    assert trigger.reason(situation(pending[:200], memory_texts=lambda: memory)) is None
    reason = trigger.reason(situation(pending, memory_texts=lambda: memory))
    assert reason is not None
    assert 200 < int(reason.rsplit(" ", 1)[1]) < 230
    threshold = Drift(PageHinkley(arl=5_000, reference_size=200), read_number, threshold=Static(1e6))
    assert threshold.reason(situation(pending, memory_texts=lambda: memory)) is None
    assert threshold.explanation.endswith("the alarm is above 1e+06")


# --- pauses and budgets


def test_cool_down_holds_back_after_any_update() -> None:
    trigger = CoolDown(Says("due", drift_score=0.5), "6h")
    assert trigger.reason(situation(1)) == "due"
    assert trigger.reason(situation(1, last_update=NOON - timedelta(hours=6))) == "due"
    for last in (NOON - timedelta(hours=5, minutes=59), NOON + timedelta(hours=1)):
        assert trigger.reason(situation(1, last_update=last)) is None
    assert trigger.explanation == "due; too soon: cooling down until 2026-03-10 19:00 UTC (6h)"
    assert trigger.readings == {"drift_score": 0.5}
    assert trigger.reason(situation(1, last_update=NOON + timedelta(days=400))) == "due"  # a clock that was wrong


def test_warm_up_holds_back_until_production_has_met_the_world() -> None:
    trigger = WarmUp(Says("due", x=1.0), min_records=100, period="4h")
    assert trigger.reason(situation(99, new=1)) is None
    assert trigger.explanation == "due; too early: warming up, 99 of 100 records, until 2026-03-10 13:00 UTC"
    assert trigger.readings == {"x": 1.0}
    assert trigger.reason(situation(100)) is None
    assert trigger.reason(situation(100, now=NOON + timedelta(hours=1))) == "due"
    assert trigger.reason(situation(99, version=None)) is None
    assert trigger.reason(situation(100, version=None)) == "due"
    assert WarmUp(Says("due"), period="4h").reason(situation(1, version=None)) == "due"


def test_a_budget_vetoes_until_the_time_has_passed() -> None:
    hour = timedelta(hours=1)
    updates = [(NOON - 30 * hour, 9e9), (NOON - 20 * hour, 3_000.0), (NOON - 2 * hour, 4_200.0)]
    budget = CostBudget("2h", per="1d")
    here = situation(300, updates=lambda: updates[:2])
    assert budget.reason(here) == "updates have cost 0:50:00 of 2h per 1d"
    assert budget.readings == {"update_seconds_spent": 3_000.0, "update_seconds_budget": 7_200.0}
    assert AllOf([Volume(200), budget]).reason(here) == (
        "300 new records (200 asked for); updates have cost 0:50:00 of 2h per 1d"
    )
    spent = situation(300, updates=lambda: updates)
    both = AllOf([AnyOf([Volume(200), Says(None)]), budget])
    assert both.reason(spent) is None
    assert both.explanation == "300 new records (200 asked for); no; updates have cost 2:00:00 of 2h per 1d"
    assert both.reason(dataclasses.replace(spent, now=NOON + 4 * hour)) is not None  # the first is a day ago
    assert budget.reason(situation(300)) == "updates have cost 0:00:00 of 2h per 1d"


# --- as evertune runs them


def test_policies_are_read_from_yaml(tmp_path: Path) -> None:
    names = "evertune.live.triggers", "evertune.live.triggers.thresholds", "evertune.drift.mmd"
    triggers, thresholds, detectors = names
    config = tmp_path / "live.yaml"
    config.write_text(f"""
registry: r
source: {{class_path: evertune.sources.FolderSource, init_args: {{path: inbox}}}}
model: {{class_path: evertune.lightning_modules.SequenceClassificationModule, init_args: {{model_name_or_path: x}}}}
trigger:
  class_path: {triggers}.AllOf
  init_args:
    triggers:
      - class_path: {triggers}.AnyOf
        init_args:
          triggers:
            - class_path: {triggers}.PerformanceDrop
              init_args:
                threshold: {{class_path: {thresholds}.RollingAverage, init_args: {{delta: 0.1, window: 5}}}}
            - class_path: {triggers}.LabelDrift
            - class_path: {triggers}.Drift
              init_args:
                detector: {{class_path: {detectors}.MMD, init_args: {{reference_size: 256}}}}
                threshold: {{class_path: {thresholds}.Quantile, init_args: {{q: 0.99}}}}
            - class_path: {triggers}.CoolDown
              init_args: {{trigger: {{class_path: {triggers}.Volume}}, period: 6h}}
            - class_path: {triggers}.WarmUp
              init_args: {{trigger: {{class_path: {triggers}.Every}}, min_records: 9}}
      - class_path: {triggers}.CostBudget
        init_args: {{budget: 2h, per: 1d}}
""")
    parser = _parser("evertune update")
    chosen = parser.parse_args(["--config", str(config)])
    trigger = parser.instantiate_classes(chosen).trigger
    performance, labels, drift, cool, warm = trigger.triggers[0].triggers
    assert (performance.threshold.delta, performance.threshold.window) == (0.1, 5)
    assert isinstance(labels, LabelDrift)
    assert (drift.detector.reference_size, drift.threshold.q) == (256, 0.99)
    assert (cool.trigger.min_records, cool.period) == (200, "6h")
    assert warm.min_records == 9
    assert trigger.triggers[1].budget == "2h"
    again = tmp_path / "again.yaml"
    again.write_text(parser.dump(chosen))
    assert isinstance(parser.instantiate_classes(parser.parse_args(["--config", str(again)])).trigger, AllOf)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with version 1 in production, which knows business from sport."""
    folder = tmp_path_factory.mktemp("policies")
    prepare(folder)
    feed(folder, "a", ["business", "sport"], n=200)
    assert updater(folder).run().status == "promoted"
    return folder


def test_an_updater_knows_what_policies_ask_for(first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "live"
    shutil.copytree(first, folder)
    names = ["business", "sport"]
    feed(folder, "b", names, n=60, seed=5)
    lines = [json.loads(line) for line in (folder / "inbox/b.jsonl").read_text().splitlines()]
    texts = [{"id": f"late-{row['id']}", "text": row["text"]} for row in lines]
    other = {"business": "sport", "sport": "business"}
    wrong = [row | {"id": f"wrong-{row['id']}", "label": other[row["label"]]} for row in lines]
    (folder / "inbox/c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    live = updater(folder, label_join=LabelJoin(window=1_000), trigger=PerformanceDrop(window=60, min_records=60))
    with live.registry.lease():
        live.intake()
    here = live.situation()
    assert len(here.waiting()) == 60
    assert here.waiting()[0] == {"id": "late-b-0", "origin": here.waiting()[0]["origin"], "record": texts[0]}
    assert sorted(here.memory_labels()) == sorted(names * 20)
    assert {name: len(one) for name, one in here.held_out().items()} == {"update-1": 40}
    assert here.predict is not None
    accuracy = here.predict(here.records()).accuracy
    assert accuracy > 0.9
    assert here.predict(here.waiting()).predicted == here.predict(here.records()).predicted
    ((made, seconds),) = here.updates()
    recorded = live.registry.version(1).manifest.seconds
    assert (made, seconds) == (live.registry.version(1).created, recorded["train"] + recorded["evaluate"])
    assert live.trigger.reason(here) is None
    assert live.trigger.explanation.startswith(f"no performance drop: accuracy {accuracy:.3f} on the newest 60")

    (folder / "inbox/d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    spent = CostBudget(f"{seconds / 2:.3f}s", per="1d")
    vetoed = updater(folder, trigger=AllOf([PerformanceDrop(window=60), spent])).run()
    assert vetoed.status == "nothing"
    assert "performance drop: accuracy 0." in vetoed.words
    trigger = AllOf([PerformanceDrop(window=60), CostBudget("1d", per="1d")])
    outcome = updater(folder, trigger=trigger).run()
    assert outcome.status in ("promoted", "refused", "stopped")
    reason = Registry(folder / "registry").version(2).manifest.reason
    assert reason.startswith("performance drop: accuracy 0.")
    assert "updates have cost" in reason
