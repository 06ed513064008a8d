"""Checks of a first version, with which nothing in production can be compared: is it better than nothing?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from evertune.gate.comparison import FEW, PairedTest, beside_untrained
from evertune.gate.predictions import Predictions, names_of
from evertune.gate.untrained import NO_FEATURES
from evertune.gate.verdict import Check
from evertune.gate.words import percent, probability


def better_than_nothing(
    new: str,
    fresh: Predictions,
    untrained: Mapping[str, Predictions] | None,
    limit: float | None,
    test: PairedTest,
) -> list[Check]:
    """Whether a first version is better than one answer for everything, and than the encoder without training."""
    if limit is None or not len(fresh):
        return []
    if not fresh.has_classes:
        return [Check.not_applicable("largest class"), Check.not_applicable("without training")]
    return [*_largest_class(new, fresh), _without_training(new, fresh, untrained, limit, test)]


def _largest_class(new: str, fresh: Predictions) -> list[Check]:
    counts = Counter(tuple(sorted(names_of(label))) for label in fresh.labels)
    if len(counts) == 1:
        return []
    largest, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    share = count / len(fresh)
    words = (
        f"on {new!r} the new version is right on {percent(fresh.accuracy)} of {len(fresh)} held-out records; "
        f"to answer {', '.join(largest)!r} each time would be right on {percent(share)}"
    )
    better = True if fresh.accuracy > share else False if len(fresh) >= FEW else None
    if better is None:
        words = f"cannot tell ({len(fresh)} records): {words}"
    return [Check.of_version("largest class", new, None, fresh.accuracy, share, better, words)]


def _without_training(
    new: str, fresh: Predictions, untrained: Mapping[str, Predictions] | None, limit: float, test: PairedTest
) -> Check:
    both = beside_untrained(untrained, new, fresh)
    if both is None:
        words = f"cannot tell ({len(fresh)} records): {NO_FEATURES}"
        return Check.of_version("without training", new, None, fresh.accuracy, limit, None, words, on="less")
    without, now = both
    drop, p_value = round(without.accuracy - now.accuracy, 9), test.p_value(without, now)
    words = (
        f"on {new!r} the new version is right on {percent(now.accuracy)} of {len(now)} held-out records, the "
        f"nearest class mean over the pretrained encoder, without training, on {percent(without.accuracy)} "
        f"({probability(p_value)}, limit {100 * limit:.1f} points)"
    )
    passed = not (drop > limit and p_value < test.alpha)
    words += "" if passed else ": train longer, or with another learning rate"
    values = without.accuracy, now.accuracy, limit
    return Check.of_version("without training", new, *values, passed, words, p_value, on="less")
