"""Why records were set aside, in few words: how many, the commonest reasons, and an example of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_SHOWN = 3  # reasons that a message names
_VARYING = re.compile(r"(field '[^']*')|'[^']*'|\d+")


@dataclass(frozen=True)
class Reason:
    """A reason that several records share.

    Args:
        kind: Kind of the records, as in :meth:`~evertune.registry.journal.Journal.append`.
        words: The reason of the first of them.
        count: Number of records.
        origin: Where the first of them is in its source.
    """

    kind: str
    words: str
    count: int
    origin: str


class Reasons:
    """Counts the rows of the quarantine by reason. Reasons that differ only in numbers and quoted values are one.

    Example:
        >>> rows = [{"kind": "refused", "reason": f"{n} is not a name", "origin": f"a.jsonl:{n}"} for n in (7, 8)]
        >>> Reasons(rows).words()
        '7 is not a name (2 records, such as a.jsonl:7)'
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._found: dict[tuple[str, str], Reason] = {}
        self.add(rows)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count more rows, each with a ``kind``, a ``reason`` and an ``origin``."""
        for row in rows:
            key = reason_of(row)
            known = self._found.get(key)
            first = known or Reason(row["kind"], row["reason"], 0, row["origin"])
            self._found[key] = Reason(first.kind, first.words, first.count + 1, first.origin)

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(reason.count for reason in self._found.values())

    @property
    def all(self) -> list[Reason]:
        """The reasons, the commonest first."""
        return sorted(self._found.values(), key=lambda reason: -reason.count)

    def words(self) -> str:
        """The commonest reasons as a message."""
        reasons = self.all
        named = [
            f"{reason.words} ({reason.count} record{'s' if reason.count > 1 else ''}, such as {reason.origin})"
            for reason in reasons[:_SHOWN]
        ]
        more = sum(reason.count for reason in reasons[_SHOWN:])
        return "; ".join(named + ([f"{more} for other reasons"] if more else []))

    def report(self, n_read: int, registry: str) -> str:
        """How many of how many records were set aside, why, and where they are; empty if none were.

        Args:
            n_read: Number of records that were read.
            registry: Folder or URL of the registry.
        """
        if not self._found:
            return ""
        return (
            f"{self.total} of {n_read} records went to quarantine: {self.words()}. "
            f"To see them: evertune quarantine list --registry {registry}"
        )


def reason_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of a row, and its reason without numbers and quoted values: what rows with one reason share.

    Example:
        >>> reason_of({"kind": "refused", "reason": "field 'text': 7 is not a text"})
        ('refused', "field 'text': # is not a text")
    """
    return row["kind"], _VARYING.sub(lambda match: match[1] or "#", row["reason"])
