"""The predictions of a module on held-out records, and what its predictions cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch

from evertune.gate.predictions import Cost, Label, Predictions
from evertune.gate.statistics import binomial_tail
from evertune.gate.untrained import nearest_class_means
from evertune.lightning_modules.saving import gathered
from evertune.sources.base import Row
from evertune.tasks.base import task_of
from evertune.tasks.predicting import answers, features_of, scores_of
from evertune.utils.evaluation import evaluation_mode

logger = logging.getLogger("evertune.live")


def evaluate(
    module: Any,
    slices: Mapping[str, Sequence[Row]],
    text: str | Sequence[str] = "text",
    label: str | None = "label",
    batch_size: int = 64,
    max_length: int = 128,
) -> dict[str, Predictions]:
    """The predictions of a module on the records of each slice.

    The module is left as it was: modes, gradients and random state. Each slice is predicted on its own, so that its
    predictions do not depend on the other slices. After a ZeRO-3 fit, call it on every rank.

    Args:
        module: The module, with whatever the ``predict`` of its task needs, such as a tokenizer. Its
            ``configure_model()``, if it has one, is called first. See :class:`evertune.tasks.Task`.
        slices: Records by the name of their slice.
        text: Name of the field with the text, or of the two fields of a pair.
        label: Name of the field with the label: the name of a class, or a list of names. A record with a class that the
            module does not know counts as wrong. None for a task that learns the texts themselves.
        batch_size: Number of records that are predicted at a time. Default: 64.
        max_length: Number of tokens after which a text is truncated. Default: 128.

    Returns:
        The predictions by the name of the slice, each in the order of its records.

    Raises:
        ValueError: If a size is not positive, or a record lacks a field.
    """
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    with evaluating(module):
        return {
            name: _evaluate(module, name, list(rows), text, label, batch_size, max_length)
            for name, rows in slices.items()
        }


def without_training(
    module: Any,
    slices: Mapping[str, Sequence[Row]],
    text: str | Sequence[str] = "text",
    label: str | None = "label",
    batch_size: int = 64,
    max_length: int = 128,
) -> dict[str, Predictions] | None:
    """What can be said of records without training: the nearest class mean over a module's features, leaving one out.

    All slices are compared with each other.

    Args:
        module: A pretrained module that was not trained, with a ``tokenizer`` and ``features(batch)``, which returns a
            tensor ``[examples, features]``.
        slices: Records by the name of their slice.
        text: Name of the field with the text, or of the two fields of a pair.
        label: Name of the field with the label, the name of a class.
        batch_size: Number of records that are read at a time. Default: 64.
        max_length: Number of tokens after which a text is truncated. Default: 128.

    Returns:
        The answers by slice, without probabilities; see :func:`~evertune.gate.untrained.nearest_class_means`. None if
        the module has no features, or a record has several labels or a number.
    """
    rows = [row for chosen in slices.values() for row in chosen]
    labels: list[Any] = [None if label is None else row["record"].get(label) for row in rows]
    if not callable(getattr(module, "features", None)) or not all(isinstance(one, str) for one in labels):
        return None
    try:
        with evaluating(module):
            columns = task_of(module).texts(rows, text, module.tokenizer, max_length)
            features = features_of(module, columns, batch_size, max_length)
    except (TypeError, KeyError, AttributeError) as error:
        logger.warning("the features of %s cannot be used: %s", type(module).__name__, error)
        return None
    answers, said, start = nearest_class_means(features, labels), {}, 0
    for name, chosen in slices.items():
        part = slice(start, start := start + len(chosen))
        unknown = np.full(len(chosen), np.nan)
        said[name] = Predictions([row["id"] for row in chosen], labels[part], list(answers[part]), unknown, unknown)
    return said


def features_of_rows(
    module: Any,
    rows: Sequence[Row],
    text: str | Sequence[str] = "text",
    label: str | None = "label",
    batch_size: int = 64,
    max_length: int = 128,
) -> np.ndarray:
    """The features of records, ``[records, features]`` in float64; the arguments are those of :func:`evaluate`."""
    with evaluating(module):
        columns = task_of(module).texts(rows, text, module.tokenizer, max_length)
        return features_of(module, columns, batch_size, max_length)


def evaluate_examples(module: Any, examples: Sequence[Any], labels: Sequence[str], batch_size: int = 64) -> Predictions:
    """Whether a module is right on examples that are tokenised already, such as those of a replay memory.

    Args:
        module: The module, as for :func:`evaluate`.
        examples: The examples, as its task collates them.
        labels: The class of each example.
        batch_size: Number of examples that are predicted at a time. Default: 64.

    Returns:
        The predictions under the ids ``"0"``, ``"1"``, ...: the label where the module is right, ``""`` where it is
        wrong, and no probabilities.
    """
    task, scores = task_of(module), np.empty(len(examples))
    with evaluating(module):
        for start in range(0, len(examples), batch_size):
            scores[start : start + batch_size] = scores_of(task, module, examples[start : start + batch_size])
    predicted: list[Label] = [label if score == 1 else "" for label, score in zip(labels, scores, strict=True)]
    unknown = np.full(len(examples), np.nan)
    return Predictions([str(n) for n in range(len(examples))], list(labels), predicted, unknown, unknown)


def measure(
    champion: Any,
    challenger: Any,
    texts: Sequence[str] | Sequence[Sequence[str]],
    max_length: int = 128,
    repeats: int = 15,
) -> tuple[Cost, Cost]:
    """What the predictions of two modules cost, measured side by side.

    The two modules take turns on the same texts, one text at a time and all texts together; the first turn is a warm-up
    and does not count. The champion's time is the median over the turns. The challenger's is the champion's times the
    ratio that :func:`surely_slower` gives: other load on the machine makes single turns of either module slow, and must
    not make one of two equal modules look slow.

    Args:
        champion: A module with a tokenizer that returns logits for texts.
        challenger: The module that it is compared with, of the same kind.
        texts: Texts, or pairs of texts; 32 are plenty.
        max_length: Number of tokens after which a text is truncated. Default: 128.
        repeats: Number of turns that count. Default: 15.

    Returns:
        The cost of the champion, and that of the challenger.

    Raises:
        ValueError: If there are no texts, or ``repeats`` is not positive.
    """
    if not texts or repeats < 1:
        raise ValueError(f"measuring needs texts and at least one repeat, got {len(texts)} texts and {repeats} repeats")
    columns: list[list[Any]] = (
        [list(texts)] if isinstance(texts[0], str) else [list(c) for c in zip(*texts, strict=True)]
    )
    modules = (champion, challenger)
    single: tuple[list[float], list[float]] = ([], [])
    batch: tuple[list[float], list[float]] = ([], [])
    with evaluating(champion), evaluating(challenger):
        for turn in range(repeats + 1):
            one = [[column[turn % len(texts)]] for column in columns]
            for module, alone, together in zip(modules, single, batch, strict=True):
                alone.append(_seconds(module, one, max_length))
                together.append(_seconds(module, columns, max_length))
    one_ms, all_ms = (1000 * median(before[1:]) for before, _ in (single, batch))
    one_slower, all_slower = (surely_slower(before[1:], after[1:]) for before, after in (single, batch))
    return (
        Cost(one_ms, all_ms, size_in_bytes(champion)),
        Cost(one_ms * one_slower, all_ms * all_slower, size_in_bytes(challenger)),
    )


def surely_slower(before: Sequence[float], after: Sequence[float]) -> float:
    """How many times as long the second takes at least, from times of turns that were measured in pairs.

    The median of the ratios is larger with a confidence of 99 % (sign test: Conover 1999, "Practical nonparametric
    statistics"). With fewer than 7 pairs nothing is that sure, and the smallest ratio is given.

    Args:
        before: Time of each turn of the first, in any unit.
        after: Time of the second in the same turns.

    Example:
        Other load doubled some turns of either; the second is not slower:

        >>> surely_slower([1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 2, 1, 2])
        1.0
        >>> surely_slower([1.0] * 15, [2.0] * 14 + [1.0])
        2.0
    """
    ratios = sorted(new / old for old, new in zip(before, after, strict=True))
    ruled_out = 0
    while binomial_tail(len(ratios) - ruled_out - 1, len(ratios), 0.5) <= 0.01:
        ruled_out += 1
    return ratios[ruled_out]


def size_in_bytes(module: Any) -> int:
    """Bytes of the parameters and buffers of a module. Shared tensors count once, partitioned ones in full."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    # Under ZeRO-3 a rank holds only a shard; DeepSpeed keeps the full number of elements in ``ds_numel``.
    return sum(getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size() for tensor in tensors.values())


def _evaluate(
    module: Any,
    name: str,
    rows: list[Row],
    text: str | Sequence[str],
    label: str | None,
    batch_size: int,
    max_length: int,
) -> Predictions:
    fields = [text] if isinstance(text, str) else text
    needed = [*fields, *([] if label is None else [label])]
    missing = [(row["id"], field) for row in rows for field in needed if field not in row["record"]]
    if missing:
        raise ValueError(f"slice {name!r}: record {missing[0][0]!r} has no field {missing[0][1]!r}")
    task = task_of(module)
    return task.predict(module, rows, text=text, label=label, batch_size=batch_size, max_length=max_length)


def _seconds(module: Any, columns: Sequence[Sequence[str]], max_length: int) -> float:
    start = time.perf_counter()
    answers(module, columns, max_length)  # ends with a copy to the CPU, which waits for the accelerator
    return time.perf_counter() - start


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, weights gathered; the previous state is restored afterwards."""
    if hasattr(module, "configure_model"):
        module.configure_model()
    with evaluation_mode(module), gathered(module), torch.inference_mode():
        yield
