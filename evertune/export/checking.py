"""An export beside its source: the answers to the same records, and the time that they take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from evertune.export.answers import alike, answers, largest_change, questions
from evertune.export.manifest import Check
from evertune.gate.predictions import Cost
from evertune.lightning_modules.generation import GenerationModule
from evertune.live.evaluation import evaluate
from evertune.sources.base import Row
from evertune.tasks.texts import longest_text

_BATCH = 32
_TURNS = 15, 5  # of a single text, and of a batch
_TURNS_OF_GENERATION = 3, 1  # each of which takes as long as a hundred others


def check(
    exported: Any,
    source: Any,
    rows: Sequence[Row],
    text: str | Sequence[str],
    label: str | None,
    sizes: tuple[int, int],
) -> Check:
    """Compare an export with its source.

    Args:
        exported: The module of the export.
        source: The module that it was made from.
        rows: Records, checked by the task.
        text: Field with the text, or the two fields of a pair.
        label: Field with the label; None if the records have none.
        sizes: Bytes of the weights of the export, and of the source.

    Raises:
        ValueError: If the task needs labels to compare answers, and there are none.
    """
    length = longest_text(source.tokenizer)
    asked = questions(source, rows, text, label, length)
    new, old = (answers(module, rows, asked, text, label, length) for module in (exported, source))
    scores: list[float | None] = [None, None]
    if label is not None or not source.task.needs_label:
        scores = [
            evaluate(module, {"": rows}, text, label, _BATCH, length)[""].accuracy for module in (exported, source)
        ]
    turns = _TURNS_OF_GENERATION if isinstance(source, GenerationModule) else _TURNS
    alone, together = (_times(exported, source, asked, n, k) for n, k in zip((1, _BATCH), turns, strict=True))
    return Check(
        records=len(rows),
        agreement=float(np.mean([alike(source, *pair) for pair in zip(new, old, strict=True)])),
        score=scores[0],
        source_score=scores[1],
        largest_change=max((largest_change(source, *pair) for pair in zip(new, old, strict=True)), default=0.0),
        cost=Cost(alone[0], together[0], sizes[0]),
        source_cost=Cost(alone[1], together[1], sizes[1]),
        threads=torch.get_num_threads(),
    )


def _times(exported: Any, source: Any, texts: Sequence[Any], n: int, turns: int) -> tuple[float, float]:
    """Milliseconds of both for ``n`` texts, medians over turns that they take alternately; the first does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        some = [texts[(turn + place) % len(texts)] for place in range(n)]
        for model, taken in zip((exported, source), times, strict=True):
            start = time.perf_counter()
            model.predict(some)
            taken.append(1000 * (time.perf_counter() - start))
    return median(times[0][1:]), median(times[1][1:])
