"""The statistical tests of the gate: pure functions of counts and arrays, exact where possible."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from evertune.gate.predictions import Label, names_of

_BINS = 15


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """The exact probability of at least this many successes in independent trials.

    Example:
        >>> round(binomial_tail(2, 3, 0.5), 6), binomial_tail(0, 3, 0.5), binomial_tail(1, 0, 0.5)
        (0.5, 1.0, 0.0)
    """
    if successes <= 0:
        return 1.0
    if successes > trials or probability <= 0:
        return 0.0
    if probability >= 1:
        return 1.0
    # In logarithms: the binomial coefficients overflow a float at about a thousand trials.
    yes, no = math.log(probability), math.log1p(-probability)
    counts = range(successes, trials + 1)
    return _sum_of_exponentials([_log_choose(trials, k) + k * yes + (trials - k) * no for k in counts])


def mcnemar(losses: int, gains: int) -> float:
    """The one-sided p-value of a loss between two classifiers on the same examples (McNemar 1947, exact form).

    Only the examples that one classifier gets right and the other wrong distinguish them. If both were equally good,
    each of these would be a loss with probability 1/2: the p-value is the probability of at least as many losses.

    Args:
        losses: Number of examples that the old classifier has right and the new one wrong.
        gains: Number of examples that the old classifier has wrong and the new one right.

    Example:
        >>> round(mcnemar(7, 0), 5), mcnemar(0, 0)
        (0.00781, 1.0)
    """
    return binomial_tail(losses, losses + gains, 0.5)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for multiple testing (Holm 1979).

    If a test is rejected when its adjusted value is below alpha, the probability of any false alarm is at most alpha.

    Example:
        >>> [round(p, 6) for p in holm([0.04, 0.01, 0.03])]
        [0.06, 0.03, 0.06]
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        # The running maximum keeps the adjusted values in the order of the original ones.
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(largest, 1.0)
    return adjusted


def bootstrap(losses: int, gains: int, trials: int, seed: int = 0, resamples: int = 10_000) -> float:
    """The one-sided p-value of a loss, by a paired bootstrap (Efron & Tibshirani 1993).

    Examples are drawn with replacement, each with the predictions of both versions; the p-value is the share of draws
    in which the new version is not worse.

    Example:
        >>> bootstrap(20, 5, 100) < 0.01 < bootstrap(6, 5, 100)
        True
    """
    # Only three kinds of example differ in their effect, so that one multinomial draw replaces a resample.
    shares = np.array([losses, gains, trials - losses - gains]) / max(trials, 1)
    drawn = np.random.default_rng(seed).multinomial(trials, shares, size=resamples)
    return float(1 + (drawn[:, 0] <= drawn[:, 1]).sum()) / (resamples + 1)


def sign_flips(losses: np.ndarray, seed: int = 0, resamples: int = 10_000) -> float:
    """The one-sided p-value of a mean loss above 0, by Fisher's paired randomisation test (1935).

    If both versions were equally good, each example's loss could as well have the other sign. The p-value is the share
    of random signs that make the mean loss at least as large.

    Args:
        losses: Decrease of each example's score, ``[examples]``.
        seed: Seed of the random signs.
        resamples: Number of random draws of signs. Default: 10,000.

    Example:
        >>> sign_flips(np.full(20, 0.1)) < 0.01 < sign_flips(np.tile([0.1, -0.1], 10))
        True
    """
    changed = losses[losses != 0]
    generator, observed, as_large = np.random.default_rng(seed), changed.sum(), 0
    for start in range(0, resamples, 500):  # keeps the signs of large slices out of memory
        signs = generator.integers(0, 2, (min(500, resamples - start), len(changed))) * 2 - 1
        # The tolerance counts ties, which rounding would otherwise decide.
        as_large += int((signs @ changed >= observed - 1e-9).sum())
    return (1 + as_large) / (resamples + 1)


def smaller_mean(before: np.ndarray, now: np.ndarray, seed: int = 0, resamples: int = 10_000) -> float:
    """The one-sided p-value of a smaller mean now than before, by Pitman's randomisation test of two samples (1937).

    Had nothing changed, each value might as well be of the other sample.

    Args:
        before: Values of the first sample.
        now: Values of the second sample.
        seed: Seed of the divisions that are drawn.
        resamples: Number of divisions.

    Example:
        >>> smaller_mean(np.array([0.9, 0.8, 0.7, 0.9]), np.array([0.3, 0.2, 0.4, 0.1])) < 0.03
        True
    """
    draw, values = np.random.default_rng(seed), np.concatenate([before, now])
    found = now.sum() + 1e-9  # sums in another order differ by rounding
    at_once = max(1, 10**6 // len(values))
    n_smaller = 0
    for start in range(0, resamples, at_once):
        rows = np.tile(values, (min(at_once, resamples - start), 1))
        n_smaller += int((draw.permuted(rows, axis=1)[:, : len(now)].sum(1) <= found).sum())
    return (n_smaller + 1) / (resamples + 1)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The expected calibration error (Guo et al. 2017): the gap between confidence and accuracy over 15 equal bins.

    Args:
        confidence: Probability of each predicted class, ``[examples]``.
        correct: Whether each prediction is right, ``[examples]``.

    Example:
        >>> calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False]))
        0.1
    """
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=confidence - correct, minlength=_BINS)
    return round(float(np.abs(gaps).sum() / max(len(correct), 1)), 12)


def calibration_test(
    confidence: tuple[np.ndarray, np.ndarray],
    correct: tuple[np.ndarray, np.ndarray],
    seed: int = 0,
    resamples: int = 1_000,
) -> float:
    """The one-sided p-value of a higher calibration error, by a paired bootstrap.

    Args:
        confidence: Probabilities of the predicted classes of the old and of the new version, on the same examples,
            ``[examples]`` each.
        correct: Whether the predictions of the old and of the new version are right, ``[examples]`` each.
        seed: Seed of the resampling.
        resamples: Number of resamples. Default: 1,000.

    Example:
        >>> right = np.arange(200) % 10 > 0
        >>> calibration_test((np.full(200, 0.9), np.full(200, 0.6)), (right, right)) < 0.01
        True
    """
    generator = np.random.default_rng(seed)
    n = len(correct[0])
    worse = 0
    for _ in range(resamples):
        drawn = generator.integers(n, size=n)
        old, new = (
            calibration_error(sure[drawn], right[drawn]) for sure, right in zip(confidence, correct, strict=True)
        )
        worse += new > old
    return (1 + resamples - worse) / (resamples + 1)


def kappa(labels: Sequence[Label], predicted: Sequence[Label]) -> float | None:
    """The agreement of predictions with labels beyond chance: 1 is perfect, 0 is chance (Cohen 1960).

    Returns:
        Kappa; None if all labels and predictions are one class, or there are none.

    Example:
        >>> kappa(["a", "a", "b", "b"], ["a", "a", "b", "a"]), kappa(["a"], ["a"])
        (0.5, None)
    """
    n = len(labels)
    names = [[names_of(label) for label in side] for side in (labels, predicted)]
    given, said = Counter(names[0]), Counter(names[1])
    by_chance = sum(count * said[name] for name, count in given.items())
    if by_chance == n * n:
        return None
    agreed = sum(a == b for a, b in zip(names[0], names[1], strict=True))
    return (agreed * n - by_chance) / (n * n - by_chance)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _sum_of_exponentials(logs: Sequence[float]) -> float:
    if not logs:
        return 0.0
    # The largest term is factored out, so that the other exponentials do not underflow.
    largest = max(logs)
    return min(math.exp(largest) * math.fsum(math.exp(log - largest) for log in logs), 1.0)
