"""The gate, on predictions drawn from a model of two versions: what it lets through, and what it does not."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from evertune.gate.best import Best, still_best
from evertune.gate.checks.forgetting import forgetting_in_all, since_best
from evertune.gate.comparison import PairedTest, aligned, pool
from evertune.gate.gate import Gate
from evertune.gate.label_noise import label_noise, learned_classes
from evertune.gate.predictions import Cost, Predictions
from evertune.gate.statistics import binomial_tail, bootstrap, calibration_error, calibration_test, holm, kappa, mcnemar
from evertune.gate.untrained import nearest_class_means
from evertune.gate.verdict import MANY, Check, Verdict

# --- a model of two versions and their records


@dataclass(frozen=True)
class World:
    """Two versions and an update.

    Natural mistakes of the two versions are mostly the same ones, and unsure; a wrong label is put in place of a right
    one at random, and the challenger has learned a part of those it was trained on by heart.
    """

    n_past: tuple[int, ...] = (200,)
    n_held_out: int = 75
    n_trained: int = 225
    n_classes: int = 10
    champion: float = 0.95
    challenger: float = 0.95
    champion_new: float | None = None
    challenger_new: float | None = None
    new_classes: float = 0.0
    flipped: float = 0.0
    by_heart: float = 0.3
    garbage: bool = False
    undertrained: bool = False
    mislabelled_as_new: float = 0.0
    resembling: float = 0.9

    def draw(self, seed: int) -> tuple[dict[str, Predictions], dict[str, Predictions], dict[str, Predictions]]:
        """Predictions of the champion and of the challenger, and answers without training."""
        rng, extra = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        old, new, untrained = {}, {}, {}
        for number, n in enumerate(self.n_past):
            name = f"past {number}"
            old[name], new[name], untrained[name] = self._slice(rng, extra, n, self.champion, self.challenger)
        before = self.champion if self.champion_new is None else self.champion_new
        after = self.challenger if self.challenger_new is None else self.challenger_new
        for name, n in (("new", self.n_held_out), ("trained", self.n_trained)):
            fresh = replace(self, by_heart=self.by_heart if name == "trained" else 0.0)
            old[name], new[name], untrained[name] = fresh._slice(rng, extra, n, before, after, is_new=True)
        return old, new, untrained

    def _slice(
        self,
        rng: np.random.Generator,
        extra: np.random.Generator,
        n: int,
        before: float,
        after: float,
        is_new: bool = False,
    ) -> tuple[Predictions, Predictions, Predictions]:
        truth = rng.integers(self.n_classes, size=n)
        if is_new:
            truth = np.where(rng.random(n) < self.new_classes, self.n_classes + truth % 2, truth)
        labels = truth.copy()
        if is_new and self.flipped:
            wrong = rng.permutation(n)[: round(self.flipped * n)]
            labels[wrong] = (labels[wrong] + rng.integers(1, self.n_classes, size=len(wrong))) % self.n_classes
        if is_new:
            labels = np.where(extra.random(n) < self.mislabelled_as_new, self.n_classes, labels)
        difficulty = rng.random(n)
        own = 0.2  # the part of a version's mistakes that is its own
        right_before, right_after = (
            np.where(rng.random(n) < own, rng.random(n), difficulty) < accuracy for accuracy in (before, after)
        )
        confused = (truth + rng.integers(1, self.n_classes, size=n)) % self.n_classes
        said_before = np.where(right_before & (truth < self.n_classes), truth, confused)
        said_after = np.where(right_after, truth, confused)
        if self.undertrained:  # no new class is learned yet, and both versions are sure of another one
            said_after = np.where(truth < self.n_classes, said_after, confused % self.n_classes)
            said_before = np.where(truth < self.n_classes, said_before, said_after)
        if is_new and self.garbage:
            labels = rng.integers(self.n_classes, size=n)
            truth = extra.integers(self.n_classes, size=n)
            said_before, said_after = np.zeros(n, int), rng.integers(2, size=n)
        learned = (rng.random(n) < self.by_heart) & (labels != truth)
        said_after = np.where(learned, labels, said_after)
        sure = rng.beta(12, 1, size=n), rng.beta(3, 2, size=n)
        ids = [str(number) for number in range(n)]
        names = [f"class {label}" for label in labels]
        made = []
        for said in (said_before, said_after):
            is_sure = (said == truth) | (self.undertrained & (truth >= self.n_classes))
            confidence = np.where(is_sure, sure[0] * rng.uniform(0.95, 1, n), sure[1] * rng.uniform(0.9, 1, n))
            of_label = np.where(said == labels, confidence, (1 - confidence) / self.n_classes)
            made.append(Predictions(ids, list(names), [f"class {one}" for one in said], confidence, of_label))
        other = extra.integers(self.n_classes + 2 * (self.new_classes > 0), size=n)
        resembles = np.where(extra.random(n) < self.resembling, truth, other)
        unknown = np.full(n, np.nan)
        answers = Predictions(ids, list(names), [f"class {one}" for one in resembles], unknown, unknown)
        return made[0], made[1], answers


def refusals(world: World, runs: int, gate: Gate | None = None) -> float:
    """The share of updates that the gate refuses."""
    gate = gate or Gate()
    refused = []
    for seed in range(runs):
        old, new, untrained = world.draw(seed)
        refused.append(not gate.judge(old, new, "new", trained="trained", untrained=untrained).passed)
    return float(np.mean(refused))


# --- what passes and what does not

CLEAN = {
    "one small slice": World(n_past=(60,)),
    "ten small slices": World(n_past=(60,) * 10, champion=0.97, challenger=0.97),
    "a hard task": World(n_past=(60,) * 5, champion=0.8, challenger=0.8),
    "two classes": World(n_classes=2, champion=0.9, challenger=0.9),
    "a new domain": World(champion_new=0.65, challenger_new=0.93),
    "a new class": World(new_classes=0.4),
    "only new classes": World(new_classes=1.0),
    "a better version": World(champion=0.85, challenger=0.95),
    "undertrained new classes": World(new_classes=0.4, undertrained=True),
    "only undertrained new classes": World(new_classes=1.0, undertrained=True),
    "undertrained new classes that are alike": World(new_classes=0.4, undertrained=True, resembling=0.6),
    "undertrained by a weak champion": World(new_classes=0.4, undertrained=True, champion=0.7, challenger=0.7),
}
POISONED = {
    "a tenth flipped": World(flipped=0.1),
    "a tenth flipped, mostly learned by heart": World(flipped=0.1, by_heart=0.9),
    "a tenth flipped, few past records": World(flipped=0.1, n_past=(60,)),
    "a tenth flipped, all held out": World(flipped=0.1, n_held_out=400, n_trained=1),
    "a tenth flipped, a harder task": World(flipped=0.1, n_held_out=100, n_trained=300, champion=0.9, challenger=0.9),
    "a fifth flipped": World(flipped=0.2),
    "half flipped": World(flipped=0.5, challenger=0.93),
    "garbage": World(garbage=True),
    "garbage in two classes": World(garbage=True, n_classes=2),
    "half of a new class is another": World(new_classes=0.3, mislabelled_as_new=0.3),
    "half of an undertrained new class is another": World(new_classes=0.3, mislabelled_as_new=0.3, undertrained=True),
}
RUNS = 60


@pytest.mark.parametrize("world", CLEAN.values(), ids=CLEAN.keys())
def test_at_most_3_percent_of_clean_updates_are_refused(world: World) -> None:
    assert refusals(world, RUNS) <= 0.03


@pytest.mark.parametrize("world", POISONED.values(), ids=POISONED.keys())
def test_at_least_99_percent_of_poisoned_updates_are_refused(world: World) -> None:
    assert refusals(world, RUNS) >= 0.99


def test_without_the_records_trained_on_a_hundred_held_out_ones_find_a_tenth_of_flips_mostly() -> None:
    world = World(flipped=0.1, n_held_out=100)
    gate = Gate()
    found = []
    for seed in range(RUNS):
        old, new, _ = world.draw(seed)
        found.append(not gate.judge(_without(old), _without(new), new="new").passed)
    assert np.mean(found) >= 0.7


def test_labels_that_a_person_has_given_are_not_taken_for_wrong_ones() -> None:
    """They were asked for where production is unsure: it contradicts a fifth of them. The others are judged as ever."""
    gate, worlds = Gate(), {"a tenth": World(flipped=0.1, n_held_out=150, n_trained=450), "a fifth": World(flipped=0.2)}
    for world in worlds.values():
        for seed in range(5):
            old, new, untrained = world.draw(seed)
            judge = partial(gate.judge, old, new, "new", trained="trained", untrained=untrained)
            ids = {name: set(new[name].ids) for name in ("new", "trained")}
            assert judge(reviewed=ids).passed
            half = {name: {one for one in of if int(one) % 2} for name, of in ids.items()}
            assert {check.name for check in judge(reviewed=half).failed} == {"label noise"}


def test_the_past_is_compared_without_what_was_reviewed() -> None:
    """Else a review would raise the rate of contradictions that later updates are allowed."""
    old, new, _ = World(n_past=(200, 200), flipped=0.1).draw(0)
    hard, hard_new, _ = World(flipped=0.5).draw(1)
    name = "past 1"
    before, after = old | {name: hard["trained"]}, new | {name: hard_new["trained"]}
    judge = partial(Gate(max_forgetting=None, max_class_drop=None).judge, before, after, "new", trained="trained")
    assert not any(check.name == "label noise" for check in judge().failed)
    assert any(check.name == "label noise" for check in judge(reviewed={name: set(after[name].ids)}).failed)


def test_a_real_loss_is_refused_and_a_small_one_is_not() -> None:
    assert refusals(World(n_past=(500, 500), challenger=0.85), 30) == 1
    assert refusals(World(n_past=(500, 500), challenger=0.94), 30) <= 0.1


@pytest.mark.parametrize("new_classes", [0.4, 1.0])
def test_labels_of_new_classes_are_left_open_where_nothing_can_be_compared(new_classes: float) -> None:
    for seed in range(5):
        old, new, _ = World(new_classes=new_classes, undertrained=True).draw(seed)
        verdict = Gate().judge(old, new, "new", trained="trained")
        assert verdict.passed, verdict.words()
        (check,) = (check for check in verdict.undecided if check.slice == "new, new classes")
        assert "there are no features of a pretrained encoder" in check.words


def test_both_possibilities_are_named() -> None:
    old, new, untrained = World(new_classes=0.4, undertrained=True).draw(0)
    verdict = Gate().judge(old, new, "new", trained="trained", untrained=untrained)
    (words,) = (check.words for check in verdict.checks if check.slice == "new, new classes")
    assert "the new version is right on 0.0 % of them: they are not learned yet, train longer" in words
    old, new, untrained = World(new_classes=0.3, mislabelled_as_new=0.3, undertrained=True).draw(0)
    words = Gate().judge(old, new, "new", trained="trained", untrained=untrained).words()
    assert "either their labels are wrong, or the classes are so alike that they need longer training" in words
    old, new, _ = World(flipped=0.3).draw(0)
    words = Gate().judge(old, new, "new", trained="trained").words()
    assert "either labels are wrong, or these records are unlike those of the past" in words


def test_a_champion_that_has_not_learned_a_class_is_not_asked_about_its_labels() -> None:
    names, rng = ["a", "b", "c"], np.random.default_rng(0)

    def version(right: dict[str, float], n: int) -> Predictions:
        labels = [names[number % 3] for number in range(n)]
        made = [label if rng.random() < right[label] else "a" for label in labels]
        return Predictions([str(number) for number in range(n)], labels, made, np.full(n, 0.9), np.full(n, 0.5))

    good = {"a": 1.0, "b": 0.95, "c": 0.1}
    assert learned_classes([version(good, 90)], [version(good, 90)]) == {"a", "b"}
    assert learned_classes([version(good, 90)], []) == {"a", "b", "c"}
    old, new = (
        {"old": version(good, 30), "new": version(good, 300).pick([2 + 3 * n for n in range(90)])} for _ in range(2)
    )
    assert Gate().judge(old, new, "new").passed


# --- the first version


@pytest.mark.parametrize(
    ("right", "without", "refused"),
    [
        (90, 85, []),
        (84, 85, []),
        (60, 90, ["without training"]),
        (25, 20, ["largest class"]),
        (20, 90, ["largest class", "without training"]),
    ],
)
def test_a_first_version_must_be_better_than_no_training(right: int, without: int, refused: list[str]) -> None:
    labels = [f"c{number % 4}" for number in range(100)]
    order = np.random.default_rng(0).permutation(100)

    def version(n_right: int) -> Predictions:
        made = [label if place < n_right else "?" for place, label in zip(order, labels, strict=True)]
        return Predictions([str(n) for n in range(100)], labels, made, np.full(100, 0.9), np.full(100, 0.5))

    verdict = Gate().judge(None, {"new": version(right)}, "new", untrained={"new": version(without)})
    assert [check.name for check in verdict.failed] == refused
    assert Gate(max_below_untrained=None).judge(None, {"new": version(right)}, "new").passed
    alone = Gate().judge(None, {"new": version(right)}, "new")
    assert [check.name for check in alone.undecided] == ["without training"]
    assert "cannot tell (100 records): there are no features" in alone.undecided[0].words


def test_a_first_version_of_few_records_is_left_open() -> None:
    verdict = Gate().judge(None, {"new": classes({"a": (5, 5), "b": (0, 5)})}, "new")
    assert [check.state for check in verdict.checks if check.name == "largest class"] == ["cannot tell"]


def test_nearest_class_means_leave_each_record_out() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    numbers = np.arange(200) % 5
    features, labels = centres[numbers] + 0.3 * rng.normal(size=(200, 16)), [f"c{number}" for number in numbers]
    assert np.mean([a == b for a, b in zip(nearest_class_means(features, labels), labels, strict=True)]) > 0.95
    noise = nearest_class_means(rng.normal(size=(200, 16)), labels)
    assert np.mean([a == b for a, b in zip(noise, labels, strict=True)]) < 0.35  # its own label does not leak
    assert nearest_class_means(features[:6], ["a"] * 5 + ["b"])[5] == ""
    assert nearest_class_means(features[:3], ["a"] * 3) == [""] * 3
    assert nearest_class_means(np.zeros((0, 3)), []) == []


def _without(predictions: dict[str, Predictions]) -> dict[str, Predictions]:
    return {name: one for name, one in predictions.items() if name != "trained"}


# --- single checks


def said(right: int, n: int, confidence: float = 0.9, wrong: str = "law", start: int = 0) -> Predictions:
    """The first ``right`` of ``n`` sport records right."""
    ids = [str(start + number) for number in range(n)]
    predicted = ["sport"] * right + [wrong] * (n - right)
    return Predictions(ids, ["sport"] * n, list(predicted), np.full(n, confidence), np.full(n, 0.5))


def failed(verdict: Verdict) -> list[tuple[str, str]]:
    return [(check.name, check.slice) for check in verdict.failed]


def test_forgetting_needs_a_loss_over_the_limit_that_is_no_chance() -> None:
    gate = Gate(max_label_noise=None)
    judge = lambda before, after: gate.judge(  # noqa: E731
        {"old": before, "new": said(50, 50)}, {"old": after, "new": said(50, 50)}, new="new"
    )
    assert judge(said(185, 200), said(162, 200)).words() == (
        "refused: on 'old' the new version is right on 81.0 % of 200 held-out records, the one in production on 92.5 % "
        "(p < 0.0001, limit 2.0 points)"
    )
    assert judge(said(60, 60), said(57, 60)).passed  # 5 points, by chance perhaps (p = 0.125)
    assert judge(said(1000, 1000), said(985, 1000)).passed  # certain, but 1.5 points only
    assert failed(judge(said(1000, 1000), said(975, 1000))) == [("forgetting", "old")]


def test_many_small_slices_show_together_what_none_shows_alone() -> None:
    old = {f"{n}": said(40, 40) for n in range(8)} | {"new": said(50, 50)}
    new = {f"{n}": said(37, 40) for n in range(8)} | {"new": said(50, 50)}
    assert failed(Gate(max_label_noise=None).judge(old, new, new="new")) == [("forgetting", "all past slices")]


def test_a_collapse_is_refused_without_a_test() -> None:
    old = {f"{n}": said(60, 60) for n in range(10)} | {"new": said(50, 50)}
    new = {**old, "3": said(50, 60)}
    strict = Gate(max_label_noise=None, alpha=1e-9)
    assert failed(strict.judge(old, new, new="new")) == [("forgetting", "3")]
    assert "limit 15.0 points" in strict.judge(old, new, new="new").words()
    assert Gate(max_label_noise=None, alpha=1e-9, max_drop=None).judge(old, new, new="new").passed


def test_the_new_records_must_not_get_worse_either() -> None:
    old, new = {"old": said(90, 100), "new": said(95, 100)}, {"old": said(90, 100), "new": said(80, 100)}
    assert ("new records", "new") in failed(Gate(max_label_noise=None).judge(old, new, new="new"))
    assert ("new accuracy", "new") in failed(Gate(min_new_accuracy=0.9).judge(old, new, new="new"))


def test_negative_flips_are_counted_where_accuracy_is_the_same() -> None:
    before, after = said(80, 100), said(80, 100)
    moved = after.pick(list(range(20, 100)) + list(range(20)))
    after = Predictions(before.ids, before.labels, moved.predicted, after.confidence, after.label_probability)
    verdict = Gate(max_label_noise=None).judge(
        {"old": before, "new": said(9, 9)}, {"old": after, "new": said(9, 9)}, "new"
    )
    assert failed(verdict) == [("negative flips", "all past slices")]
    assert "20 of 100 past records that production has right are wrong now" in verdict.words()


def test_confidence_that_lost_its_meaning_is_refused() -> None:
    old = {"old": said(270, 300, 0.9), "new": said(50, 50)}
    new = {"old": said(270, 300, 0.6), "new": said(50, 50)}
    assert failed(Gate().judge(old, new, "new")) == [("calibration error", "all past slices")]


def test_costs() -> None:
    old, costs = {"old": said(9, 9), "new": said(9, 9)}, (Cost(5.0, 50.0, 100), Cost(9.0, 60.0, 200))
    verdict = Gate().judge(old, old, "new", costs=costs)
    assert failed(verdict) == [("latency of a text", ""), ("size", "")]
    assert "the latency of a text is 9.0 ms, in production 5.0 ms (limit 1.5 times as much)" in verdict.words()
    assert Gate(max_latency_ratio=None, max_size_ratio=2).judge(old, old, "new", costs=costs).passed


def test_a_version_that_diverged_is_refused() -> None:
    old = {"old": said(90, 100), "new": said(50, 50)}
    new = {"old": said(90, 100, np.nan), "new": said(50, 50, np.nan)}
    verdict = Gate().judge(old, new, "new")
    assert ("without a number", "all slices") in failed(verdict)
    assert "no number for 150 of 150 records: its training diverged" in verdict.words()
    json.dumps(verdict.to_dict(), allow_nan=False)
    assert Gate().judge(new, old, "new").passed  # a diverged production is no reason to refuse a good version


def test_groups_of_a_field_are_compared_too() -> None:
    gate = Gate(slice_by="region", max_label_noise=None)
    rows = [{"id": str(n), "record": {"region": "north" if n < 100 else None}} for n in range(50, 200)]
    groups = gate.groups(rows)
    assert len(groups) == 50 and set(groups.values()) == {"north"}
    before, after = said(1000, 1000), said(1000, 1000)
    after.predicted[60:80] = ["law"] * 20
    old, new = {"old": before, "new": said(9, 9, start=5000)}, {"old": after, "new": said(9, 9, start=5000)}
    assert gate.judge(old, new, "new").passed
    assert failed(gate.judge(old, new, "new", groups=groups)) == [("group", "region = north")]


def test_the_first_version_needs_no_champion() -> None:
    assert Gate().judge(None, {"new": said(30, 100)}, "new").passed
    verdict = Gate(min_accuracy=0.5).judge(None, {"new": said(30, 100)}, "new")
    assert verdict.words() == (
        "refused: on 'all slices' the new version is right on 30.0 % of 100 held-out records "
        "(at least 50.0 % is asked for)"
    )


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_slices_and_ties(n: int) -> None:
    slices = {"old": said(n, n), "none": said(0, 0), "new": said(0, n)}
    verdict = Gate(min_new_accuracy=None).judge(slices, slices, "new")
    assert verdict.passed
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_every_limit_off_checks_next_to_nothing() -> None:
    names = [name for name in vars(Gate()) if name.startswith(("max_", "min_"))]
    gate = Gate(**dict.fromkeys(names))
    old, new = {"old": said(90, 100), "new": said(90, 100)}, {"old": said(0, 100), "new": said(0, 100)}
    verdict = gate.judge(old, new, "new", costs=(Cost(1, 1, 1), Cost(9, 9, 9)))
    assert [check.name for check in verdict.checks] == ["without a number"]
    assert gate.judge_data([]) == []


# --- many small losses


def ratchet(gate: Gate, start: int, step: int, n: int = 500, updates: int = 24) -> tuple[int, Verdict]:
    """Updates that each lose a little, until one is refused: how many were promoted, and the last verdict."""
    right, best, new = start, dict[str, Best](), {"new": said(50, 50, start=10_000)}
    for number in range(2, 2 + updates):
        old, now = {"old": said(right, n)} | new, {"old": said(right - step, n)} | new
        verdict = gate.judge(old, now, "new", best=best)
        if not verdict.passed:
            return number - 2, verdict
        best = still_best({"old": Best(number - 1, old["old"])} | gate.standing(best), now, gate.alpha)
        right -= step
    return updates, verdict


@pytest.mark.parametrize("step", [10, 5, 3])
def test_losses_that_each_pass_are_refused_once_they_add_up(step: int) -> None:
    promoted, verdict = ratchet(Gate(max_label_noise=None), 490, step)
    assert promoted == 25 // step  # five points of 500 records
    assert failed(verdict) == [("forgetting in all", "old")]
    assert "the best so far, version 1, on 98.0 %" in verdict.words()
    assert ratchet(Gate(max_label_noise=None, max_total_forgetting=None, max_class_drop=None), 490, step)[0] == 24


def test_small_slices_add_up_too() -> None:
    names = [f"{n}" for n in range(8)]
    new = {"new": said(50, 50, start=10_000)}
    best = {name: Best(1, said(40, 40)) for name in names}
    old, now = ({name: said(right, 40) for name in names} | new for right in (37, 37))
    verdict = Gate(max_label_noise=None).judge(old, now, "new", best=best)
    assert failed(verdict) == [("forgetting in all", "all past slices")]
    assert "the best so far of each slice on 100.0 %" in verdict.words()


@pytest.mark.parametrize("name", ["old", "all past slices"])
def test_a_new_normal_is_accepted_by_name_and_reported(name: str) -> None:
    new = {"new": said(50, 50, start=10_000)}
    old, now = {"old": said(465, 500)} | new, {"old": said(460, 500)} | new
    best = {"old": Best(3, said(490, 500))}
    assert failed(Gate(max_label_noise=None).judge(old, now, "new", best=best)) == [("forgetting in all", "old")]
    assert not Gate(max_label_noise=None, accepted={name: 3}).judge(old, now, "new", best=best).passed
    gate = Gate(max_label_noise=None, accepted={name: 7})
    verdict = gate.judge(old, now, "new", best=best)
    assert verdict.passed and gate.standing(best) == {}
    (report,) = (check.words for check in verdict.checks if check.name == "accepted")
    assert report == (
        "on 'old' version 3, which was right on 98.0 %, is no longer the standard (gate.accepted); "
        "the new version is right on 92.0 %"
    )


def test_chance_does_not_raise_the_standard() -> None:
    """Of 50 equal versions, the luckiest is not the best: else none of the others would pass any more."""
    rng, gate, n = np.random.default_rng(0), Gate(), 200
    best: dict[str, Best] = {}
    refused = 0
    ids, labels = [str(number) for number in range(n)], ["sport"] * n
    hard = rng.random(n)
    for number in range(1, 51):
        right = np.where(rng.random(n) < 0.3, rng.random(n), hard) < 0.9
        made = ["sport" if one else "law" for one in right]
        now = {"old": Predictions(ids, labels, made, np.full(n, 0.9), np.full(n, 0.5))}
        past = {"old": (now["old"], now["old"])}
        checks = forgetting_in_all(since_best(best, past), past, best, 0.05, PairedTest(gate.alpha))
        refused += any(not check.passed for check in checks)
        best = still_best({"old": Best(number, now["old"])} | best, now, gate.alpha)
    assert refused <= 1


def test_the_best_so_far_survives_json_and_records_that_are_gone() -> None:
    best = Best(3, said(100, 100))
    again = Best.from_dict(json.loads(json.dumps(best.to_dict())))
    assert (again.version, again.predictions.ids) == (3, best.predictions.ids)
    assert still_best({"a": best}, {"a": said(100, 100, start=500)}, 0.01) == {}
    now = {"a": said(100, 100).pick(range(40, 60)), "new": said(9, 9)}
    assert Gate().judge({**now, "new": said(9, 9)}, now, "new", best={"a": best, "b": best}).passed
    with pytest.raises(ValueError, match="name their version, got None"):
        Best.from_dict(best.predictions.to_dict())


# --- classes


def classes(counts: dict[str, tuple[int, int]], several: bool = False) -> Predictions:
    """Records of each class, some of them right."""
    labels = [name for name, (_, n) in counts.items() for _ in range(n)]
    made = [name if number < right else "?" for name, (right, n) in counts.items() for number in range(n)]
    ids, sure = [str(number) for number in range(len(labels))], np.full(len(labels), 0.9)
    if several:
        return Predictions(ids, [[one, "all"] for one in labels], [[one, "all"] for one in made], sure, sure)
    return Predictions(ids, list(labels), list(made), sure, sure)


def class_states(
    before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], several: bool = False, **rest: Any
) -> tuple[dict[str, str], Verdict]:
    new = classes({"c0": (40, 40)}, several)
    verdict = Gate(max_label_noise=None, max_negative_flips=None, max_forgetting=None).judge(
        {"old": classes(before, several), "new": new}, {"old": classes(after, several), "new": new}, "new", **rest
    )
    return {check.slice: check.state for check in verdict.checks if check.name == "class"}, verdict


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("n", "lost", "state"),
    [(8, 8, "refused"), (8, 4, "cannot tell"), (8, 0, "passed"), (4, 4, "cannot tell"), (4, 0, "cannot tell"),
     (1, 0, "cannot tell"), (60, 60, "refused"), (60, 10, "passed"), (60, 22, "cannot tell")],
)  # fmt: skip
def test_a_class_that_collapses_among_24(n: int, lost: int, state: str, several: bool) -> None:
    others = {f"c{number}": (40, 40) for number in range(23)}
    states, verdict = class_states(others | {"rare": (n, n)}, others | {"rare": (n - lost, n)}, several)
    assert states.pop("rare") == state
    assert set(states.values()) == {"passed"}
    assert verdict.passed == (state != "refused")
    if state == "cannot tell":
        assert f"class 'rare' cannot tell ({n} record" in verdict.words()
        assert [check.passed for check in verdict.undecided] == [None]


def test_few_held_out_records_of_a_class_are_joined_by_those_trained_on() -> None:
    before, after = {"c0": (40, 40), "rare": (2, 2)}, {"c0": (40, 40), "rare": (0, 2)}
    assert class_states(before, after)[0]["rare"] == "cannot tell"
    memory = classes({"rare": (18, 18)}), classes({"rare": (1, 18)})
    states, verdict = class_states(before, after, remembered=memory)
    assert states["rare"] == "refused"
    assert "right on 5.0 % of 20 records (18 of them trained on), the one before on 100.0 %" in verdict.words()
    kept = classes({"rare": (18, 18), "c0": (9, 9)}), classes({"rare": (18, 18), "c0": (0, 9)})
    assert class_states(before, before, remembered=kept)[0] == {"c0": "passed", "rare": "passed"}


def test_a_class_that_falls_step_by_step_is_compared_with_the_best() -> None:
    before, after = {"c0": (160, 160), "rare": (15, 20)}, {"c0": (160, 160), "rare": (10, 20)}
    assert class_states(before, after)[0]["rare"] == "passed"
    before, after = {**before, "rare": (10, 20)}, {**after, "rare": (5, 20)}
    best = {"old": Best(1, classes({"c0": (160, 160), "rare": (20, 20)}))}
    assert class_states(before, after, best=best)[0]["rare"] == "refused"
    assert class_states(before, after)[0]["rare"] != "refused"


def test_many_classes_are_one_line_of_the_table() -> None:
    many = {f"c{number}": (40, 40) for number in range(MANY + 5)}
    _, verdict = class_states(many | {"rare": (8, 8)}, many | {"rare": (0, 8)})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(verdict.table())
    lines = [line.split() for line in capture.get().splitlines() if line.startswith("class")]
    assert lines == [
        ["class", f"{MANY + 5}", "of", "them", "passed"],
        ["class", "rare", "100.0", "%", "0.0", "%", "30.0", "points", "less", "0.001", "refused"],
    ]


# --- alignment


def test_predictions_are_aligned_by_id() -> None:
    old, new = {"a": said(5, 10)}, {"a": said(10, 10).pick([9, 2, 4])}
    before, after = aligned("a", old, new)
    assert before.ids == after.ids == ["9", "2", "4"]
    assert before.correct.tolist() == [False, True, True] and after.correct.all()


def test_predictions_that_cannot_be_compared_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'a': the versions were asked about different records"):
        aligned("a", {"a": said(5, 5)}, {"a": said(5, 5, start=100)})
    with pytest.raises(ValueError, match="the version in production has no predictions for the slice 'new'"):
        Gate().judge({"old": said(1, 1)}, {"old": said(1, 1), "new": said(1, 1)}, "new")
    with pytest.raises(ValueError, match="the new version has no predictions for the slice 'old'"):
        Gate().judge({"old": said(1, 1), "new": said(1, 1)}, {"new": said(1, 1)}, "new")
    renamed = said(2, 2)
    renamed.labels[1] = "sports"
    with pytest.raises(ValueError, match="the label of record '1' is not the same for both versions"):
        aligned("a", {"a": said(2, 2)}, {"a": renamed})


def test_a_pool_keeps_records_apart() -> None:
    assert pool([said(1, 2), said(2, 2)]).ids == ["0/0", "0/1", "1/0", "1/1"]
    assert len(pool([])) == 0


# --- the data


def rows(labels: list[Any], texts: list[str] | None = None) -> list[dict[str, Any]]:
    texts = texts or [f"text {number}" for number in range(len(labels))]
    return [
        {"id": str(n), "origin": "x", "record": {"text": text, "label": label}}
        for n, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


def refused_data(
    gate: Gate, records: list[dict[str, Any]], known: tuple[str, ...] = ("a", "b"), **counts: int
) -> list[str]:
    checks = gate.judge_data(records, known_classes=known, **counts)
    assert all(check.stage == "data" for check in checks)
    return [check.words for check in checks if not check.passed]


def test_good_data_pass() -> None:
    assert refused_data(Gate(), rows(["a", "b"] * 50), n_bad=5, n_read=105) == []


def test_too_many_bad_records() -> None:
    assert refused_data(Gate(), rows(["a", "b"] * 50), n_bad=20, n_read=120) == [
        "20 of 120 records do not fit the schema (16.7 %, limit 10.0 %)"
    ]


def test_a_flood_of_the_same_records() -> None:
    texts = [f"Buy  NOW number {n % 7}!" if n % 2 else f"buy now, number {n % 7}" for n in range(100)]
    assert refused_data(Gate(), rows(["a", "b"] * 50, texts)) == [
        "93 of 100 records repeat the text of another (93.0 %, limit 50.0 %)"
    ]


def test_one_known_class_only() -> None:
    assert refused_data(Gate(), rows(["a"] * 95 + ["b"] * 5)) == [
        "95 of 100 records are of one class, 'a' (95.0 %, limit 90.0 %)"
    ]
    assert refused_data(Gate(), rows(["c"] * 100)) == []  # a new class may come alone
    assert len(refused_data(Gate(), rows(["c"] * 100), known=())) == 1  # but not first of all
    assert len(refused_data(Gate(), rows([["a", "b"]] * 100))) == 1


def test_too_few_records() -> None:
    assert refused_data(Gate(), rows(["a", "b"])) == ["there are 2 records (at least 20 are needed)"]
    assert refused_data(Gate(), []) == ["there are 0 records (at least 20 are needed)"]


def test_data_checks_decide_too() -> None:
    checks = Gate().judge_data(rows(["a"] * 100), known_classes=["a", "b"])
    verdict = Gate().judge(None, {"new": said(9, 9)}, "new", data_checks=checks)
    assert not verdict.passed and "are of one class" in verdict.words()


# --- verdicts


def test_a_verdict_is_the_same_bytes_each_time_and_survives_json() -> None:
    old, new, _ = World(flipped=0.2, n_past=(60, 60)).draw(0)
    for test in ("mcnemar", "bootstrap"):
        one, again = (Gate(test=test).judge(old, new, "new", trained="trained") for _ in range(2))  # type: ignore[arg-type]
        text = json.dumps(one.to_dict(), allow_nan=False)
        assert text == json.dumps(again.to_dict(), allow_nan=False)
        assert Verdict.from_dict(json.loads(text)) == one
    stored = {name: Predictions.from_dict(json.loads(json.dumps(said.to_dict()))) for name, said in old.items()}
    assert json.dumps(Gate(test="bootstrap").judge(stored, new, "new", trained="trained").to_dict()) == text
    with pytest.raises(ValueError, match="not a saved verdict"):
        Verdict.from_dict({"passed": True, "checks": [{"nme": "x"}]})


def test_the_table_shows_every_check() -> None:
    verdict = Verdict.of(
        [
            Check("forgetting", "old", 0.925, 0.81, 0.02, 0.0003, False, "words", limit_on="less"),
            Check("size", "", 91e6, 91e6, 136.5e6, None, True, "words", unit="bytes"),
        ]
    )
    console = Console(width=120)
    with console.capture() as capture:
        console.print(verdict.table())
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[0] == ["check", "slice", "production", "new", "version", "limit", "p", "verdict"]
    assert lines[1] == ["forgetting", "old", "92.5", "%", "81.0", "%", "2.0", "points", "less", "0.0003", "refused"]
    assert lines[2] == ["size", "91.0", "MB", "91.0", "MB", "136.5", "MB", "passed"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_forgetting": 2}, "max_forgetting is a share between 0 and 1 .* got 2"),
        (
            {"accepted": {"update-1": 0}},
            "accepted gives a slice the number of a version, counted from 1; got update-1: 0",
        ),
        ({"max_latency_ratio": 0.5}, "max_latency_ratio is a multiple of production's and at least 1"),
        ({"min_records": 0}, "min_records must be positive"),
        ({"alpha": 0.0}, "alpha must be between 0 and 0.5, got 0.0"),
        ({"test": "t"}, r"test must be one of \['mcnemar', 'bootstrap'\], got 't'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(**settings)


# --- the tests behind it


def test_exact_tests_equal_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for k, n, p in [(3, 10, 0.3), (60, 1000, 0.05), (700, 1400, 0.5), (5, 5, 0.2), (40, 40_000, 1e-3)]:
        assert binomial_tail(k, n, p) == pytest.approx(stats.binom.sf(k - 1, n, p), rel=1e-9)
    assert mcnemar(12, 3) == pytest.approx(stats.binomtest(12, 15, alternative="greater").pvalue)


def test_kappa() -> None:
    labels, predicted = ["y"] * 25 + ["n"] * 25, ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert kappa(labels, predicted) == pytest.approx(0.4)  # 0.7 agree, 0.5 by chance
    assert kappa([["a", "b"], []], [["b", "a"], []]) == 1
    assert kappa([], []) is None


def test_the_bootstrap_agrees_with_mcnemar() -> None:
    for losses, gains in [(20, 5), (12, 8), (5, 5), (30, 10)]:
        assert bootstrap(losses, gains, 500) == pytest.approx(mcnemar(losses, gains), abs=0.1)
    assert bootstrap(0, 0, 10) == 1


def test_holm_keeps_the_order_and_one() -> None:
    assert holm([]) == []
    assert holm([0.5, 0.001, 0.9]) == pytest.approx([1.0, 0.003, 1.0])


def test_calibration() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    correct = rng.random(20_000) < confidence
    assert calibration_error(confidence, correct) < 0.02
    assert calibration_error(np.ones(4), np.array([True, False, True, True])) == pytest.approx(0.25)
    assert calibration_error(np.empty(0), np.empty(0, bool)) == 0
    small = slice(0, 300)
    same = (confidence[small], confidence[small])
    assert calibration_test(same, (correct[small], correct[small])) > 0.5


def test_label_noise_estimates_the_share_of_wrong_labels() -> None:
    shares = []
    for seed in range(10):
        old, new, _ = World(flipped=0.2, n_held_out=1000, n_past=(), n_trained=1).draw(seed)
        shares.append(label_noise(old["new"], new["new"], {f"class {n}" for n in range(10)}).share)
    assert np.mean(shares) == pytest.approx(0.2, abs=0.02)


def test_bad_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="the id 'a' is there twice"):
        Predictions(["a", "a"], ["x", "x"], ["x", "x"], np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="one value of each kind per record"):
        Predictions(["a"], ["x", "x"], ["x", "x"], np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="predictions have the keys"):
        Predictions.from_dict({"ids": []})


def test_several_labels_are_right_in_any_order() -> None:
    one = Predictions(["a", "b"], [["x", "y"], []], [["y", "x"], ["x"]], np.ones(2), np.array([1.0, 0.0]))
    assert one.correct.tolist() == [True, False]
    assert one.log_loss == pytest.approx(-np.log(1e-6) / 2)
