"""Checks of what no update trains: the loss of a language model on general texts, and skills by probes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from evertune.gate import statistics
from evertune.gate.comparison import Pair, PairedTest, aligned
from evertune.gate.predictions import Predictions
from evertune.gate.verdict import Check, Limit
from evertune.gate.words import Unit, figure, percent, probability

TEXTS, SKILLS = "base texts", "base skills"
"""Names of the two sets of predictions: the likelihood of each general text, and the answer to each probe."""
_LEAST = 1e-6  # a likelihood of 0, or none at all, counts as this one


def base_checks(
    before: Mapping[str, Predictions],
    now: Mapping[str, Predictions],
    max_loss_increase: float | None,
    max_drop: float | None,
    test: PairedTest,
) -> list[Check]:
    """Whether the new version has lost what the one before it could do beyond the records of updates.

    Args:
        before: Predictions under :data:`TEXTS` and :data:`SKILLS`, or one of them, of the version that the update
            starts from.
        now: Those of the new version on the same texts and probes.
        max_loss_increase: Maximum increase of the mean loss in nats per token; None skips the check.
        max_drop: Maximum decrease of the share of right probes; None skips the check.
        test: The test that rules out chance.
    """
    checks = []
    if TEXTS in now and max_loss_increase is not None:
        checks.append(_of_texts(aligned(TEXTS, before, now), max_loss_increase, test))
    if SKILLS in now and max_drop is not None:
        checks.append(_of_skills(aligned(SKILLS, before, now), max_drop, test))
    return checks


def figures(said: Mapping[str, Predictions]) -> dict[str, float]:
    """What the predictions under :data:`TEXTS` and :data:`SKILLS` come down to.

    Returns:
        ``loss``, the mean over the texts in nats per token, and ``skills``, the share of right probes.
    """
    found = {"loss": float(losses(said[TEXTS]).mean())} if TEXTS in said else {}
    return found | ({"skills": said[SKILLS].accuracy} if SKILLS in said else {})


def losses(texts: Predictions) -> np.ndarray:
    """The loss of each text in nats per token, ``[texts]``: the negative logarithm of its likelihood.

    Example:
        >>> losses(Predictions.scored(["a", "b"], ["", ""], np.array([1.0, 0.0]))).round(3).tolist()
        [-0.0, 13.816]
    """
    least: np.ndarray = -np.log(np.maximum(np.nan_to_num(texts.score), _LEAST))
    return least


def _of_texts(pair: Pair, limit: float, test: PairedTest) -> Check:
    """The loss on general texts, compared text by text with random signs."""
    old, now = losses(pair[0]), losses(pair[1])
    before, after = float(old.mean()), float(now.mean())
    words = (
        f"on {len(now)} general texts the loss of the new version is {after:.3f} nats per token, before the update it "
        f"was {before:.3f}"
    )
    p_value = statistics.sign_flips(now - old, test.seed)
    return _check(TEXTS, (before, after), after - before, limit, p_value, len(now), test, words, "nats")


def _of_skills(pair: Pair, limit: float, test: PairedTest) -> Check:
    """The share of right probes."""
    old, now = pair
    values = old.accuracy, now.accuracy
    words = f"the new version solves {percent(values[1])} of {len(now)} probes, before the update {percent(values[0])}"
    return _check(SKILLS, values, values[0] - values[1], limit, test.p_value(old, now), len(now), test, words, "share")


def _check(
    name: str,
    values: tuple[float, float],
    lost: float,
    limit: float,
    p_value: float,
    n: int,
    test: PairedTest,
    words: str,
    unit: Unit,
) -> Check:
    """A check of a loss; with so few examples that the test could never rule out chance, it cannot tell."""
    enough = math.ceil(-math.log2(test.alpha))
    beyond = round(lost, 9) > limit
    passed = None if n < enough else not (beyond and p_value < test.alpha)
    allowed = figure(limit, unit) if unit == "nats" else f"{100 * limit:.1f} points"
    words = f"{words} ({probability(p_value)}, limit {allowed})"
    if passed is None:
        words = f"cannot tell (fewer than {enough}): {words}"
    on: Limit = "more" if unit == "nats" else "less"
    return Check.of_version(name, "", *values, limit, passed, words, p_value, unit, on)
