"""Checks of past records beyond accuracy: answers that were right and are wrong now, and confidence."""

from __future__ import annotations

import numpy as np

from evertune.gate import statistics
from evertune.gate.comparison import POOLED, Pair, PairedTest
from evertune.gate.verdict import Check
from evertune.gate.words import percent, probability


def negative_flips(past: Pair, limit: float | None, alpha: float) -> list[Check]:
    """Whether too many past records are wrong now that production has right (Yan et al. 2021)."""
    old, now = past
    if limit is None:
        return []
    if not now.has_classes:
        return [Check.not_applicable("negative flips")]
    flips = int((old.correct & ~now.correct).sum())
    share, p_value = flips / len(now), statistics.binomial_tail(flips, len(now), limit)
    words = (
        f"{flips} of {len(now)} past records that production has right are wrong now "
        f"({percent(share)}, {probability(p_value)}, limit {percent(limit)})"
    )
    passed = not (share > limit and p_value < alpha)
    return [Check.of_version("negative flips", POOLED, None, share, limit, passed, words, p_value)]


def calibration(past: Pair, limit: float | None, test: PairedTest) -> list[Check]:
    """Whether the confidence of the new version says less about its accuracy than production's (Guo et al. 2017)."""
    old, now = past
    if limit is None:
        return []
    if not now.has_classes:
        return [Check.not_applicable("calibration error")]
    if not (np.isfinite(old.confidence).all() and np.isfinite(now.confidence).all()):
        return []
    before, after = (statistics.calibration_error(one.confidence, one.correct) for one in past)
    p_value = None
    if after - before > limit:  # the bootstrap is slow, and is needed only if the limit is exceeded
        confidence, correct = (old.confidence, now.confidence), (old.correct, now.correct)
        p_value = statistics.calibration_test(confidence, correct, test.seed)
    words = (
        f"on past records the confidence of the new version is off by {100 * after:.1f} points, that of the one in "
        f"production by {100 * before:.1f} (limit {100 * limit:.1f} points more)"
    )
    passed = p_value is None or p_value >= test.alpha
    return [Check.of_version("calibration error", POOLED, before, after, limit, passed, words, p_value, on="more")]
