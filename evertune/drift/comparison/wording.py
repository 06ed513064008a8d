"""The findings as sentences, the same in the terminal and on the page."""

from __future__ import annotations

import math

from evertune.drift.comparison.comparison import Comparison
from evertune.drift.explain.fields import FieldChange

LEVEL = 0.05
"""Corrected p-value up to which a change of a field is shown."""

_CHANCE = 0.05
_N_SHARES = 4


def sure(change: FieldChange) -> bool:
    """Whether a field has changed beyond chance."""
    return change.p_corrected <= LEVEL


def decision(found: Comparison) -> str:
    """The outcome in one sentence."""
    first = sorted((scan for scan in found.scans if scan.alarms), key=lambda scan: scan.alarms[0].record)
    if not first:
        tests = sum(scan.n_tests for scan in found.scans)
        return f"No drift: {tests:,} test{'s' * (tests != 1)} of {found.n_current:,} records, and no alarm"
    parts = [f"of {scan.of} at record {scan.alarms[0].record:,} ({scan.alarms[0].origin})" for scan in first]
    return f"Drift {' and '.join(parts)}"


def false_alarms(found: Comparison) -> list[str]:
    """Sentences on how far the decision can be trusted."""
    expected, chance = found.expected_false_alarms, found.false_alarm_chance
    if math.isnan(expected):
        return ["How many false alarms to expect is not known: the detector has no arl."]
    lines = [
        f"Had nothing changed, {expected:.2g} false alarms would be expected in that many records; "
        f"the chance of any is {100 * chance:.2g} %."
    ]
    if expected > 1:
        needed = sum(scan.n_records for scan in found.scans) / -math.log(1 - _CHANCE)
        lines.append(
            "That is more records than from one false alarm to the next: an alarm alone says little. For a chance of "
            f"{100 * _CHANCE:.0f} %, ask for --arl {math.ceil(needed / 1000) * 1000}, or compare fewer records at once."
        )
    n_alarms = sum(len(scan.alarms) for scan in found.scans)
    if n_alarms:
        lines.append(
            "The decision is the first alarm; later tests use the same reference, and are shown to tell whether the "
            f"change lasts ({n_alarms:,} alarm{'s' * (n_alarms != 1)} in all)."
        )
    return lines


def described(change: FieldChange) -> str:
    """The change of one field in words.

    Example:
        >>> described(FieldChange("stars", "numeric", 1.5, 0.0, 2.0, 4.0))
        'mean 2 to 4 (+1.5 standard deviations)'
    """
    before, after = change.before, change.after
    if change.kind == "schema":
        if before == "absent":
            return f"new: {after}"
        return f"gone: it was {before}" if after == "absent" else f"from {before} to {after}"
    if change.kind == "missing":
        return f"missing in {_percent(before)} to {_percent(after)}"
    if change.kind == "numeric":
        size = f" ({change.effect:+.2g} standard deviations)" if math.isfinite(change.effect) else ""
        return f"mean {before:.4g} to {after:.4g}{size}"
    changes = shares_of(change)
    shares = [f"{name} {_percent(was)} to {_percent(now)}" for name, was, now in changes[:_N_SHARES]]
    more = len(changes) - len(shares)
    return "; ".join(shares) + (f"; and {more} more" if more else "")


def shares_of(change: FieldChange) -> list[tuple[str, float, float]]:
    """The values of a categorical field with their shares before and after, the largest change first.

    Example:
        >>> shares_of(FieldChange("shop", "categorical", 0.2, 0.0, {"a": 0.9, "b": 0.1}, {"a": 0.7, "b": 0.3}))
        [('a', 0.9, 0.7), ('b', 0.1, 0.3)]
    """
    names = sorted(change.before, key=lambda name: (-abs(round(change.after[name] - change.before[name], 9)), name))
    return [(name, change.before[name], change.after[name]) for name in names]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
