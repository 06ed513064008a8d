"""Two versions on the same records: the pairs of predictions that the checks compare, and the test that they use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evertune.gate import statistics
from evertune.gate.predictions import Label, Predictions, names_of

Pair = tuple[Predictions, Predictions]
"""The predictions of an old version and of the new one on the same records, in the same order."""
Test = Literal["mcnemar", "bootstrap"]

POOLED = "all past slices"
FEW = 20
"""Number of records below which a share is too noisy: checks that rest on a share alone are skipped, and a class is
also judged on records that were trained on."""


@dataclass(frozen=True)
class PairedTest:
    """The test by which chance is ruled out, on the same examples for both versions.

    Args:
        alpha: Probability with which chance alone may exceed a limit.
        name: ``"mcnemar"`` (exact) or ``"bootstrap"``, for labels that are classes. Scores are compared by random signs
            (:func:`~evertune.gate.statistics.sign_flips`).
        seed: Seed of the random resampling.
    """

    alpha: float
    name: Test = "mcnemar"
    seed: int = 0

    def p_value(self, old: Predictions, now: Predictions) -> float:
        """The probability of such a loss by chance."""
        if not now.has_classes:
            return statistics.sign_flips(old.score - now.score, self.seed)
        losses, gains = int((old.correct & ~now.correct).sum()), int((~old.correct & now.correct).sum())
        if self.name == "mcnemar":
            return statistics.mcnemar(losses, gains)
        return statistics.bootstrap(losses, gains, len(now), self.seed)


def aligned(name: str, champion: Mapping[str, Predictions], challenger: Mapping[str, Predictions]) -> Pair:
    """The predictions of two versions on the records of a slice that both were asked about, in the same order.

    Raises:
        ValueError: If a version has no predictions for the slice, there is no common record, or a label differs.
    """
    for who, said in (("the version in production", champion), ("the new version", challenger)):
        if name not in said:
            raise ValueError(f"{who} has no predictions for the slice {name!r}; evaluate both on the same slices")
    old, now = champion[name], challenger[name]
    if old.ids == now.ids:
        pair = old, now
    else:
        places = {one: place for place, one in enumerate(old.ids)}
        common = [place for place, one in enumerate(now.ids) if one in places]
        if not common:
            raise ValueError(
                f"slice {name!r}: the versions were asked about different records ({len(old)} and {len(now)}, none in "
                "common); evaluate the version in production on this slice again"
            )
        pair = old.pick([places[now.ids[place]] for place in common]), now.pick(common)
    if pair[0].has_classes != pair[1].has_classes:
        raise ValueError(f"slice {name!r}: one version predicts classes and the other gives scores; compare one task")
    differ = [one for one, a, b in zip(pair[0].ids, pair[0].labels, pair[1].labels, strict=True) if a != b]
    if differ:
        raise ValueError(f"slice {name!r}: the label of record {differ[0]!r} is not the same for both versions")
    return pair


def pool(parts: Iterable[Predictions]) -> Predictions:
    """Several slices as one; a record that is in two of them counts twice."""
    slices = list(parts)
    # Numbered, as ids must be unique: the same record may be in several slices.
    ids = [f"{number}/{one}" for number, part in enumerate(slices) for one in part.ids]
    return Predictions(
        ids,
        [label for part in slices for label in part.labels],
        [said for part in slices for said in part.predicted],
        np.concatenate([np.empty(0), *(part.confidence for part in slices)]),
        np.concatenate([np.empty(0), *(part.label_probability for part in slices)]),
        None
        if all(part.has_classes for part in slices)
        else np.concatenate([np.empty(0), *(part.score for part in slices)]),
    )


def pooled(pairs: Iterable[Pair]) -> Pair:
    """Several pairs as one; see :func:`pool`."""
    both = list(pairs)
    return pool(old for old, _ in both), pool(now for _, now in both)


def grouped(pairs: Sequence[Pair], groups: Mapping[str, str], field: str) -> dict[str, Pair]:
    """The predictions on the records of each group, from all slices."""
    made = {}
    for value in sorted(set(groups.values())):
        chosen = [[place for place, one in enumerate(old.ids) if groups.get(one) == value] for old, _ in pairs]
        old = pool(pair[0].pick(places) for pair, places in zip(pairs, chosen, strict=True))
        now = pool(pair[1].pick(places) for pair, places in zip(pairs, chosen, strict=True))
        if len(now):
            made[f"{field} = {value}"] = (old, now)
    return made


def beside_untrained(untrained: Mapping[str, Predictions] | None, name: str, said: Predictions) -> Pair | None:
    """The answers without training beside those of a version, where there are any."""
    if untrained is None or name not in untrained:
        return None
    rows = [row for row, answer in enumerate(untrained[name].predicted) if answer]
    return aligned(name, {name: untrained[name].pick(rows)}, {name: said}) if rows else None


def names_in(pairs: Iterable[Pair]) -> list[str]:
    """The names of all classes in the labels of some records, sorted."""
    return sorted({name for _, now in pairs for label in now.labels for name in names_of(label)})


def is_learned(label: Label, known: Collection[str]) -> bool:
    """Whether production has learned all classes of a label."""
    return names_of(label).issubset(known)
