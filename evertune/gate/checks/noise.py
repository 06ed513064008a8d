"""Checks of wrong labels: among the records of classes that production has learned, and among those of new ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from evertune.gate import statistics
from evertune.gate.comparison import FEW, Pair, is_learned, pooled
from evertune.gate.label_noise import UNSURE_LEARNT, Noise, label_noise, unlike_their_class
from evertune.gate.predictions import Predictions
from evertune.gate.untrained import NO_FEATURES
from evertune.gate.verdict import Check
from evertune.gate.words import percent, probability, records


def wrong_labels(
    new: str,
    fresh: Pair,
    shown: Pair | None,
    past: Collection[Pair],
    known: Collection[str],
    limit: float | None,
    alpha: float,
) -> list[Check]:
    """Whether too many labels look wrong, by tests of the held-out records and of all records that were given.

    Args:
        new: Name of the slice with the held-out records of the update.
        fresh: The predictions of production and of the new version on them.
        shown: Those on records of the update that the new version was trained on.
        past: Those on the past slices.
        known: Classes that production has learned.
        limit: Maximum share of wrong labels in excess of that among the past records.
        alpha: The family-wise error rate of both tests.
    """
    if limit is None:
        return []
    if not fresh[1].has_classes:
        return [Check.not_applicable("label noise")]
    labels = [label for _, now in filter(None, (fresh, shown)) for label in now.labels]
    if labels and not any(is_learned(label, known) for label in labels):
        return []  # all are of new classes
    found, learnable = _counted(new, fresh, shown, past, known)
    p_values = statistics.holm([_p_value(*pair) for pair in found.values()])
    checks = []
    for (name, (now, then)), p_value in zip(found.items(), p_values, strict=True):
        words = (
            f"about {percent(now.share)} of the labels of {name!r} look wrong: {now.contradicted} of {now.sure} "
            f"are contradicted with confidence, of past ones {then.contradicted} of {then.sure} "
            f"({probability(p_value)}, limit {100 * limit:.1f} points more than in the past)"
        )
        excused = learnable and name == new
        if excused:
            words += f"; {now.resolved} labels that production contradicts could be learned: the world has changed"
        refused = not excused and now.share - then.share > limit and p_value < alpha
        # Had all labels been contradicted, would chance have been ruled out?
        blind = len(found) * _p_value(replace(now, contradicted=now.sure), then) >= alpha
        passed = False if refused else None if blind and not excused else True
        if passed is None:
            words = f"cannot tell ({records(now.sure)}): {words}"
        words += ": either labels are wrong, or these records are unlike those of the past" if refused else ""
        values = then.share, now.share, limit
        checks.append(Check.of_version("label noise", name, *values, passed, words, p_value, on="more"))
    return checks


def _counted(
    new: str, fresh: Pair, shown: Pair | None, past: Collection[Pair], known: Collection[str]
) -> tuple[dict[str, tuple[Noise, Noise]], bool]:
    """The counts of each test beside those of the past, and whether the data has changed.

    If the new version predicts most of the held-out labels that production contradicts, the data has changed: a label
    then counts as wrong only if the new version contradicts it although it was trained on it. Otherwise production
    alone decides, so that labels which the new version has memorised are not hidden.
    """
    before = pooled(past)
    then = _total(label_noise(*pair, known) for pair in past)
    held_out = label_noise(*fresh, known, past=before)
    found = {new: (held_out, then)}
    if shown is not None and held_out.drifted:
        found[f"{new}, trained on"] = label_noise(*shown, known, UNSURE_LEARNT, before), then
    elif shown is not None:
        found[f"{new}, all records"] = (
            _total(label_noise(*pair, known, second=None, past=before) for pair in (fresh, shown)),
            _total(label_noise(*pair, known, second=None, past=before) for pair in past),
        )
    return found, held_out.drifted


def wrong_new_classes(
    new: str,
    parts: Mapping[str, Pair],
    past: Pair,
    known: Collection[str],
    untrained: Mapping[str, Predictions] | None,
    limit: float | None,
    alpha: float,
) -> list[Check]:
    """Whether records of classes that production has not learned resemble each other: label noise, without the versions
    as witnesses.

    Args:
        new: Name of the slice with the held-out records of the update.
        parts: The predictions of production and of the new version on these records, and on those trained on.
        past: Those on all past records.
        known: Classes that production has learned.
        untrained: The answers without training, by slice; None if there are none.
        limit: Maximum share of wrong labels in excess of that among the past records.
        alpha: Level of the test.
    """
    if limit is None or not parts[new][1].has_classes:
        return []
    is_right = [
        right
        for _, now in parts.values()
        for label, right in zip(now.labels, now.correct.tolist(), strict=True)
        if not is_learned(label, known)
    ]
    if not is_right:
        return []
    name, right, without = f"{new}, new classes", sum(is_right) / len(is_right), untrained or {}
    now = _total(
        unlike_their_class(*pair, without[part], known, past) for part, pair in parts.items() if part in without
    )
    then = _total(_mistakes(one, known) for part, one in without.items() if part not in parts)
    if now.sure < FEW or then.sure < FEW:
        why = NO_FEATURES if not now.sure else "too few records to compare with each other"
        words = f"cannot tell ({records(len(is_right))} of new classes): {why}"
        return [Check.of_version("label noise", name, None, None, limit, None, words, on="more")]
    p_value = _p_value(now, then)
    passed = not (now.share - then.share > limit and p_value < alpha)
    words = (
        f"{now.contradicted} of {now.sure} records of classes that production has not learned resemble another "
        f"class, and a version agrees ({percent(now.share)}; of past records {percent(then.share)} resemble "
        f"another class; {probability(p_value)}, limit {100 * limit:.1f} points more)"
    )
    if not passed:
        words += ": either their labels are wrong, or the classes are so alike that they need longer training"
    elif right < 0.5:
        words += f"; the new version is right on {percent(right)} of them: they are not learned yet, train longer"
    return [Check.of_version("label noise", name, then.share, now.share, limit, passed, words, p_value, on="more")]


def _total(counts: Iterable[Noise]) -> Noise:
    return sum(counts, Noise(0, 0))


def _mistakes(untrained: Predictions, known: Collection[str]) -> Noise:
    """How often the answers without training are wrong on records of classes that production has learned."""
    rows = [
        row
        for row, (label, answer) in enumerate(zip(untrained.labels, untrained.predicted, strict=True))
        if answer and is_learned(label, known)
    ]
    return Noise(len(rows), int((~untrained.correct[rows]).sum()))


def _p_value(now: Noise, then: Noise) -> float:
    """The probability of at least as many contradictions at the past rate, smoothed by Laplace's rule: a few past
    records without a contradiction do not prove that there are none."""
    return statistics.binomial_tail(now.contradicted, now.sure, (then.contradicted + 1) / (then.sure + 2))
