"""When an update is due because production does worse on what arrives than on what it was published with."""

from __future__ import annotations

import numpy as np

from evertune.live.situation import Situation, Trigger, positive
from evertune.live.thresholds import Static, Threshold


class PerformanceDrop(Trigger):
    """Due when production's accuracy on new records is below what it had on held-out ones when it was published.

    The pending records, which have labels and which production has not learnt, are cut into windows in the order in
    which they arrived, and production predicts each once. The newest whole window decides, if records in it are new:
    its reading is the accuracy on the held-out records of all updates, as the gate saw it, less that in the window. The
    reading alarms above the ``threshold``, if an exact test of the counts (Fisher 1935, one-sided) rules out chance as
    well. So false alarms do not become more when one looks more often: there are ``alpha`` a window at most.

    Where labels are late (a label join) and no whole window is new, the accuracy on the newest ``window`` texts that
    wait for their labels is estimated: the share of answers above that confidence which, on the held-out records, as
    many answers were above as were right (average thresholded confidence; Garg et al. 2022). That sees doubt, and not
    confident mistakes: a class that takes another meaning shows when its labels are there.

    A look costs one pass over the windows that no look has seen yet. After a restart the newest one, and so many before
    it as the threshold looks back on, are predicted again, and the same decision comes out.

    Args:
        threshold: of the reading, a loss of accuracy. Default: ``Static(0.05)``.
        window: records in a reading. Default: 250. Against 500 held-out records, nine such windows of ten tell an
            accuracy of 0.8 from one of 0.9 when published, and three of ten one of 0.85.
        alpha: the largest p-value that rules out chance.
        min_records: new records before it looks: records of a refused update wait for so many others.
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
        self._held_out = (np.empty(0), np.empty(0, bool))  # confidence, and whether the answer was right
        self._right: dict[tuple[int | str, ...], int] = {}  # answers in a window, by its place and its records' ids
        self._windows: tuple[int, list[int]] = (0, [])  # pending records, and right answers in their newest windows
        self._confidence: dict[str, float] = {}  # of production in texts that wait, by their ids

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
        confidence, right = self._held_out
        if not len(right) or situation.predict is None:
            self.explanation = "performance: cannot tell, nothing is known of it when production was published"
            return None
        n_whole = situation.n_pending // self.window * self.window
        if n_whole > situation.n_pending - situation.n_new:
            *earlier, newest = self._counts(situation, n_whole)
            return self._decide(newest, right, earlier, "accuracy {:.3f} on the newest {} records")
        waiting = self._confidence_in_waiting(situation) if self.estimate else []
        if len(waiting) < self.window:
            have = situation.n_pending - n_whole
            self.explanation = f"performance: {have} of {self.window} labelled records for the next look"
            return None
        level = _level(confidence, right)
        sure = int((np.array(waiting) > level).sum())
        what = "estimated accuracy {:.3f} on the newest {} texts without a label"
        earlier = self._counts(situation, n_whole) if self.threshold.window else []
        return self._decide(sure, confidence > level, earlier, what)

    def _take_up(self, situation: Situation, production: int) -> None:
        """Read what another version was published with."""
        self._version = None  # should this fail, the next look starts anew
        said = list(situation.held_out().values())
        self._held_out = (
            np.concatenate([np.empty(0), *(one.confidence for one in said)]),
            np.concatenate([np.empty(0, bool), *(one.correct for one in said)]),
        )
        self._right, self._confidence, self._windows = {}, {}, (0, [])
        self._version = production

    def _counts(self, situation: Situation, n_whole: int) -> list[int]:
        """The right answers in the newest whole window, and in so many before it as matter; the newest is last."""
        if self._windows[0] == situation.n_pending:
            return self._windows[1]
        first = max(0, n_whole - (self.threshold.window + 1) * self.window)
        rows = situation.records()
        windows = {start: rows[start : start + self.window] for start in range(first, n_whole, self.window)}
        keys = [(start, *(row["id"] for row in window)) for start, window in windows.items()]
        new = [row for key in keys if key not in self._right for row in windows[key[0]]]
        if new:
            assert situation.predict is not None
            counts = iter(situation.predict(new).correct.reshape(-1, self.window).sum(1).tolist())
            self._right |= {key: next(counts) for key in keys if key not in self._right}
        self._right = {key: self._right[key] for key in keys}
        self._windows = (situation.n_pending, [self._right[key] for key in keys])
        return self._windows[1]

    def _confidence_in_waiting(self, situation: Situation) -> list[float]:
        """How sure production is of the newest texts that wait for their labels."""
        rows = situation.waiting()[-self.window :]
        new = [row for row in rows if row["id"] not in self._confidence]
        if len(rows) == self.window and new:
            assert situation.predict is not None
            said = situation.predict(new).confidence.tolist()
            self._confidence |= {row["id"]: sure for row, sure in zip(new, said, strict=True)}
        self._confidence = {row["id"]: self._confidence[row["id"]] for row in rows if row["id"] in self._confidence}
        return list(self._confidence.values())

    def _decide(self, n_right: int, published: np.ndarray, earlier: list[int], what: str) -> str | None:
        """Compare the counts of a window with those of the held-out records."""
        n_before, before = len(published), int(published.sum())
        accuracy, was = n_right / self.window, before / n_before
        base = float(self._held_out[1].mean())
        limit = self.threshold.limit([base - count / self.window for count in earlier])
        loss, p_value = was - accuracy, fisher(before, n_before, n_right, self.window)
        self.readings = {"accuracy": accuracy, "accuracy_published": was, "accuracy_loss": loss}
        words = f"{what.format(accuracy, self.window)}, {was:.3f} when published"
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


def _level(confidence: np.ndarray, right: np.ndarray) -> float:
    """The confidence that as many answers are above as are right (fewer, where some are as confident)."""
    n_right = int(right.sum())
    return float(np.sort(confidence)[::-1][n_right]) if n_right < len(right) else -1.0
