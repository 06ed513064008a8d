"""A trigger on performance: production is less accurate on new records than it was when it was published."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

from evertune.drift.performance import PerformanceEstimator
from evertune.gate.statistics import smaller_mean
from evertune.live.triggers.base import Situation, Trigger, positive
from evertune.live.triggers.thresholds import Static, Threshold

_Answers: TypeAlias = tuple[np.ndarray, np.ndarray]  # their confidence, and their scores: 1 or 0 for right or wrong
_NONE: _Answers = (np.empty(0), np.empty(0))


class PerformanceDrop(Trigger):
    """Due when production's accuracy on new records is below its accuracy on held-out records when it was published.

    The pending records, which have labels and which production has not learned, are cut into windows in the order in
    which they arrived, and production predicts each window once. The newest complete window decides, if it contains new
    records: its reading is the accuracy on all slices, as measured by the gate, minus the accuracy in the window. A
    reading above the ``threshold`` raises an alarm if an exact test of the counts (Fisher
    1935, one-sided) also rules out chance. Checking more often therefore does not cause more false alarms: there are at
    most ``alpha`` per window.

    Where labels are not classes (numbers, entities, texts), the mean score of the task takes the place of the accuracy,
    and a randomisation test (Pitman 1937) that of the exact one.

    If labels of classes arrive late (a label join) and no complete window is new, the accuracy on the newest ``window``
    texts that are waiting for their labels is estimated from production's confidence
    (:class:`~evertune.drift.performance.PerformanceEstimator`), and tested as if it had been counted. The map from
    confidence to accuracy is learned from the held-out records and the newest complete windows with labels: low
    confidence shows at once, confident mistakes only once labels have revealed them.

    Each call costs one pass over the windows that have not been predicted yet. After a restart, the newest window and
    those before it that the threshold depends on are predicted again, with the same decision.

    Args:
        threshold: Threshold on the reading, a loss of accuracy. Default: ``Static(0.05)``.
        window: Number of records per reading. Default: 250. Against 500 held-out records, a drop of the accuracy from
            0.9 to 0.8 is detected in nine of ten such windows, and a drop to 0.85 in three of ten.
        alpha: The largest p-value that rules out chance. Default: 0.01.
        min_records: Minimum number of new records before anything is predicted; the records of a refused update count
            again once this many others have arrived. Default: 64.
        estimate: Whether to estimate the accuracy from confidence while labels are late.

    Raises:
        ValueError: If a number is out of range.
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
        # A cache of what has been predicted, so that it is not predicted again; decisions do not depend on it.
        self._version: int | None = None
        self._scored = False
        self._held_out: _Answers = _NONE
        self._said: dict[tuple[int | str, ...], _Answers] = {}  # answers by a window's position and ids
        self._windows: tuple[int, list[_Answers]] = (0, [])  # number of pending records, and the newest answers
        self._confidence: dict[tuple[str, str], float] = {}  # confidence on texts that wait, by their ids and origins

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
        if not len(self._held_out[1]) or situation.predict is None:
            self.explanation = "performance: cannot tell, nothing is known of it when production was published"
            return None
        n_whole = situation.n_pending // self.window * self.window
        if n_whole > situation.n_pending - situation.n_new:
            *earlier, newest = self._newest(situation, n_whole)
            words = f"{'score' if self._scored else 'accuracy'} {{:.3f}} on the newest {{}} records"
            return self._decide(float(newest[1].mean()), earlier, words, newest[1])
        waiting = self._confidence_in_waiting(situation) if self.estimate and not self._scored else []
        if len(waiting) < self.window:
            have = situation.n_pending - n_whole
            self.explanation = f"performance: {have} of {self.window} labelled records for the next look"
            return None
        earlier = self._newest(situation, n_whole)
        words = "estimated accuracy {:.3f} on the newest {} texts without a label"
        return self._decide(_estimated([self._held_out, *earlier], waiting), earlier, words)

    def _take_up(self, situation: Situation, production: int) -> None:
        """Read the held-out predictions of a version that is new in production."""
        self._version = None  # if this call fails, the next one starts over
        said = list(situation.held_out().values())
        self._scored = not all(one.has_classes for one in said)
        self._held_out = _joined([_NONE, *((one.confidence, one.score) for one in said)])
        self._said, self._confidence, self._windows = {}, {}, (0, [])
        self._version = production

    def _newest(self, situation: Situation, n_whole: int) -> list[_Answers]:
        """The answers in the newest complete window, and in those before it that the threshold needs; the newest is
        last."""
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
                self._said[key] = (said.confidence[own], said.score[own])
        # Keeps only the windows that still matter, so that the cache does not grow.
        self._said = {key: self._said[key] for key in keys}
        self._windows = (situation.n_pending, list(self._said.values()))
        return self._windows[1]

    def _confidence_in_waiting(self, situation: Situation) -> list[float]:
        """The confidence of production on the newest texts that are waiting for their labels."""
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

    def _decide(
        self, accuracy: float, earlier: list[_Answers], words: str, scores: np.ndarray | None = None
    ) -> str | None:
        """Compare the accuracy in a window, which may be estimated, with that on the held-out records."""
        before = self._held_out[1]
        was = float(before.mean())
        limit = self.threshold.limit([was - float(right.mean()) for _, right in earlier])
        loss = was - accuracy
        if self._scored and scores is not None:
            p_value = smaller_mean(before, scores)
        else:
            p_value = fisher(round(before.sum()), len(before), round(accuracy * self.window), self.window)
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
    # In logarithms: the binomial coefficients themselves overflow at about a thousand records.
    terms = log_choose(n_now, k) + log_choose(n_before, successes - k) - log_choose(total, successes)
    return min(1.0, float(np.exp(terms).sum()))


def _estimated(known: list[_Answers], confidence: list[float]) -> float:
    """The accuracy that confidences stand for, learned from answers that are known to be right or wrong, old to new."""
    sure, right = _joined(known)
    estimator = PerformanceEstimator()
    estimator.update(range(len(sure)), sure)
    estimator.labels(range(len(sure)), right.astype(bool))
    return float(estimator.calibrated(torch.tensor(confidence)).mean())


def _joined(answers: list[_Answers]) -> _Answers:
    return np.concatenate([sure for sure, _ in answers]), np.concatenate([right for _, right in answers])
