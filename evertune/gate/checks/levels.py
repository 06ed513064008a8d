"""Checks of the new version on its own: numbers at all, and a minimum accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evertune.gate.predictions import Predictions
from evertune.gate.verdict import Check
from evertune.gate.words import percent


def finite(challenger: Mapping[str, Predictions]) -> Check:
    """Whether the new version gives a number for every record; it does not if its training diverged."""
    total = sum(len(said) for said in challenger.values())
    numbers = [said.confidence if said.scores is None else said.scores for said in challenger.values()]
    bad = sum(int((~np.isfinite(one)).sum()) for one in numbers)
    words = f"the new version gives no number for {bad} of {total} records" + (": its training diverged" if bad else "")
    return Check.of_version("without a number", "all slices", None, bad, 0, bad == 0, words, unit="records")


def accurate(name: str, slice_name: str, said: Predictions, limit: float | None) -> list[Check]:
    """Whether the new version is right often enough, whatever production does."""
    if limit is None:
        return []
    how, of = ("is right on", "of") if said.has_classes else ("scores", "on")
    words = (
        f"on {slice_name!r} the new version {how} {percent(said.accuracy)} {of} {len(said)} held-out records "
        f"(at least {percent(limit)} is asked for)"
    )
    return [Check.of_version(name, slice_name, None, said.accuracy, limit, said.accuracy >= limit, words)]
