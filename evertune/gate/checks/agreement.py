"""The check of what texts say about labels: predictions and labels must agree beyond chance."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from evertune.gate import statistics
from evertune.gate.comparison import FEW, beside_untrained, is_learned
from evertune.gate.predictions import Predictions
from evertune.gate.untrained import NO_FEATURES
from evertune.gate.verdict import Check


def agreement(
    new: str,
    fresh: Predictions,
    past: Predictions,
    known: Collection[str],
    untrained: Mapping[str, Predictions] | None,
    share: float | None,
) -> list[Check]:
    """Whether predictions and labels agree on new records at least this ``share`` of how much they do on past ones.

    If they do not, the labels cannot be predicted from the texts (garbage), unless the new version has not learned them
    yet: then the check is left to the answers without training.
    """
    if share is None:
        return []
    if not fresh.has_classes:
        return [Check.not_applicable("agreement")]
    if min(len(fresh), len(past)) < FEW:
        return []
    now, then = (statistics.kappa(one.labels, one.predicted) for one in (fresh, past))
    if now is None or then is None:  # all records of one class
        return []
    limit, passed = share * then, now >= share * then
    words = f"on {new!r} predictions and labels agree beyond chance (kappa {now:.2f}, limit {limit:.2f})"
    if not passed:
        little = f"on {new!r} predictions and labels agree little beyond chance (kappa {now:.2f}"
        excuse = _not_learned_yet(new, fresh, known, untrained, share)
        if excuse is not None:
            is_right, why = excuse
            words = f"{little}); {why}" if is_right else f"cannot tell ({len(fresh)} records): {little}); {why}"
            return [Check.of_version("agreement", new, None, now, limit, is_right, words, unit="agreement")]
        words = f"{little}, {then:.2f} on past records, limit {limit:.2f}): the texts do not tell the labels"
    return [Check.of_version("agreement", new, None, now, limit, passed, words, unit="agreement")]


def _not_learned_yet(
    new: str, fresh: Predictions, known: Collection[str], untrained: Mapping[str, Predictions] | None, share: float
) -> tuple[bool | None, str] | None:
    """Whether the texts predict the labels although the new version does not, and why: then it has to train longer."""
    both = beside_untrained(untrained, new, fresh)
    if both is not None:
        alike = statistics.kappa(both[0].labels, both[0].predicted) or 0.0
        if alike < share:
            return None
        return True, (
            f"but records of one class resemble each other (kappa {alike:.2f} without training): they are not learned "
            "yet, train longer"
        )
    if 2 * sum(not is_learned(label, known) for label in fresh.labels) < len(fresh):
        return None
    return None, f"their classes are not learned yet, or the labels are wrong: {NO_FEATURES}"
