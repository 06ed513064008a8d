"""An export beside its source: the answers to the same records, and the time that they take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch

from evertune.export.manifest import Check
from evertune.gate.predictions import Cost, names_of

_BATCH = 32
_REPEATS = 15  # turns of a single text; a third of them of a batch


class Predicts(Protocol):
    """A model that classifies texts."""

    def predict(self, texts: Any, /) -> list[dict[str, float]]:
        """The probability of each class for each text, most probable first."""


def check(
    exported: Predicts,
    source: Predicts,
    texts: Sequence[Any],
    labels: Sequence[Any] | None,
    multi_label: bool,
    sizes: tuple[int, int],
) -> Check:
    """Compare an export with its source.

    Args:
        exported: The export.
        source: The module that it was made from.
        texts: Texts, or pairs of texts.
        labels: The right labels; None if they are not known.
        multi_label: Whether a text has any number of labels.
        sizes: Bytes of the weights of the export, and of the source.
    """
    new, old = (_answers(model, texts) for model in (exported, source))
    said_new, said_old = ([_said(one, multi_label) for one in answers] for answers in (new, old))
    alone, together = (_times(exported, source, texts, n, turns) for n, turns in ((1, _REPEATS), (_BATCH, 5)))
    return Check(
        records=len(texts),
        agreement=_share(said_new, said_old),
        accuracy=None if labels is None else _share(said_new, [names_of(label) for label in labels]),
        source_accuracy=None if labels is None else _share(said_old, [names_of(label) for label in labels]),
        largest_change=max(abs(one[name] - other[name]) for one, other in zip(new, old, strict=True) for name in one),
        cost=Cost(alone[0], together[0], sizes[0]),
        source_cost=Cost(alone[1], together[1], sizes[1]),
        threads=torch.get_num_threads(),
    )


def _answers(model: Predicts, texts: Sequence[Any]) -> list[dict[str, float]]:
    """The answers to texts, read in order of their length: texts of similar length need little padding."""
    order = sorted(range(len(texts)), key=lambda place: sum(map(len, texts[place])))
    found: list[dict[str, float]] = [{}] * len(texts)
    for place, one in zip(order, model.predict([texts[place] for place in order]), strict=True):
        found[place] = one
    return found


def _said(probabilities: dict[str, float], multi_label: bool) -> frozenset[str]:
    """The most probable class, or with several labels all those above one half."""
    if multi_label:
        return frozenset(name for name, probability in probabilities.items() if probability > 0.5)
    return frozenset([next(iter(probabilities))])


def _share(some: Sequence[frozenset[str]], others: Sequence[frozenset[str]]) -> float:
    return float(np.mean([one == other for one, other in zip(some, others, strict=True)]))


def _times(exported: Predicts, source: Predicts, texts: Sequence[Any], n: int, turns: int) -> tuple[float, float]:
    """Milliseconds of both for ``n`` texts, medians over turns that they take alternately; the first does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        some = [texts[(turn + place) % len(texts)] for place in range(n)]
        for model, taken in zip((exported, source), times, strict=True):
            start = time.perf_counter()
            model.predict(some)
            taken.append(1000 * (time.perf_counter() - start))
    return median(times[0][1:]), median(times[1][1:])
