"""Checks of accuracy, slice by slice: against production, and against the best version so far."""

from __future__ import annotations

from collections.abc import Mapping

from evertune.gate import statistics
from evertune.gate.best import Best
from evertune.gate.comparison import POOLED, Pair, PairedTest, aligned, pooled
from evertune.gate.predictions import Predictions
from evertune.gate.verdict import Check
from evertune.gate.words import percent, probability

_ENOUGH = 50
"""Number of records from which on a large loss counts, whatever the test says."""


def forgetting(past: Mapping[str, Pair], limit: float | None, max_drop: float | None, test: PairedTest) -> list[Check]:
    """Losses against production on each past slice, and on all of them together."""
    checks = compared("forgetting", past, limit, max_drop, test)
    if len(past) > 1:
        checks += compared("forgetting", {POOLED: pooled(past.values())}, limit, max_drop, test)
    return checks


def compared(
    name: str, pairs: Mapping[str, Pair], limit: float | None, max_drop: float | None, test: PairedTest
) -> list[Check]:
    """Losses against production on some slices, with the family-wise error rate ``alpha`` over all of them together.

    On a slice of 50 records or more, a loss above ``max_drop`` counts even if chance is not ruled out.
    """
    if limit is None:
        return []
    checks = []
    for slice_name, (drop, p_value) in _losses(pairs, test).items():
        old, now = pairs[slice_name]
        broken = drop > limit and p_value < test.alpha
        collapsed = max_drop is not None and drop > max_drop and len(now) >= _ENOUGH
        exceeded = max_drop if collapsed and not broken and max_drop is not None else limit
        words = (
            f"{_beside(slice_name, old, now, 'the one in production')} "
            f"({probability(p_value)}, limit {100 * exceeded:.1f} points)"
        )
        passed = not (broken or collapsed)
        checks.append(
            Check.of_version(name, slice_name, old.accuracy, now.accuracy, exceeded, passed, words, p_value, on="less")
        )
    return checks


def forgetting_in_all(
    since: Mapping[str, Pair], past: Mapping[str, Pair], best: Mapping[str, Best], limit: float | None, test: PairedTest
) -> list[Check]:
    """Losses over all updates: against the best version so far on each past slice, and on all of them together."""
    checks = _compared_with_best(since, best, limit, test)
    if since and len(past) > 1:
        whole = pooled(since.get(name, pair) for name, pair in past.items())
        checks += _compared_with_best({POOLED: whole}, best, limit, test)
    return checks


def _compared_with_best(
    since: Mapping[str, Pair], best: Mapping[str, Best], limit: float | None, test: PairedTest
) -> list[Check]:
    if limit is None:
        return []
    checks = []
    for slice_name, (drop, p_value) in _losses(since, test).items():
        old, now = since[slice_name]
        one = best.get(slice_name)
        whose = f"the best so far, version {one.version}," if one else "the best so far of each slice"
        words = (
            f"{_beside(slice_name, old, now, whose)} ({probability(p_value)}, limit {100 * limit:.1f} points over all "
            "updates; gate.accepted makes it the new normal)"
        )
        passed = not (drop > limit and p_value < test.alpha)
        values = old.accuracy, now.accuracy, limit
        checks.append(Check.of_version("forgetting in all", slice_name, *values, passed, words, p_value, on="less"))
    return checks


def since_best(best: Mapping[str, Best], past: Mapping[str, Pair]) -> dict[str, Pair]:
    """The best predictions so far on each past slice beside the new ones, where records of both are left."""
    return {
        name: aligned(name, {name: one.predictions}, {name: past[name][1]})
        for name, one in best.items()
        if name in past and not set(one.predictions.ids).isdisjoint(past[name][1].ids)
    }


def accepted(best: Mapping[str, Best], overruled: Mapping[str, Pair]) -> list[Check]:
    """A report on the best predictions so far that no longer count."""
    reports = []
    for name, (old, now) in overruled.items():
        words = (
            f"on {name!r} version {best[name].version}, which was right on {percent(old.accuracy)}, is no "
            f"longer the standard (gate.accepted); the new version is right on {percent(now.accuracy)}"
        )
        reports.append(Check.of_version("accepted", name, old.accuracy, now.accuracy, None, True, words))
    return reports


def _losses(pairs: Mapping[str, Pair], test: PairedTest) -> dict[str, tuple[float, float]]:
    """The loss of accuracy on each slice, and its p-value, adjusted for the number of slices."""
    p_values = statistics.holm([test.p_value(*pair) for pair in pairs.values()])
    drops = [round(old.accuracy - now.accuracy, 9) for old, now in pairs.values()]  # 0.9 - 0.88 is not above 0.02
    return {name: (drop, p_value) for name, drop, p_value in zip(pairs, drops, p_values, strict=True)}


def _beside(slice_name: str, old: Predictions, now: Predictions, whose: str) -> str:
    """How both versions do on a slice, as the beginning of a message."""
    how, on, of = ("is right on", "on ", "of") if now.has_classes else ("scores", "", "on")
    return (
        f"on {slice_name!r} the new version {how} {percent(now.accuracy)} {of} {len(now)} held-out records, "
        f"{whose} {on}{percent(old.accuracy)}"
    )
