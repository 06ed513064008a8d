"""When an update is due because the records that arrive, or their labels, are no longer those that were learned."""

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
    """Due when what arrives no longer looks like what production has learned.

    The detector's reference is a sample of the texts that are known of what production has learned; then it looks at
    the pending records in order, up to the first alarm. Without a version in production, or with too few texts to hold
    the detector's false-alarm rate, there is no reason, and :attr:`explanation` says so: combine it with another
    trigger (``AnyOf``) that brings the first updates.

    Records that arrive in spells, all of a kind together, look like drift: they ask for a detector with a
    ``block_size`` (see :class:`~evertune.drift.MMD`).

    A detector of single numbers needs a featuriser that gives one: ``[texts, 1]``, as of their lengths.

    Args:
        detector: decides; used as a template, it stays as it is. Default: :class:`~evertune.drift.MMD` with one false
            alarm in 10,000 records and a reference of up to 512 texts; it needs 128.
        featuriser: a frozen view of a list of texts, ``texts -> tensor [texts, n_features]``. Default:
            :class:`~evertune.drift.HashedNgrams`, of words; :class:`~evertune.drift.FrozenEncoder` sees meaning and
            costs milliseconds a text.
        min_records: new records before it looks: records of a refused update wait for that many others.
        threshold: decides in the detector's place, on the score of each test, given those of the tests before it since
            this version is in production. The detector's false-alarm rate is not kept then. The scores are computed
            again from the pending records after a restart. Default: the detector decides.

    Raises:
        ValueError: when ``min_records`` is not positive.
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
        # What has been looked at, so that the next look continues from there: decisions do not depend on it.
        self._version: int | None = None
        self._ids: list[str] = []
        self._watching: Detector | str = ""  # or why it cannot
        self._n_reference = self._n_tests = 0  # of the detector, when the pending records begin
        self._scores: list[float] = []
        self._alarm: tuple[float, float, int] | None = None  # score, limit and record
        self._limit: float | None = None
        self._rest = torch.empty(0)  # features of the records that fill no window yet

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
        """What the reference is a sample of."""
        return situation.memory_texts()

    def _seen(self, record: dict[str, Any], situation: Situation) -> Any:
        """What is looked at of a record."""
        names = [situation.text] if isinstance(situation.text, str) else situation.text
        return " ".join(str(record.get(name) or "") for name in names)

    def _default(self, n_known: int) -> Detector:
        return MMD(reference_size=max(1, min(n_known, 512)))

    def _look(self, situation: Situation, production: int) -> None:
        """Look at the pending records that are new; those of one version in production only grow in number."""
        rows = situation.records()
        ids = [row["id"] for row in rows]
        version, self._version = self._version, None  # should this look fail, the next starts over
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
        """Look at some records, up to the first alarm."""
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
        """Records as the detector is to see them: whole stretches, so that no digit depends on when they arrived.

        Where a threshold of our own decides, there is one test in a piece.
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
        """A detector whose reference is a sample of what is known, or why there is none."""
        if self.detector is not None:
            detector = copy.deepcopy(self.detector)
            detector.reset()
        else:
            try:
                detector = self._default(len(known))
            except ValueError as error:
                return str(error)
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
    """Due when the labels of what arrives come in other shares than those of what production has learned.

    As :class:`Drift`, on labels: more complaints and fewer orders, or a class that production does not know. (All such
    classes count together. With several labels a record, each combination counts as a class.)

    Args:
        detector: of class numbers; used as a template, it stays as it is. Default:
            :class:`~evertune.drift.labels.LabelShift` with one false alarm in 10,000 records and a reference of up to
            512 labels; it needs 128.
        min_records: new records before it looks: records of a refused update wait for that many others.
        threshold: decides in the detector's place, as in :class:`Drift`.

    Raises:
        ValueError: when ``min_records`` is not positive.
    """

    _name, _units = "label drift", "labels"

    def __init__(
        self, detector: Detector | None = None, min_records: int = 64, threshold: Threshold | None = None
    ) -> None:
        super().__init__(detector, self._numbered, min_records, threshold)
        self._numbers: dict[str, int] = {}

    def reason(self, situation: Situation) -> str | None:
        labels = situation.memory_labels() if situation.production is not None else []
        if labels and not any(isinstance(one, list) or situation.label_names(one) for one in labels):
            self.explanation, self.readings = "label drift: not applicable, the labels are not classes", {}
            return None
        return super().reason(situation)

    def _known(self, situation: Situation) -> list[Any]:
        known = [_name_of(label) for label in situation.memory_labels()]
        self._numbers = {name: number for number, name in enumerate(sorted(set(known)))}
        return known

    def _seen(self, record: dict[str, Any], situation: Situation) -> Any:
        return _name_of(record.get(situation.label))

    def _default(self, n_known: int) -> Detector:
        from evertune.drift.labels import LabelShift

        return LabelShift(n_classes=max(1, len(self._numbers)), reference_size=max(1, min(n_known, 512)))

    def _numbered(self, names: Sequence[str]) -> torch.Tensor:
        """The number of each class, ``[labels, 1]``; one number for all classes that production does not know."""
        return torch.tensor([[float(self._numbers.get(name, len(self._numbers)))] for name in names])


def _name_of(label: Any) -> str:
    return json.dumps(sorted(label) if isinstance(label, list) else label)
