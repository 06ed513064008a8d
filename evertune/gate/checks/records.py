"""Checks of the records of an update before anything is trained: these need no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evertune.gate.verdict import Check


def bad_records(n_bad: int, n_read: int, limit: float | None) -> list[Check]:
    """Whether too many of the records that were read went to quarantine."""
    if limit is None or not n_read:
        return []
    return [
        Check.of_records("bad records", n_bad / n_read, limit, f"{n_bad} of {n_read} records do not fit the schema")
    ]


def enough(n: int, limit: int | None) -> list[Check]:
    """Whether there are enough records to train on."""
    if limit is None:
        return []
    words = f"there are {n} records (at least {limit} are needed)"
    return [Check("records", "", None, n, limit, None, n >= limit, words, "data", "records")]


def duplicates(records: Sequence[Mapping[str, Any]], text: Sequence[str], limit: float | None) -> list[Check]:
    """Whether too many records repeat the text of another, but for case, punctuation and spacing."""
    if limit is None or not records:
        return []
    copies = len(records) - len({tuple(_normalised(str(record[field])) for field in text) for record in records})
    words = f"{copies} of {len(records)} records repeat the text of another"
    return [Check.of_records("duplicates", copies / len(records), limit, words)]


def one_class(
    records: Sequence[Mapping[str, Any]],
    label: str | None,
    known: Sequence[str],
    names: Callable[[Any], list[str]],
    limit: float | None,
) -> list[Check]:
    """Whether almost all records are of one class that production knows; a new class may come alone."""
    if limit is None or not records:
        return []
    labels = [] if label is None else [record[label] for record in records]
    classes = Counter(tuple(sorted(names(one))) for one in labels)
    if classes.keys() <= {()} and not (labels and all(isinstance(one, list) for one in labels)):
        return [Check.not_applicable("one class", "data")]
    # The largest class, and the first by name among equals, so that the verdict is deterministic.
    name, count = min(classes.items(), key=lambda item: (-item[1], item[0]))
    is_new = bool(known) and not set(name) <= set(known)
    words = f"{count} of {len(records)} records are of one {'new class' if is_new else 'class'}, {', '.join(name)!r}"
    return [Check.of_records("one class", count / len(records), 1.0 if is_new else limit, words)]


def _normalised(text: str) -> str:
    """A text without differences in case, punctuation and spacing."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())
