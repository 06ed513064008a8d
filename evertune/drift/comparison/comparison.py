"""What comparing two sets of records has found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from evertune.drift.explain.attribution import Attribution


@dataclass(frozen=True)
class SetAside:
    """Records that could not be used.

    Attributes:
        n: how many.
        reasons: why, and of how many, the most frequent first; the first few.
        first: where the first of them is.
    """

    n: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: str | None = None


@dataclass(frozen=True)
class Alarm:
    """A test whose score was above the threshold.

    Attributes:
        record: number of the record that completed the test, among those of ``current``; the first is 1.
        origin: where that record is: ``tickets.jsonl:17``.
        score: of the test.
        threshold: what it was above.
    """

    record: int
    origin: str
    score: float
    threshold: float


@dataclass(frozen=True)
class Scan:
    """What one detector said.

    Attributes:
        of: what it watched: ``text``, the name of a numeric field, or that of the label.
        detector: its name.
        arl: the mean number of records up to a false alarm that it was calibrated to.
        n_reference: records that it was armed with.
        n_records: records that it watched.
        n_tests: tests that it made.
        alarms: all of them; after the first, the scan continues with the same reference.
        points: ``{"record": int, "score": float, "threshold": float, "alarm": bool}`` as it went along.
    """

    of: str
    detector: str
    arl: float
    n_reference: int
    n_records: int
    n_tests: int
    alarms: list[Alarm]
    points: list[dict[str, Any]]

    @property
    def expected_false_alarms(self) -> float:
        """The mean number of false alarms in that many records, had nothing changed and had each been a new start."""
        return self.n_records / self.arl


@dataclass(frozen=True)
class Example:
    """A record that shows the change.

    Attributes:
        origin: where it is.
        text: its text, cut where it is long.
        label: its label, if there is one.
    """

    origin: str
    text: str
    label: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        reference: name of the reference.
        current: name of what was compared with it.
        features: what the records were turned into.
        block_size: records that were taken to be correlated.
        n_reference: usable records of the reference.
        n_current: usable records of what was compared with it.
        set_aside_reference: the others of the reference.
        set_aside_current: the others of what was compared with it.
        scans: what each detector said: of the texts (or of a number), and of the labels.
        attribution: what changed; positions in it are those of its samples: see the examples here instead.
        examples_before: records that are most typical of what has gone.
        examples_after: records that are most typical of what has come.
        topic_examples: of each topic of the attribution, an example before and after, where there is one.
        projection: the first two principal components of the features, before and after: ``[records][2]`` each.
    """

    reference: str
    current: str
    features: str
    block_size: int
    n_reference: int
    n_current: int
    set_aside_reference: SetAside
    set_aside_current: SetAside
    scans: list[Scan]
    attribution: Attribution
    examples_before: list[Example]
    examples_after: list[Example]
    topic_examples: list[tuple[Example | None, Example | None]]
    projection: tuple[list[list[float]], list[list[float]]]

    @property
    def drift_detected(self) -> bool:
        """Whether any detector raised an alarm."""
        return any(scan.alarms for scan in self.scans)

    @property
    def expected_false_alarms(self) -> float:
        """Of all detectors together, in that many records."""
        return sum(scan.expected_false_alarms for scan in self.scans)

    @property
    def false_alarm_chance(self) -> float:
        """The chance of at least one, had nothing changed: the decision is the first alarm."""
        return 1 - math.exp(-self.expected_false_alarms)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it: numbers that are not finite are None."""
        summary = {
            "drift_detected": self.drift_detected,
            "expected_false_alarms": self.expected_false_alarms,
            "false_alarm_chance": self.false_alarm_chance,
        }
        found: dict[str, Any] = _finite({**summary, **asdict(self)})
        return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
