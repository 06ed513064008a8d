"""The fields of the records that have changed in their values, their presence or their types."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evertune.drift.explain.p_values import chi_squared, kolmogorov_smirnov, normal, two_shares
from evertune.drift.scripts import words_of

Kind = Literal["numeric", "categorical", "missing", "schema"]

_MAX_CATEGORIES = 50
_EPOCH = datetime(1970, 1, 1)
_IN_ORDER = 0.95  # rank correlation with the order of the records from which numbers are a time
_FEWEST_MOMENTS = 5  # number of different values up to which numbers are not taken for times
_MIN_EXPECTED = 5  # minimum expected records of a category on either side; rarer categories are pooled


@dataclass(frozen=True)
class FieldChange:
    """One field, or one property of a text, before and after the change.

    Attributes:
        name: Name of the field. ``length of text`` and ``unknown words in text`` are properties of the text field
            ``text``.
        kind: ``numeric`` (Kolmogorov-Smirnov test), ``categorical`` (chi-squared test of the shares of its values),
            ``missing`` (two-proportion z-test of the share of records without it), or ``schema`` (a field that is new,
            has disappeared or has another type, which needs no test).
        effect: For ``numeric``, the difference of the means in pooled standard deviations; for ``categorical``, the sum
            of the positive changes of shares (total variation); for ``missing``, the change of that share; for
            ``schema``, 1.
        p_value: P-value of the test; 0 for ``schema``.
        p_corrected: P-value corrected for the number of tests (Holm 1979) by
            :func:`~evertune.drift.explain.attribution.attribute`.
        before: For ``numeric``, the mean; for ``categorical``, the shares of the values; for ``missing``, the share;
            for ``schema``, the type.
        after: The same after the change.
    """

    name: str
    kind: Kind
    effect: float
    p_value: float
    before: Any
    after: Any
    p_corrected: float = math.nan


def changed_fields(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    text_fields: Sequence[str] = (),
    *,
    labels: Sequence[str] = (),
) -> list[FieldChange]:
    """Compares all fields, and returns them whether they have changed or not; see :class:`FieldChange`.

    A text that contains a number counts as a number, as all values in CSV are texts. NaN, infinite numbers and the
    empty text count as missing. Left out are fields with many different values that are not numbers (names, free text,
    lists), and the stream's own time: numbers and dates that follow the order of the records.

    Args:
        before: Records before the change, in order.
        after: Records after the change, in order.
        text_fields: Names of text fields, whose length and unknown words are compared.
        labels: Names of fields that are categorical, whatever their values.

    Example:
        >>> before, after = [{"stars": i % 5, "shop": "north"} for i in range(100)], [{"stars": 4}] * 100
        >>> [(change.name, change.kind, change.before, change.after) for change in changed_fields(before, after)]
        [('shop', 'schema', 'text', 'absent'), ('stars', 'numeric', 2.0, 4.0)]
    """
    if not before or not after:
        return []
    changes: list[FieldChange] = []
    names = {str(name): None for record in (*before, *after) for name in record}
    for name in sorted(names):
        read = _as_text if name in labels else _plain
        sides = [[read(record.get(name)) for record in records] for records in (before, after)]
        kept = [[value for value in side if value is not None] for side in sides]
        types = [_type(side) for side in kept]
        if types[0] != types[1]:
            changes.append(FieldChange(name, "schema", 1.0, 0.0, types[0], types[1]))
            continue
        if types[0] == "absent":
            continue
        missing = [len(side) - len(there) for side, there in zip(sides, kept, strict=True)]
        if any(missing):
            changes.append(_missing(name, missing, [len(before), len(after)]))
        if name in text_fields:
            changes += _of_text(name, [str(value) for value in kept[0]], [str(value) for value in kept[1]])
        elif types[0] == "number":
            numbers = [np.array([float(value) for value in side if _type_of(value) == "number"]) for side in kept]
            if not all(map(_follows_the_order, numbers)):
                changes.append(_numeric(name, *numbers))
        elif types[0] == "text" and name not in labels and all(_is_time_of_stream(side) for side in kept):
            continue
        elif types[0] in ("text", "boolean"):
            categories = [Counter(map(str, side)) for side in kept]
            several = len(categories[0] | categories[1]) <= min(_MAX_CATEGORIES, len(kept[0] + kept[1]) / 2)
            if several or name in labels:
                changes.append(_categorical(name, *categories))
    return changes


def corrected(changes: Sequence[FieldChange]) -> list[FieldChange]:
    """The changes with :attr:`FieldChange.p_corrected`, the most certain first, and among equals the largest."""
    from evertune.gate.statistics import holm

    tested = [change for change in changes if change.kind != "schema"]
    p_values = iter(holm([change.p_value for change in tested]))
    changes = [replace(change, p_corrected=0.0 if change.kind == "schema" else next(p_values)) for change in changes]
    return sorted(changes, key=lambda change: (change.p_corrected, -abs(change.effect), change.name))


def _plain(value: Any) -> Any:
    """The value, with None for a missing one and a number for a text that contains one."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else None
    if isinstance(value, int | float):
        try:
            return value if math.isfinite(value) else None
        except OverflowError:  # an integer beyond all floats
            return None
    return value


def _as_text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _type(values: Sequence[Any]) -> str:
    """The type of most values."""
    if not values:
        return "absent"
    counts = Counter(map(_type_of, values))
    return max(counts, key=lambda kind: (counts[kind], kind))


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list | tuple) else "object"


def _missing(name: str, missing: Sequence[int], of: Sequence[int]) -> FieldChange:
    shares = [n / size for n, size in zip(missing, of, strict=True)]
    z = two_shares(missing[0], of[0], missing[1], of[1])
    return FieldChange(name, "missing", shares[1] - shares[0], normal(z), shares[0], shares[1])


def _numeric(name: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> FieldChange:
    with np.errstate(over="ignore", invalid="ignore"):  # for numbers close to the largest float
        means = [float(before.mean()), float(after.mean())]
        spread = math.sqrt((before.var() + after.var()) / 2)
    difference = means[1] - means[0]
    effect = difference / spread if spread else math.copysign(math.inf, difference) if difference else 0.0
    effect = 0.0 if math.isnan(effect) else effect
    _, p_value = kolmogorov_smirnov(before, after)
    return FieldChange(name, "numeric", effect, p_value, means[0], means[1])


def _categorical(name: str, before: Counter[str], after: Counter[str]) -> FieldChange:
    totals = [before.total(), after.total()]
    table = {value: [before[value], after[value]] for value in before | after}
    shares = [{value: row[side] / totals[side] for value, row in sorted(table.items())} for side in (0, 1)]
    effect = sum(max(shares[1][value] - shares[0][value], 0.0) for value in table)
    rare = [value for value, row in table.items() if sum(row) * min(totals) / sum(totals) < _MIN_EXPECTED]
    if len(rare) > 1:
        together = np.sum([table.pop(value) for value in rare], 0).tolist()
        table["other"] = [together[0], together[1]]
    observed = np.array(list(table.values()), dtype=np.float64)
    expected = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    statistic = float(((observed - expected) ** 2 / expected).sum())
    p_value = chi_squared(statistic, len(table) - 1) if len(table) > 1 else 1.0
    return FieldChange(name, "categorical", effect, p_value, shares[0], shares[1])


def _of_text(name: str, before: Sequence[str], after: Sequence[str]) -> list[FieldChange]:
    """The length in words, and the share of words that are not in the vocabulary of every second record before the
    change."""
    words = [list(map(words_of, texts)) for texts in (before, after)]
    lengths = [np.array([len(text) for text in side], dtype=np.float64) for side in words]
    changes = [_numeric(f"length of {name}", *lengths)]
    # The other half of the records before the change serves as the comparison: its rate of unknown words must not be
    # biased by having made the vocabulary.
    known = {word for text in words[0][::2] for word in text}
    rates = [
        np.array([sum(word not in known for word in text) / len(text) for text in side if text])
        for side in (words[0][1::2], words[1])
    ]
    if all(map(len, rates)):
        changes.append(_numeric(f"unknown words in {name}", *rates))
    return changes


def _is_time_of_stream(values: Sequence[Any]) -> bool:
    """Whether values are dates that follow the order of the records, or one date: that of a batch."""
    try:
        moments = [datetime.fromisoformat(str(value)) for value in values]
    except ValueError:
        return False
    # Without time zones, as some dates may have one and others not; hours do not matter here.
    numbers = np.array([(moment.replace(tzinfo=None) - _EPOCH).total_seconds() for moment in moments])
    return bool((numbers == numbers[0]).all()) or _follows_the_order(numbers)


def _follows_the_order(numbers: NDArray[np.float64]) -> bool:
    """Whether numbers only rise or only fall, or nearly so, as counters and times do; some may arrive late."""
    first, second = numbers[:-1], numbers[1:]
    if len(first) <= 10:
        return False
    if (second > first).all() or (second < first).all():
        return True
    if len(np.unique(numbers)) <= _FEWEST_MOMENTS:
        return False
    ranks = np.argsort(np.argsort(numbers, kind="stable"), kind="stable")
    return abs(float(np.corrcoef(ranks, np.arange(len(numbers)))[0, 1])) >= _IN_ORDER
