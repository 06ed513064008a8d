"""Triggers on drift: the records that arrive, or their labels, differ from those that production has learned."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

import torch

from evertune.drift import MMD, Detector, Featuriser, HashedNgrams
from evertune.drift.sums import SumDetector
from evertune.live.triggers.base import Situation, Trigger, positive
from evertune.live.triggers.thresholds import Threshold

_BATCH = 256


class Drift(Trigger):
    """Due when the texts that arrive no longer look like those that production has learned.

    The detector's reference is a sample of the known texts that production has learned; it then processes the pending
    records in order, up to the first alarm. Without a version in production, or with too few texts for the detector's
    false-alarm rate, the trigger never fires, and ``explanation`` says why: combine it (``AnyOf``) with another
    trigger that starts the first updates.

    Similar records that arrive in bursts look like drift: use a detector with a ``block_size`` for them (see
    :class:`~evertune.drift.MMD`).

    A detector of single numbers needs a featuriser that returns one number per text, ``[texts, 1]``, such as its
    length.

    Args:
        detector: The detector that decides, used as a template that is not changed. Default:
            :class:`~evertune.drift.MMD` with one false alarm in 10,000 records and a reference of up to 512 texts; it
            needs 128.
        featuriser: A function from a list of texts to features, ``texts -> tensor [texts, n_features]``, that does not
            learn. Default: :class:`~evertune.drift.HashedNgrams` of words. :class:`~evertune.drift.FrozenEncoder`
            captures meaning, but takes milliseconds per text.
        min_records: Minimum number of new records before the detector is run; the records of a refused update count
            again once this many others have arrived. Default: 64.
        threshold: Decides instead of the detector, on the score of each test, given the scores of the earlier tests
            since this version went into production. The detector's false-alarm rate does not hold then. After a restart
            the scores are recomputed from the pending records. Default: the detector decides.

    Raises:
        ValueError: If ``min_records`` is not positive.
    """

    _name, _units = "drift", "texts"

    def __init__(
        self,
        detector: Detector | None = None,
        featuriser: Featuriser | None = None,
        min_records: int = 64,
        threshold: Threshold | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.featuriser = featuriser or HashedNgrams()
        self.min_records = positive("min_records", min_records)
        self.threshold = threshold
        # A cache of what has been processed, so that the next call continues from there; decisions do not depend on it.
        self._version: int | None = None
        self._ids: list[str] = []
        self._watching: Detector | str = ""  # the detector, or the reason why there is none
        self._n_reference = self._n_tests = 0  # the detector's counts before the first pending record
        self._scores: list[float] = []
        self._alarm: tuple[float, float, int] | None = None  # score, limit and record
        self._limit: float | None = None
        self._rest = torch.empty(0)  # features of the records that do not fill a window yet

    def reason(self, situation: Situation) -> str | None:
        if situation.production is None or situation.production.number != self._version:
            self.readings = {}
        if situation.production is None:
            self.explanation = f"{self._name}: nothing is in production to compare with"
            return None
        if situation.n_new < self.min_records:
            self.explanation = f"{self._name}: {situation.n_new} new records ({self.min_records} needed for a look)"
            return None
        if self._version != situation.production.number or len(self._ids) != situation.n_pending:
            self._look(situation, situation.production.number)
        if isinstance(self._watching, str):
            self.explanation = f"{self._name}: cannot tell, {self._watching}"
            return None
        return self._decision(self._watching)

    def _known(self, situation: Situation) -> list[Any]:
        """The values of which the reference is a sample."""
        return situation.memory_texts()

    def _seen(self, record: dict[str, Any], situation: Situation) -> Any:
        """The part of a record that is watched."""
        names = [situation.text] if isinstance(situation.text, str) else situation.text
        return " ".join(str(record.get(name) or "") for name in names)

    def _default(self, n_known: int) -> Detector:
        return MMD(reference_size=max(1, min(n_known, 512)))

    def _look(self, situation: Situation, production: int) -> None:
        """Process the new pending records; while the version in production stays the same, records are only added."""
        rows = situation.records()
        ids = [row["id"] for row in rows]
        version, self._version = self._version, None  # if this call fails, the next one starts over
        if version != production or ids[: len(self._ids)] != self._ids:
            self._ids, self._scores, self._alarm, self._limit, self._rest = [], [], None, None, torch.empty(0)
            self._watching = self._armed(self._known(situation))
        if isinstance(self._watching, Detector):
            new = [self._seen(row["record"], situation) for row in rows[len(self._ids) :]]
            for features in self._features(new):
                if self._alarm is None:  # the first alarm stands
                    self._watch(self._watching, features)
        self._version, self._ids = production, ids

    def _watch(self, detector: Detector, features: torch.Tensor) -> None:
        """Process some records, up to the first alarm."""
        for piece in self._pieces(detector, features):
            if self._alarm is not None:
                return
            n_tests = detector.n_tests
            detector.update(piece)
            if detector.n_tests == n_tests:
                continue
            if self.threshold is None:
                self._limit, alarm = detector.threshold, detector.drift_detected
            else:
                self._limit = self.threshold.limit(self._scores)
                alarm = self._limit is not None and detector.score > self._limit
                self._scores.append(detector.score)
            if alarm and self._limit is not None:
                own = detector.detected_at if self.threshold is None else None
                self._alarm = (detector.score, self._limit, (own or detector.n_seen) - self._n_reference)

    def _pieces(self, detector: Detector, features: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split records into whole windows, so that scores are bit-identical however the records arrived.

        If the trigger's own threshold decides, each piece completes at most one test.
        """
        if isinstance(detector, SumDetector):
            features = torch.cat([self._rest, features]) if len(self._rest) else features
            size = detector.stretch
        elif self.threshold is None:
            return [features]
        else:
            size = 1
        n_whole = len(features) // size * size
        self._rest = features[n_whole:].clone()
        return [features[start : start + size] for start in range(0, n_whole, size)]

    def _decision(self, detector: Detector) -> str | None:
        if detector.n_tests == self._n_tests:
            n_seen = detector.n_seen - self._n_reference + len(self._rest)
            self.explanation = f"{self._name}: no test yet ({n_seen} records seen)"
            return None
        value, limit, record = self._alarm or (detector.score, self._limit, 0)
        reading = self._name.replace(" ", "_")
        self.readings = {f"{reading}_score": value}
        score = f"score {value:.3g}"
        if limit is None:
            tests = f"{len(self._scores)} tests so far"
            self.explanation = f"{self._name}: {score}, too few before it to say what is unusual ({tests})"
            return None
        self.readings[f"{reading}_threshold"] = limit
        if self._alarm is None:
            self.explanation = f"no {self._name}: {score}, the alarm is above {limit:.3g}"
            return None
        self.explanation = f"{self._name}: {score} above {limit:.3g} at record {record}"
        return self.explanation

    def _armed(self, known: list[Any]) -> Detector | str:
        """A detector whose reference is a sample of the known values, or the reason why there is none."""
        if self.detector is not None:
            detector = copy.deepcopy(self.detector)
            detector.reset()
        else:
            try:
                detector = self._default(len(known))
            except ValueError as error:
                return str(error)
        # Shuffled with a fixed seed, so that the reference is a random sample and the same after a restart.
        for features in self._features(random.Random(0).sample(known, len(known))):
            for record in features:
                if not detector.armed:
                    detector.update(record)
        self._n_reference, self._n_tests = detector.n_seen, detector.n_tests
        too_few = f"the {len(known)} {self._units} known of production are too few for the detector's reference"
        return detector if detector.armed else too_few

    def _features(self, values: list[Any]) -> list[torch.Tensor]:
        parts = (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))
        return [torch.as_tensor(self.featuriser(part)).cpu() for part in parts]


class LabelDrift(Drift):
    """Due when the labels that arrive are distributed otherwise than those that production has learned.

    Like :class:`Drift`, on labels. Of classes, the shares are compared: more complaints and fewer orders, or a class
    that production does not know. (All unknown classes count as one. If a record has several labels, each combination
    counts as a class.) Of numbers, those of a regression, the whole distribution is: higher prices, or only very good
    and very bad grades. With several numbers in a label, each counts.

    Args:
        detector: A detector of class numbers or, for a regression, of the numbers of a label, used as a template that
            is not changed. Default: :class:`~evertune.drift.labels.LabelShift` for classes and
            :class:`~evertune.drift.MarginalKS` for numbers, with one false alarm in 10,000 records and a reference of
            up to 512 labels; it needs 128.
        min_records: Minimum number of new records before the detector is run; the records of a refused update count
            again once this many others have arrived. Default: 64.
        threshold: Decides instead of the detector, as in :class:`Drift`.

    Raises:
        ValueError: If ``min_records`` is not positive.
    """

    _name, _units = "label drift", "labels"

    def __init__(
        self, detector: Detector | None = None, min_records: int = 64, threshold: Threshold | None = None
    ) -> None:
        super().__init__(detector, self._numbered, min_records, threshold)
        self._numbers: dict[str, int] = {}

    def reason(self, situation: Situation) -> str | None:
        labels = situation.memory_labels() if situation.production is not None else []
        if labels and not any(_are_numbers(one) or situation.label_names(one) for one in labels):
            self.explanation, self.readings = "label drift: not applicable, the labels are texts", {}
            return None
        return super().reason(situation)

    def _known(self, situation: Situation) -> list[Any]:
        known = [_numbers_or_name(label, situation) for label in situation.memory_labels()]
        names = {label for label in known if isinstance(label, str)}
        self._numbers = {name: number for number, name in enumerate(sorted(names))}
        return known

    def _seen(self, record: dict[str, Any], situation: Situation) -> Any:
        return None if situation.label is None else _numbers_or_name(record.get(situation.label), situation)

    def _default(self, n_known: int) -> Detector:
        from evertune.drift import MarginalKS
        from evertune.drift.labels import LabelShift

        size = max(1, min(n_known, 512))
        if not self._numbers:
            return MarginalKS(reference_size=size)
        return LabelShift(n_classes=len(self._numbers), reference_size=size)

    def _numbered(self, labels: Sequence[Any]) -> torch.Tensor:
        """The number of each class, ``[labels, 1]``, or the numbers of each label, ``[labels, numbers]``.

        All classes that production does not know share one number.
        """
        if not self._numbers:
            return torch.tensor(labels)
        return torch.tensor([[float(self._numbers.get(name, len(self._numbers)))] for name in labels])


def _are_numbers(label: Any) -> bool:
    """Whether a label is a number, or several."""
    numbers = label if isinstance(label, list) else [label]
    return bool(numbers) and all(isinstance(one, int | float) for one in numbers)


def _numbers_or_name(label: Any, situation: Situation) -> list[float] | str:
    """The numbers of a regression's label; otherwise the names of its classes as one name."""
    if _are_numbers(label):
        return [float(one) for one in (label if isinstance(label, list) else [label])]
    return json.dumps(sorted(set(situation.label_names(label))))
