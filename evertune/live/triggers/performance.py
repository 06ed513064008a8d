"""When an update is due because production does worse on what arrives than on what it was published with."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

from evertune.drift.performance import PerformanceEstimator
from evertune.live.triggers.base import Situation, Trigger, positive
from evertune.live.triggers.thresholds import Static, Threshold

_Answers: TypeAlias = tuple[np.ndarray, np.ndarray]  # their confidence, and whether they were right
_NONE: _Answers = (np.empty(0), np.empty(0, bool))


class PerformanceDrop(Trigger):
    """Due when production's accuracy on new records is below what it had on held-out ones when it was published.

    The pending records, which have labels and which production has not learned, are cut into windows in the order in
    which they arrived, and production predicts each once. The newest whole window decides, if records in it are new:
    its reading is the accuracy on the held-out records of all updates, as the gate saw it, less that in the window. The
    reading alarms above the ``threshold``, if an exact test of the counts (Fisher 1935, one-sided) rules out chance as
    well. So false alarms do not become more when one looks more often: there are ``alpha`` a window at most.

    Where labels are late (a label join) and no whole window is new, the accuracy on the newest ``window`` texts that
    wait for their labels is estimated from production's confidence
    (:class:`~evertune.drift.performance.PerformanceEstimator`), and tested as if it had been counted. What a confidence
    stands for is learned from the held-out records and the newest whole windows with labels: doubt is seen at once, and
    confident mistakes as far as labels have revealed them.

    A look costs one pass over the windows that no look has seen yet. After a restart the newest one, and so many before
    it as the threshold looks back on, are predicted again, and the same decision comes out.

    Args:
        threshold: of the reading, a loss of accuracy. Default: ``Static(0.05)``.
        window: records in a reading. Default: 250. Against 500 held-out records, nine such windows of ten tell an
            accuracy of 0.8 from one of 0.9 when published, and three of ten one of 0.85.
        alpha: the largest p-value that rules out chance.
        min_records: new records before it looks: records of a refused update wait for that many others.
        estimate: whether confidence stands in for labels that are late.

    Raises:
        ValueError: when a number is out of its range.
    """

    def __init__(
        self,
        threshold: Threshold | None = None,
        window: int = 250,
        alpha: float = 0.01,
        min_records: int = 64,
        estimate: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        self.threshold = threshold or Static(0.05)
        self.window = positive("window", window)
        self.alpha, self.estimate = alpha, estimate
        self.min_records = positive("min_records", min_records)
        # What has been looked at, so that it is not predicted again: decisions do not depend on it.
        self._version: int | None = None
        self._scored = False
        self._held_out: _Answers = _NONE
        self._said: dict[tuple[int | str, ...], _Answers] = {}  # in a window, by its place and its records' ids
        self._windows: tuple[int, list[_Answers]] = (0, [])  # pending records, and what was said in the newest windows
        self._confidence: dict[tuple[str, str], float] = {}  # in texts that wait, by their ids and origins

    def reason(self, situation: Situation) -> str | None:
        if situation.production is None or situation.production.number != self._version:
            self.readings = {}
        if situation.production is None:
            self.explanation = "performance: nothing is in production"
            return None
        if situation.n_new < self.min_records:
            self.explanation = f"performance: {situation.n_new} new records ({self.min_records} needed for a look)"
            return None
        if situation.production.number != self._version:
            self._take_up(situation, situation.production.number)
        if self._scored or not len(self._held_out[1]) or situation.predict is None:
            known = "not applicable, the labels are not classes, so no answer is right or wrong"
            unknown = "cannot tell, nothing is known of it when production was published"
            self.explanation = f"performance: {known if self._scored else unknown}"
            return None
        n_whole = situation.n_pending // self.window * self.window
        if n_whole > situation.n_pending - situation.n_new:
            *earlier, newest = self._newest(situation, n_whole)
            words = "accuracy {:.3f} on the newest {} records"
            return self._decide(float(newest[1].mean()), earlier, words)
        waiting = self._confidence_in_waiting(situation) if self.estimate else []
        if len(waiting) < self.window:
            have = situation.n_pending - n_whole
            self.explanation = f"performance: {have} of {self.window} labelled records for the next look"
            return None
        earlier = self._newest(situation, n_whole)
        words = "estimated accuracy {:.3f} on the newest {} texts without a label"
        return self._decide(_estimated([self._held_out, *earlier], waiting), earlier, words)

    def _take_up(self, situation: Situation, production: int) -> None:
        """Read what another version was published with."""
        self._version = None  # should this fail, the next look starts over
        said = list(situation.held_out().values())
        self._scored = not all(one.has_classes for one in said)
        self._held_out = _joined([_NONE, *((one.confidence, one.correct) for one in said if one.has_classes)])
        self._said, self._confidence, self._windows = {}, {}, (0, [])
        self._version = production

    def _newest(self, situation: Situation, n_whole: int) -> list[_Answers]:
        """What is said in the newest whole window, and in so many before it as matter; the newest is last."""
        if self._windows[0] == situation.n_pending:
            return self._windows[1]
        first = max(0, n_whole - (self.threshold.window + 1) * self.window)
        rows = situation.records() if n_whole else []
        windows = {start: rows[start : start + self.window] for start in range(first, n_whole, self.window)}
        keys = [(start, *(row["id"] for row in window)) for start, window in windows.items()]
        new = [key for key in keys if key not in self._said]
        if new:
            assert situation.predict is not None
            said = situation.predict([row for key in new for row in windows[key[0]]])
            for place, key in enumerate(new):
                own = slice(place * self.window, (place + 1) * self.window)
                self._said[key] = (said.confidence[own], said.correct[own])
        self._said = {key: self._said[key] for key in keys}
        self._windows = (situation.n_pending, list(self._said.values()))
        return self._windows[1]

    def _confidence_in_waiting(self, situation: Situation) -> list[float]:
        """How sure production is of the newest texts that wait for their labels."""
        rows = {(row["id"], row["origin"]): row for row in situation.waiting()[-self.window :]}
        new = [key for key in rows if key not in self._confidence]
        if len(rows) < self.window:
            return []
        if new:
            assert situation.predict is not None
            said = situation.predict([rows[key] for key in new]).confidence.tolist()
            self._confidence |= dict(zip(new, said, strict=True))
        self._confidence = {key: self._confidence[key] for key in rows}
        return list(self._confidence.values())

    def _decide(self, accuracy: float, earlier: list[_Answers], words: str) -> str | None:
        """Compare the accuracy in a window with that on the held-out records."""
        n_before, before = len(self._held_out[1]), int(self._held_out[1].sum())
        was = before / n_before
        limit = self.threshold.limit([was - float(right.mean()) for _, right in earlier])
        loss, p_value = was - accuracy, fisher(before, n_before, round(accuracy * self.window), self.window)
        words = f"{words.format(accuracy, self.window)}, {was:.3f} when published"
        self.readings = {"accuracy": accuracy, "accuracy_published": was, "accuracy_loss": loss}
        if limit is None:
            self.explanation = f"performance: {words}; too few readings before it to say what is unusual"
            return None
        self.readings["accuracy_loss_threshold"] = limit
        if loss > limit and p_value <= self.alpha:
            self.explanation = f"performance drop: {words}, a loss above {limit:.3g} (p={p_value:.2g})"
            return self.explanation
        why = f"no loss above {limit:.3g}" if loss <= limit else f"it may be chance (p={p_value:.2g})"
        self.explanation = f"no performance drop: {words}, {why}"
        return None


def fisher(before: int, n_before: int, now: int, n_now: int) -> float:
    """The one-sided p-value of a smaller share of successes now than before, by Fisher's exact test (1935).

    Example:
        >>> round(fisher(9, 10, 3, 10), 6)
        0.009883
    """
    total, successes = n_before + n_now, before + now
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, total + 1)).cumsum()])

    def log_choose(n: int, k: np.ndarray | int) -> np.ndarray:
        return np.asarray(log_factorial[n] - log_factorial[k] - log_factorial[n - k])

    k = np.arange(max(0, successes - n_before), now + 1)
    terms = log_choose(n_now, k) + log_choose(n_before, successes - k) - log_choose(total, successes)
    return min(1.0, float(np.exp(terms).sum()))


def _estimated(known: list[_Answers], confidence: list[float]) -> float:
    """The accuracy that confidences stand for, by answers of which it is known whether they were right, old to new."""
    sure, right = _joined(known)
    estimator = PerformanceEstimator()
    estimator.update(range(len(sure)), sure)
    estimator.labels(range(len(sure)), right)
    return float(estimator.calibrated(torch.tensor(confidence)).mean())


def _joined(answers: list[_Answers]) -> _Answers:
    return np.concatenate([sure for sure, _ in answers]), np.concatenate([right for _, right in answers])
