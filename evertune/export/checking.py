"""An export beside its source: the answers to the same records, and the time that they take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from evertune.export.manifest import Check
from evertune.gate.predictions import Cost
from evertune.lightning_modules.sequence_regression import SequenceRegressionModule
from evertune.live.evaluation import evaluate
from evertune.sources.base import Row
from evertune.tasks.predicting import are_probabilities
from evertune.tasks.texts import longest_text

_BATCH = 32
_REPEATS = 15  # turns of a single text; a third of them of a batch
_CLOSE = 0.05  # difference of two numbers that count as the same answer, as a multiple of the scale of a regression


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
    """
    length = longest_text(source.tokenizer)
    columns = source.task.texts(rows, text, source.tokenizer, length)
    texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    new, old = (_answers(module, texts) for module in (exported, source))
    scores: list[float | None] = [None, None]
    if label is not None:
        scores = [
            evaluate(module, {"": rows}, text, label, _BATCH, length)[""].accuracy for module in (exported, source)
        ]
    alone, together = (_times(exported, source, texts, n, turns) for n, turns in ((1, _REPEATS), (_BATCH, 5)))
    return Check(
        records=len(rows),
        agreement=float(np.mean([_alike(source, *pair) for pair in zip(new, old, strict=True)])),
        score=scores[0],
        source_score=scores[1],
        largest_change=max((_change(source, *pair) for pair in zip(new, old, strict=True)), default=0.0),
        cost=Cost(alone[0], together[0], sizes[0]),
        source_cost=Cost(alone[1], together[1], sizes[1]),
        threads=torch.get_num_threads(),
    )


def _answers(module: Any, texts: Sequence[Any]) -> list[Any]:
    """The answers to texts, read in order of their length: texts of similar length need little padding."""
    order = sorted(range(len(texts)), key=lambda place: sum(map(len, texts[place])))
    found: list[Any] = [None] * len(texts)
    for place, one in zip(order, module.predict([texts[place] for place in order]), strict=True):
        found[place] = one
    return found


def _alike(module: Any, new: Any, old: Any) -> bool:
    """Whether two answers are the same: names, places and texts, or close numbers."""
    if isinstance(module, SequenceRegressionModule):
        return _change(module, new, old) <= _CLOSE
    return bool(_said(module, new) == _said(module, old))


def _said(module: Any, answer: Any) -> Any:
    """An answer without probabilities: the most probable class, with several labels all those above one half."""
    if are_probabilities(answer):
        several = {name for name, probability in answer.items() if probability > 0.5}
        return several if module.multi_label else next(iter(answer))
    if isinstance(answer, Mapping):
        return {name: _said(module, value) for name, value in answer.items() if not isinstance(value, float)}
    return [_said(module, value) for value in answer] if isinstance(answer, list) else answer


def _change(module: Any, new: Any, old: Any) -> float:
    """The largest difference in a number of two answers: a probability, or a multiple of the scale of a regression."""
    if isinstance(module, SequenceRegressionModule):
        one, other = (module.encode_labels([answer]) for answer in (new, old))
        return float((one - other).abs().max())
    if isinstance(old, float):
        return float(abs(new - old))
    if isinstance(old, Mapping):
        pairs = [(new.get(name), value) for name, value in old.items()]
    else:
        pairs = list(zip(new, old, strict=False)) if isinstance(old, list) else []
    return max((_change(module, *pair) for pair in pairs), default=0.0)


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
