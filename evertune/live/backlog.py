"""What has arrived and is not learned yet, and what has been tried on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from evertune.live.journal import Journal, Segment
from evertune.live.plan import Plan
from evertune.registry.registry import Registry, Version
from evertune.utils.files import write_atomically

_STOPPED = "stopped.json"


class Backlog:
    """The part of the journal that production has not learned, worked out from the registry alone.

    Args:
        registry: whose production is meant.
        journal: its records.
        staging: where an update that was stopped before training leaves a mark.
        config: a hash of the settings: under others, the same records may be tried again.
    """

    def __init__(self, registry: Registry, journal: Journal, staging: Path, config: str) -> None:
        self._registry = registry
        self._journal = journal
        self._mark = staging / _STOPPED
        self._config = config

    def pending(self, production: Version | None, at_most: int | None = None) -> list[Segment]:
        """The segments that production has not learned and nobody has given up.

        Args:
            production: the version in production.
            at_most: records in them; but at least one segment.
        """
        learned = [version.manifest.consumed for version in (production, *self._given_up()) if version]
        segments, total = self._journal.segments(after=max(learned, default=0)), 0
        for number, segment in enumerate(segments):
            total += segment.records
            if at_most is not None and total > at_most and number > 0:
                return segments[:number]
        return segments

    def attempted(self, production: Version | None) -> int:
        """The last segment that an update of this parent, under these settings, has been tried on; 0 for none."""
        parent = production.number if production else None
        tried = [
            version.manifest.consumed
            for version in self._registry.versions()
            if version.parent == parent and version.manifest.config_digest == self._config
        ]
        if self._mark.is_file():
            mark = json.loads(self._mark.read_bytes())
            if (mark["parent"], mark["config"]) == (parent, self._config):
                tried.append(mark["consumed"])
        return max(tried, default=0)

    def last_attempt(self) -> datetime | None:
        """When an update was last tried, whatever became of it."""
        moments = [version.created for version in self._registry.versions()]
        if self._mark.is_file():
            moments.append(datetime.fromisoformat(json.loads(self._mark.read_bytes())["created"]))
        return max(moments, default=None)

    def refusals(self, production: Version) -> int:
        """How many updates of this version the gate has refused."""
        return sum(v.parent == production.number and not v.passed for v in self._registry.versions())

    def stop(self, plan: Plan) -> None:
        """Remember that the checks of the data have stopped this update."""
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        mark = {name: getattr(plan, name) for name in ("parent", "consumed", "config", "created")}
        write_atomically(self._mark, json.dumps(mark).encode())

    def quarantine_given_up(self, production: Version | None) -> None:
        """Put the records that a rollback has given up into quarantine. Good to repeat."""
        learned = production.manifest.consumed if production else 0
        for version in self._given_up():
            segments = [s for s in self._journal.segments(after=learned) if s.number <= version.manifest.consumed]
            reason = f"learned by version {version.number}, which was rolled back"
            self._journal.quarantine(reason, self._journal.records(segments), f"discarded-{version.number}")

    def _given_up(self) -> Sequence[Version]:
        """The versions rolled back from since the last promotion whose records are not to be learned again."""
        numbers = []
        for event in reversed(self._registry.events):
            if event["action"] == "promote":
                break
            if event.get("discard") is not None:
                numbers.append(event["discard"])
        if not numbers:  # as nearly always: no manifest needs to be read
            return []
        return [version for version in self._registry.versions() if version.number in numbers]
