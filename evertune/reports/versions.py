"""What became of the versions of a registry, for the pages that show them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from evertune.gate.verdict import Verdict
from evertune.live.versions import VERDICT
from evertune.registry.manifest import Metrics
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.version import Version
from evertune.reports.listing import brief
from evertune.reports.stream import NBSP
from evertune.reports.summary import UNKNOWN, percent
from evertune.utils.typed_json import decode, foreign

MAX_SHOWN = 40
"""Number of versions and of slices drawn, the newest of a longer list. The timeline names all versions."""

PRODUCTION, PROMOTED, ROLLED_BACK, REFUSED, WAITING = (
    "in production",
    "promoted",
    "rolled back",
    "refused",
    "not promoted",
)
COLORS = {
    PRODUCTION: "var(--bar)",
    PROMOTED: "var(--bar)",
    ROLLED_BACK: "var(--run-0)",
    REFUSED: "var(--alarm)",
    WAITING: "var(--reference)",
}
MOMENT = "%Y-%m-%d %H:%M"


@dataclass
class VersionView:
    """One version as the page shows it.

    Args:
        version: The version.
        status: What became of it, one of the keys of :data:`COLORS`.
        aliases: Its aliases that ``status`` does not already name.
        change: Mean difference of its accuracies to those of its parent, over the slices of both; NaN without any.
    """

    version: Version
    status: str
    aliases: list[str]
    number: int = field(init=False)
    name: str = field(init=False)
    created: str = field(init=False)
    kind: str = field(init=False)
    cause: str = field(init=False)
    words: str = field(init=False)
    accuracy: dict[str, float] = field(init=False)
    average: float = field(init=False)
    records: dict[str, int] = field(init=False)
    color: str = field(init=False)
    change: float = math.nan

    def __post_init__(self) -> None:
        manifest = self.version.manifest
        self.number, self.name = self.version.number, self.version.experience
        self.created, self.kind = f"{self.version.created:{MOMENT}}", manifest.kind or "update"
        self.cause = manifest.reason
        self.words = manifest.summary.removeprefix("refused: ").replace("; ", "\n") if self.status == REFUSED else ""
        self.accuracy, self.records = accuracy_of(self.version), records_of(self.version)
        self.average = mean(list(self.accuracy.values()))
        self.color = COLORS[self.status]

    @property
    def served(self) -> bool:
        """Whether it is in production, or led to the version that is."""
        return self.status in (PRODUCTION, PROMOTED)

    @property
    def weakest(self) -> float:
        """The accuracy on its worst slice."""
        return min(self.accuracy.values(), default=math.nan)


@dataclass
class Entry:
    """One entry of the timeline: a version, or a change of production by hand.

    Args:
        at: When it happened.
        color: CSS colour of the entry.
        text: What happened; empty for a version.
        reason: Why, in lines of text.
        view: The version; None for a change by hand.
    """

    at: datetime
    color: str
    text: str = ""
    reason: str = ""
    view: VersionView | None = None


@dataclass
class SliceView:
    """One held-out slice and production's accuracy on it.

    Args:
        name: Name of the slice.
        number: Version with which the slice came; None if it is unknown.
        examples: Number of examples.
        accuracy: Accuracy of production.
        change: Difference to the best version before production; NaN if there is none.
    """

    name: str
    number: int | None
    examples: int
    accuracy: float
    change: float


def as_registry(registry: Registry | str | os.PathLike[str]) -> Registry:
    """The registry itself, or the one at a place."""
    return registry if isinstance(registry, Registry) else Registry(os.fspath(registry))


def name_of(registry: Registry) -> str:
    """The name of its folder."""
    return str(registry.store.root).rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Survey:
    """What a registry says of its versions, as far as it can be read.

    Args:
        versions: The versions, oldest first.
        production: The version in production; None if there is none, or it cannot be read.
        aliases: The number of the version behind each alias that is set.
        events: The changes of the aliases, oldest first.
        damaged: Why other versions cannot be read, by their numbers.
        problem: Why the aliases cannot be read; empty if they can.
    """

    versions: Sequence[Version]
    production: Version | None
    aliases: Mapping[str, int]
    events: Sequence[Mapping[str, Any]]
    damaged: Mapping[int, str] = field(default_factory=dict)
    problem: str = ""

    @classmethod
    def of(cls, registry: Registry) -> Survey:
        """The survey of a registry. A damaged version, or damaged aliases, leave the rest as it is."""
        versions, damaged = registry.survey()
        try:
            aliases, events = registry.aliases, registry.events
        except RegistryError as error:
            return cls(versions, None, {}, [], damaged, str(error))
        production = next((one for one in versions if one.number == aliases.get("production")), None)
        return cls(versions, production, aliases, events, damaged)


def version_views(survey: Survey) -> list[VersionView]:
    """All versions, oldest first, each with its status."""
    versions, production, aliases = survey.versions, survey.production, survey.aliases
    line = {version.number for version in line_to(versions, production)}
    # Versions that have left production. Those of them that did not lead to the current one were rolled back.
    left = {event["from"] for event in survey.events if event["action"] in ("promote", "rollback")}
    views = []
    for version in versions:
        if version.number in line:
            status = PRODUCTION if version == production else PROMOTED
        elif version.number in left:
            status = ROLLED_BACK
        else:
            status = WAITING if version.passed else REFUSED
        names = [name for name, number in aliases.items() if number == version.number and name not in status]
        views.append(VersionView(version, status, names))
    by_number = {view.number: view for view in views}
    for view in views:
        if (parent := by_number.get(view.version.parent or 0)) is not None:
            change = view.version.manifest.metrics.change_from(parent.version.manifest.metrics)
            view.change = math.nan if change is None else change
    return views


def verdict_of(version: Version) -> Verdict | None:
    """What the gate decided on a version, with every check; None if it was never judged.

    Raises:
        RegistryError: If the file is missing or was changed.
        ValueError: If it cannot be read.
    """
    if VERDICT not in version.manifest.files:
        return None
    with foreign(f"{VERDICT} of version {version.number}"):
        return Verdict.from_dict(decode(version.read(VERDICT)))


def line_to(versions: Sequence[Version], last: Version | None) -> list[Version]:
    """A version and its parents as far back as they are kept, oldest first."""
    by_number = {version.number: version for version in versions}
    line = []
    while last is not None:
        line.append(last)
        # `pop`, so that parents that form a circle in damaged manifests end the loop.
        last = by_number.pop(last.parent, None) if last.parent is not None else None
    return line[::-1]


def slices_of(line: Sequence[Version]) -> list[str]:
    """The slices that versions were measured on, oldest first."""
    return list(dict.fromkeys(name for version in line for name in accuracy_of(version)))


def origins_of(slices: Sequence[str], versions: Sequence[Version]) -> dict[str, int | None]:
    """The version that each slice came with; None if it is unknown.

    That of a deleted version is in the name that updates give to their experiences: ``update-7``.
    """
    kept = {version.experience: version.number for version in reversed(versions)}
    named = {name: re.fullmatch(r"update-(\d+)", name) for name in slices}
    return {name: kept.get(name) or (int(match[1]) if (match := named[name]) else None) for name in slices}


def accuracy_of(version: Version) -> dict[str, float]:
    """Its accuracy on each slice that it was measured on."""
    return {name: value for name, value in version.manifest.metrics.accuracy.items() if value is not None}


def records_of(version: Version) -> dict[str, int]:
    """Its numbers of records by their use."""
    return {kind: version.manifest.records.get(kind, 0) for kind in ("train", "held_out", "quarantined")}


def headline(line: Sequence[VersionView]) -> str:
    """What is in production, and how it compares with the version before it, as a sentence.

    Args:
        line: The versions that led to production, oldest first.
    """
    if not line:
        return "No version is in production yet."
    production = line[-1]
    text = f"Version {production.number} is in production"
    if math.isnan(production.average):
        return f"{text}."
    count = len(production.accuracy)
    text += f": {percent(production.average)}{NBSP}% right on average over {count} held-out slice{'s' * (count > 1)}"
    before = next((view for view in line if view.number == production.version.parent), None)
    if before is None or math.isnan(production.change):
        return f"{text}."
    common = len(production.accuracy.keys() & before.accuracy.keys())
    on = "it" if common == count == 1 else f"the {common} that both were measured on" if common < count else "them"
    how = f"{percent(abs(production.change))}{NBSP}points {'below' if production.change < 0 else 'above'}"
    return f"{text}, {how} version {before.number} on {on}."


def _change(name: str, line: Sequence[VersionView]) -> float:
    """Production's accuracy on a slice, less that of the best version before it; NaN if no other was measured on it."""
    before = [view.accuracy[name] for view in line[:-1] if name in view.accuracy]
    return line[-1].accuracy[name] - max(before) if before else math.nan


def facts(registry: Registry, views: Sequence[VersionView], line: Sequence[VersionView]) -> list[tuple[str, str, str]]:
    """The figures at the head of the page, each as its name, its value and the details below it."""
    counts = {status: sum(view.status == status for view in views) for status in (REFUSED, ROLLED_BACK)}
    promoted = sum(view.served for view in views)
    parts = [f"{promoted} promoted", *(f"{count} {status}" for status, count in counts.items() if count)]
    total = {kind: sum(view.records[kind] for view in line) for kind in ("train", "held_out", "quarantined")}
    kept = f"{total['held_out']:,} held out, {total['quarantined']:,} in quarantine"
    facts = [("Versions", f"{len(views):,}", ", ".join(parts)), ("Records learned", f"{total['train']:,}", kept)]
    return [*facts, *_pending(registry)]


def _pending(registry: Registry) -> list[tuple[str, str, str]]:
    """The number of records in the journal that production has not learned, as a figure; empty without a journal."""
    from evertune.live.backlog import pending_segments
    from evertune.registry.journal import Journal

    journal = Journal(registry.store)
    try:
        if journal.last is None:
            return []
        count = sum(journal.sizes(pending_segments(registry)))
    except (RegistryError, ValueError) as error:
        return [("Records pending", "?", str(error))]
    return [("Records pending", f"{count:,}", "wait for the next update")]


def details_of(view: VersionView) -> list[tuple[str, str]]:
    """Where a version comes from, as names and values."""
    manifest = view.version.manifest
    digest = next((value for name, value in manifest.files.items() if name.endswith(".safetensors")), "")
    offset = manifest.offset
    details = [
        ("Created", view.created),
        ("Learned", view.name),
        ("Because", view.cause),
        ("From", f"version {view.version.parent}" if view.version.parent is not None else "a pretrained model"),
        ("Module", manifest.module or UNKNOWN),
        ("Classes", _listed(manifest.classes)),
        ("Beyond its records", base_words(manifest.metrics)),
        ("Source offset", brief(offset) if offset else ""),
        ("Written by", manifest.code or UNKNOWN),
        ("Weights, sha256", digest[:16]),
    ]
    return [(name, value) for name, value in details if value]


def base_words(metrics: Metrics) -> str:
    """What a language model can do that no update trains; empty if it was not measured.

    Example:
        >>> base_words(Metrics(base={"loss": 2.5, "skills": 0.9}))
        'general texts: 2.500 nats per token, probes: 90.0 %'
    """
    loss, skills = metrics.base.get("loss"), metrics.base.get("skills")
    texts = [] if loss is None else [f"general texts: {loss:.3f} nats per token"]
    return ", ".join(texts + ([] if skills is None else [f"probes: {percent(skills)} %"]))


def _listed(names: Sequence[str]) -> str:
    """The number of names and the names themselves; empty if there are none.

    Example:
        >>> _listed(["sport", "tech"])
        '2: sport, tech'
    """
    return f"{len(names)}: {', '.join(names[:MAX_SHOWN])}{', …' * (len(names) > MAX_SHOWN)}" if names else ""


def held_slices(line: Sequence[VersionView], slices: dict[str, int | None]) -> list[SliceView]:
    """The slices that production was measured on, oldest first; of more than fit, those that lost the most."""
    if not line:
        return []
    production = line[-1]
    examples = {entry.name: entry.examples for entry in production.version.slices()}
    held = [
        SliceView(name, number, examples.get(name, 0), production.accuracy[name], _change(name, line))
        for name, number in slices.items()
        if name in production.accuracy
    ]
    lost = sorted(held, key=lambda slice_: (math.isnan(slice_.change), slice_.change))
    return held if len(held) <= MAX_SHOWN else lost[:MAX_SHOWN]


def timeline(views: Sequence[VersionView], events: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The versions and the changes of production by hand, newest first."""
    entries = [Entry(view.version.created, view.color, reason=view.words, view=view) for view in views]
    versions = {view.number: view.version for view in views}
    been: set[int] = set()  # versions that were in production before
    for event in events:
        old, new, rolled_back = event["from"], event["to"], event["action"] == "rollback"
        version = versions.get(new)
        # The gate promotes a version that passes once, in the place of its parent. Any other promotion is the decision
        # of a person.
        passed = version is None or (version.passed and version.parent == old)
        by_hand = event["action"] == "promote" and (new in been or not passed or (old is not None and new < old))
        if event["action"] in ("promote", "rollback"):
            been |= {new} if old is None else {old, new}
        if rolled_back or by_hand:
            text = f"Rolled back from version {old} to {new}" if rolled_back else f"Version {new} promoted by hand"
            reason = "\n".join(str(event[name]) for name in ("reason", "by") if event.get(name))
            color = COLORS[ROLLED_BACK if rolled_back else PROMOTED]
            entries.append(Entry(datetime.fromisoformat(event["time"]), color, text, reason))
    return sorted(entries, key=lambda entry: entry.at)[::-1]


def mean(values: Sequence[float]) -> float:
    """The mean; NaN without values."""
    return sum(values) / len(values) if values else math.nan
