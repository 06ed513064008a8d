"""The records that have arrived and are not learned yet, and the updates that were tried on them."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from evertune.registry.journal import Journal
from evertune.registry.registry import Registry
from evertune.registry.segments import Segment
from evertune.registry.version import Version
from evertune.sources.base import Row
from evertune.utils.files import write_atomically
from evertune.utils.typed_json import read_json

_STOPPED = "stopped.json"


@dataclass
class _Mark:
    """The content of the mark of a run that was stopped."""

    parent: int | None
    consumed: int
    created: str
    config: str
    tried: bool = True


def pending_segments(registry: Registry) -> list[Segment]:
    """The segments with records that wait for the next update of a registry, whatever its settings.

    Raises:
        RegistryError: If the version in production cannot be read.
        ValueError: If the journal is damaged.
    """
    return Backlog(registry, Journal(registry.store), Path(), "").pending(registry.production)


def by_origin(rows: Iterable[Row]) -> Counter[tuple[int, str]]:
    """The number of records by their segment and the place that they come from, such as a file.

    Args:
        rows: Records of the journal, with the number of their segment.

    Example:
        >>> by_origin({"segment": 1, "origin": f"a.jsonl:{line}"} for line in (1, 2))
        Counter({(1, 'a.jsonl'): 2})
    """
    return Counter((row["segment"], row["origin"].rpartition(":")[0] or row["origin"]) for row in rows)


class Backlog:
    """The part of the journal that production has not learned, derived from the registry alone.

    Args:
        registry: Registry whose version in production counts.
        journal: Journal with the records.
        staging: Folder in which an update that was stopped before training leaves a mark.
        config: Hash of the settings. Under other settings, the same records may be tried again.
    """

    def __init__(self, registry: Registry, journal: Journal, staging: Path, config: str) -> None:
        self._registry = registry
        self._journal = journal
        self._mark = staging / _STOPPED
        self._config = config

    def pending(self, production: Version | None, at_most: int | None = None) -> list[Segment]:
        """The segments that production has not learned and that no rollback has given up.

        Args:
            production: The version in production; None before the first.
            at_most: Maximum number of records in the segments, though the first with any is always included. None for
                no limit.
        """
        given_up, learned = self._registry.given_up, production.manifest.consumed if production else 0
        found = self._journal.segments(after=learned)
        segments = [segment for segment in found if not any(segment.number in one for one in given_up)]
        if at_most is None:
            return segments
        totals = list(accumulate(self._journal.sizes(segments)))
        most = max(at_most, next(filter(None, totals), 0))
        return segments[: bisect_right(totals, most)]

    def attempted(self, production: Version | None) -> int:
        """Number of the last segment on which an update of this parent was tried under these settings; 0 for none."""
        tried = [version.manifest.consumed for version in self._tried(production) if self._is_same(version, production)]
        # An update that was stopped before training has published no version: only the mark shows that it was tried.
        mark = self._stopped(production)
        if mark is not None and mark["tried"]:
            tried.append(mark["consumed"])
        return max(tried, default=0)

    def reported(self, production: Version | None) -> int:
        """Number of the last segment whose bad records have stopped a run under these settings; 0 for none."""
        mark = self._stopped(production)
        return mark["consumed"] if mark is not None else 0

    def _tried(self, production: Version | None) -> list[Version]:
        """The versions that were made from this parent under these settings."""
        parent = production.number if production else None
        versions = (version for version in self._registry.versions() if version.parent == parent)
        return [version for version in versions if version.manifest.config_digest == self._config]

    def _is_same(self, version: Version, production: Version | None) -> bool:
        """Whether the records of a version are still those that are pending: none was withdrawn since."""
        learned = production.manifest.consumed if production else 0
        segments = [s for s in self._journal.segments(after=learned) if s.number <= version.manifest.consumed]
        changed = self._journal.last_withdrawal(segments)
        return changed is None or changed <= version.created

    def refused_twice(self, production: Version | None) -> list[Row]:
        """The pending records with which two updates were refused, to be withdrawn with this reason.

        They may be what is wrong, and the records that have arrived since would wait behind them for ever.
        """
        refused = sorted(
            (version for version in self._tried(production) if not version.passed), key=lambda v: v.manifest.consumed
        )[-2:]
        if len(refused) < 2:
            return []
        segments = [s for s in self.pending(production) if s.number <= refused[0].manifest.consumed]
        names = " and ".join(str(version.number) for version in refused)
        reason = f"refused twice, in versions {names}: {refused[-1].manifest.summary}"
        rows = self._journal.records(segments, numbered=True)
        return [{**row, "kind": "batch", "reason": reason} for row in rows]

    def last_attempt(self) -> datetime | None:
        """When an update was last tried, whatever its outcome; None before the first."""
        moments = [version.created for version in self._registry.versions()]
        mark = self._read_mark()
        if mark is not None and mark["tried"]:
            moments.append(datetime.fromisoformat(mark["created"]))
        return max(moments, default=None)

    def refusals(self, production: Version) -> int:
        """Number of updates of this version that the gate has refused."""
        return sum(v.parent == production.number and not v.passed for v in self._registry.versions())

    def stop(self, parent: int | None, consumed: int, created: str, tried: bool = True) -> None:
        """Record that the checks of the data have stopped a run.

        Args:
            parent: Number of the version in production.
            consumed: Number of the last segment that was checked.
            created: Time at which it was stopped (ISO 8601, UTC).
            tried: Whether an update was due. If not, its good records still count as new.
        """
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        mark: dict[str, Any] = {"parent": parent, "consumed": consumed, "created": created, "config": self._config}
        mark |= {"tried": tried, "counts": self._counts(consumed)}
        write_atomically(self._mark, json.dumps(mark).encode())

    def _stopped(self, production: Version | None) -> dict[str, Any] | None:
        """The mark of the last run that was stopped, if it had this parent, these settings and these records."""
        mark = self._read_mark()
        if mark is None or (mark["parent"], mark["config"]) != (
            production.number if production else None,
            self._config,
        ):
            return None
        return mark if mark.get("counts") in (None, self._counts(mark["consumed"])) else None

    def _counts(self, upto: int) -> list[int]:
        counts = self._journal.counts(s for s in self._journal.segments() if s.number <= upto)
        return [counts.pending, counts.bad]

    def _read_mark(self) -> dict[str, Any] | None:
        if not self._mark.is_file():
            return None
        try:
            mark = read_json(_Mark, self._mark.read_bytes())
            datetime.fromisoformat(mark.created)
        except ValueError as error:
            raise ValueError(f"{self._mark} is damaged ({error}): delete it to try the records again") from None
        return asdict(mark)

    def withdraw_given_up(self) -> None:
        """Move the records that rollbacks have given up into quarantine, whatever is in production by now."""
        given_up = self._registry.given_up
        for one in given_up:
            segments = [segment for segment in self._journal.segments(after=one.after) if segment.number in one]
            rows = self._journal.records(segments, numbered=True)
            reason = f"learned by version {one.version}, which was rolled back"
            self._journal.withdraw([{**row, "kind": "withdrawn", "reason": reason} for row in rows])
        self._registry.clear_given_up(given_up)
