"""Detectors by name, and their application to records."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from evertune.drift.comparison.comparison import Alarm, Scan
from evertune.drift.detector import Detector
from evertune.drift.sums import SumDetector
from evertune.sources.base import Incoming

DETECTORS: dict[str, tuple[str, str]] = {
    "mmd": ("mmd", "MMD"),
    "lsdd": ("lsdd", "LSDD"),
    "ks": ("marginals", "MarginalKS"),
    "classifier": ("classifier", "ClassifierTest"),
    "kernel-cusum": ("kernel_cusum", "KernelCUSUM"),
    "page-hinkley": ("scalars", "PageHinkley"),
    "adwin": ("scalars", "ADWIN"),
    "hddm": ("scalars", "HDDM"),
}
"""Module and class of each detector by its name on the command line."""

OF_NUMBERS = ("page-hinkley", "adwin", "hddm")
"""Detectors that watch one number of each record."""

_STEP = 16  # records between two checks of a detector without windows
_LOOK_BACK = 64  # records up to an alarm that count as changed, for a detector without windows


def make_detector(name: str, **settings: Any) -> Detector:
    """A detector by its name in :data:`DETECTORS`; settings that are None are left at their defaults.

    Raises:
        ValueError: If the name is unknown, or the detector lacks a setting other than ``reference_size`` and ``seed``.

    Example:
        >>> make_detector("mmd", arl=5_000, reference_size=256, window_size=None, seed=0).reference_size
        256
    """
    if name not in DETECTORS:
        raise ValueError(f"there is no detector {name!r}; there are {', '.join(DETECTORS)}")
    module, kind = DETECTORS[name]
    try:
        made: Any = getattr(import_module(f"evertune.drift.{module}"), kind)
    except ModuleNotFoundError as error:
        raise ValueError(f"the detector {name} is not there: {error}") from error
    taken = inspect.signature(made).parameters
    given = {key: setting for key, setting in settings.items() if setting is not None}
    for key in given:
        if key not in taken and key not in ("reference_size", "seed"):
            raise ValueError(f"{name} has no {key}: leave it out")
    detector: Detector = made(**{key: setting for key, setting in given.items() if key in taken})
    return detector


class Watch:
    """An armed detector that processes records step by step, and continues after an alarm.

    Attributes:
        step: Number of records to process at once, so that there is at most one test.
        look_back: Number of records up to an alarm that count as changed.
        alarms: Alarms so far.

    Args:
        detector: A new detector, which is armed here.
        of: Name of what it watches, for messages.
        reference: Features ``[records, n_features]`` to arm it with.

    Raises:
        ValueError: If there are too few of them.
    """

    def __init__(self, detector: Detector, of: str, reference: Tensor) -> None:
        self.detector, self.of = detector, of
        window: int | None = getattr(detector, "window_size", None)
        self.step = detector.stretch if isinstance(detector, SumDetector) else window or _STEP
        self.look_back = window or _LOOK_BACK
        self.alarms: list[Alarm] = []
        self._points: list[dict[str, Any]] = []
        detector.update(reference)
        if not detector.armed:
            raise ValueError(f"the {len(reference)} usable records of the reference are too few to arm the detector")
        self._n_reference = detector.n_seen

    def look(self, records: Sequence[Incoming], features: Tensor) -> None:
        """Process the next records, at most :attr:`step` of them."""
        n_before, n_tests = self.detector.n_seen - self._n_reference, self.detector.n_tests
        self.detector.update(features)
        if self.detector.n_tests == n_tests:
            return
        alarm, at = self.detector.drift_detected, self.detector.detected_at
        record = at - self._n_reference if alarm and at is not None else n_before + len(features)
        score, threshold = self.detector.score, self.detector.threshold
        self._points.append({"record": record, "score": score, "threshold": threshold, "alarm": alarm})
        if alarm:
            self.alarms.append(Alarm(record, records[record - n_before - 1].origin, score, threshold))

    def scan(self) -> Scan:
        """The results so far."""
        return Scan(
            of=self.of,
            detector=type(self.detector).__name__,
            arl=float(getattr(self.detector, "arl", math.nan)),
            n_reference=self._n_reference,
            n_records=self.detector.n_seen - self._n_reference,
            n_tests=self.detector.n_tests,
            alarms=self.alarms,
            points=self._points,
        )


class LabelWatch(Watch):
    """Watches the class numbers of labels; labels that are not in the reference count as one more class."""

    def __init__(self, detector: Detector, label: str, names: Sequence[str]) -> None:
        self._label = label
        self._classes = {name: number for number, name in enumerate(sorted(set(names)))}
        super().__init__(detector, label, self._numbers(names))

    def look(self, records: Sequence[Incoming], features: Tensor) -> None:
        """Process the labels of the next records; records without a label are left out."""
        named = [(record, name) for record in records if (name := label_of(record, self._label)) is not None]
        for start in range(0, len(named), self.step):
            part = named[start : start + self.step]
            super().look([record for record, _ in part], self._numbers([name for _, name in part]))

    def _numbers(self, names: Sequence[str]) -> Tensor:
        return torch.tensor([[self._classes.get(name, len(self._classes))] for name in names])


def watch_labels(
    label: str, reference: Sequence[Incoming], *, arl: float, block_size: int = 1, seed: int = 0
) -> LabelWatch:
    """A watch of the shares of labels.

    Raises:
        ValueError: If the reference has no labels, or too few.
    """
    from evertune.drift.labels import LabelShift

    names = [name for record in reference if (name := label_of(record, label)) is not None]
    # The detector needs a whole number of blocks: the oldest labels are dropped.
    names = names[len(names) % block_size :]
    if not names:
        raise ValueError(f"no record of the reference has a label in {label!r}")
    detector = LabelShift(arl, reference_size=len(names), block_size=block_size, seed=seed)
    return LabelWatch(detector, label, names)


def label_of(record: Incoming, label: str) -> str | None:
    """The label as text; None if it is missing."""
    value = (record.value or {}).get(label)
    return None if value is None or value == "" else str(value)
