"""The result of a comparison of two sets of records."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from evertune.drift.explain.attribution import Attribution
from evertune.utils.notebooks import table


@dataclass(frozen=True)
class SetAside:
    """The records that could not be used.

    Attributes:
        n: Number of these records.
        reasons: The most frequent reasons, with the number of records for each.
        first: Origin of the first of these records, with the reason; None if there is none.
    """

    n: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: str | None = None


@dataclass(frozen=True)
class Alarm:
    """A test whose score was above the threshold.

    Attributes:
        record: Number of the record that completed the test, among those of ``current``, counted from 1.
        origin: Origin of that record: ``tickets.jsonl:17``.
        score: Score of the test.
        threshold: Threshold that the score exceeded.
    """

    record: int
    origin: str
    score: float
    threshold: float


@dataclass(frozen=True)
class Scan:
    """The results of one detector.

    Attributes:
        of: What it watched: ``text``, or the name of a numeric field or of the label field.
        detector: Name of the detector's class.
        arl: Mean number of records up to a false alarm to which it was calibrated; NaN if it has no such setting.
        n_reference: Number of records that it was armed with.
        n_records: Number of records that it watched.
        n_tests: Number of tests that it made.
        alarms: All alarms; after the first, the scan continued with the same reference.
        points: The tests in order: ``{"record": int, "score": float, "threshold": float, "alarm": bool}``.
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
        """The mean number of false alarms in that many records if nothing has changed, with a new start each time."""
        return self.n_records / self.arl


@dataclass(frozen=True)
class Example:
    """A record that illustrates the change.

    Attributes:
        origin: Origin of the record.
        text: Text of the record, truncated if it is long.
        label: Label of the record, if there is one.
    """

    origin: str
    text: str
    label: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        reference: Name of the reference.
        current: Name of the current records, which were compared with the reference.
        features: Description of the features that the records were turned into.
        block_size: Number of consecutive records that were assumed to be correlated.
        n_reference: Number of usable records of the reference.
        n_current: Number of usable current records.
        set_aside_reference: The unusable records of the reference.
        set_aside_current: The unusable current records.
        scans: Results of each detector: of the texts (or of a number), and of the labels.
        attribution: What has changed. Positions in it refer to its samples; use the examples here instead.
        examples_before: Records that are most typical of what has disappeared.
        examples_after: Records that are most typical of what has appeared.
        topic_examples: An example before and after for each topic of the attribution; None where there is none.
        projection: The first two principal components of the features, before and after, ``[records][2]`` each.
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

    def _repr_html_(self) -> str:
        """What each detector found, as a notebook shows it."""
        words = f"{self.current} against {self.reference}: {'drift' if self.drift_detected else 'no drift'}"
        rows = [
            [scan.of, scan.detector, scan.n_records, scan.n_tests, len(scan.alarms), *_first(scan)]
            for scan in self.scans
        ]
        return table(words, ["of", "detector", "records", "tests", "alarms", "first at", "score", "threshold"], rows)

    @property
    def drift_detected(self) -> bool:
        """Whether any detector raised an alarm."""
        return any(scan.alarms for scan in self.scans)

    @property
    def expected_false_alarms(self) -> float:
        """The expected number of false alarms of all detectors together, in that many records."""
        return sum(scan.expected_false_alarms for scan in self.scans)

    @property
    def false_alarm_chance(self) -> float:
        """The probability of at least one false alarm if nothing has changed, as the decision is the first alarm."""
        return 1 - math.exp(-self.expected_false_alarms)

    def as_json(self) -> dict[str, Any]:
        """The whole result as JSON values; numbers that are not finite become None."""
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


def _first(scan: Scan) -> list[str]:
    """The place, the score and the threshold of the first alarm; empty without any."""
    if not scan.alarms:
        return ["", "", ""]
    alarm = scan.alarms[0]
    return [f"{alarm.record:,} ({alarm.origin})", f"{alarm.score:.3g}", f"{alarm.threshold:.3g}"]
