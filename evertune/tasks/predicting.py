"""Predictions for records: class names with their probabilities, or a score per record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from evertune.gate.predictions import Label, Predictions
from evertune.sources.base import Row
from evertune.utils.batches import logits_in


def are_probabilities(answer: Any) -> TypeGuard[dict[str, float]]:
    """Whether the answer of a module's ``predict`` to a text is the probability of each class by name."""
    return isinstance(answer, dict) and bool(answer) and all(isinstance(value, float) for value in answer.values())


def columns_of(rows: Sequence[Row], text: str | Sequence[str]) -> list[list[str]]:
    """The texts of records: one list, or two for pairs of texts."""
    fields = [text] if isinstance(text, str) else list(text)
    return [[row["record"][field] for row in rows] for field in fields]


def features_of(module: Any, columns: Sequence[Sequence[str]], batch_size: int, max_length: int) -> np.ndarray:
    """The features of texts by ``module.features``, ``[texts, features]``."""
    found: list[np.ndarray] = [np.empty(0)] * len(columns[0])
    for places in batches_by_length(columns, batch_size):
        texts = [[column[row] for row in places] for column in columns]
        tokens = module.tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        features = module.features(tokens.to(device_of(module))).double().cpu().numpy()
        for row, one in zip(places, features, strict=True):
            found[row] = one
    return np.stack(found)


def answers(module: Any, columns: Sequence[Sequence[str]], max_length: int) -> Tensor:
    """The logits of texts, in fp64 on the CPU, so that the following steps give the same result on every machine."""
    tokens = module.tokenizer(
        *map(list, columns), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    output = module(**tokens.to(device_of(module)))
    return logits_in(output, module).double().cpu()


def predict_classes(
    module: Any, rows: Sequence[Row], columns: Sequence[Sequence[str]], label: str, batch_size: int, max_length: int
) -> Predictions:
    """The most probable class of each record, or with ``module.multi_label`` all classes above one half.

    ``columns`` are the texts of the records, one list or two. Requires ``module.classes``, the names in the order of
    the logits.
    """
    labels: list[Label] = [row["record"][label] for row in rows]
    predicted: list[Label] = [""] * len(rows)
    confidence, label_probability = np.empty(len(rows)), np.empty(len(rows))
    for places in batches_by_length(columns, batch_size):
        logits = answers(module, [[column[row] for row in places] for column in columns], max_length)
        answer = _several if getattr(module, "multi_label", False) else _one
        names, confidence[places], label_probability[places] = answer(
            logits, module.classes, [labels[row] for row in places]
        )
        for row, said in zip(places, names, strict=True):
            predicted[row] = said
    return Predictions([row["id"] for row in rows], labels, predicted, confidence, label_probability)


def predict_scores(
    task: Any,
    module: Any,
    rows: Sequence[Row],
    text: str | Sequence[str],
    label: str,
    batch_size: int,
    max_length: int,
) -> Predictions:
    """``task.score`` of each record, using ``task.dataset`` and ``task.collator``."""
    scores = np.empty(len(rows))
    if rows:
        pair = text if isinstance(text, str) else tuple(text)
        data = [dict(row["record"]) for row in rows]
        examples = task.dataset(data, module.tokenizer, text=pair, label=label, id_column=None, max_length=max_length)
        for places in batches_by_length(columns_of(rows, text), batch_size):
            scores[places] = scores_of(task, module, [examples[row] for row in places])
    labels = [row["record"][label] for row in rows]
    return Predictions.scored([row["id"] for row in rows], labels, scores)


def scores_of(task: Any, module: Any, examples: Sequence[Any]) -> np.ndarray:
    """The score of each example of one batch, ``[examples]``."""
    scores: np.ndarray = task.score(module, batch_of(task, module, examples)).double().cpu().numpy()
    return scores


def batch_of(task: Any, module: Any, examples: Sequence[Any]) -> Any:
    """A batch of examples on the module's device: collated and moved as Lightning does it."""
    batch = module.on_before_batch_transfer(task.collator(module.tokenizer)(list(examples)), 0)
    batch = module.transfer_batch_to_device(batch, device_of(module), 0)
    return module.on_after_batch_transfer(batch, 0)


def device_of(module: Any) -> torch.device:
    """The device of a module; that of its weights if it does not say, as one that is not of Lightning."""
    device: torch.device = module.device if hasattr(module, "device") else next(module.parameters()).device
    return device


def batches_by_length(columns: Sequence[Sequence[str]], batch_size: int) -> Iterator[list[int]]:
    """The positions of records, longest texts first: texts of similar length need little padding."""
    n_rows = len(columns[0])
    order = sorted(range(n_rows), key=lambda row: -sum(len(column[row]) for column in columns))
    for start in range(0, n_rows, batch_size):
        yield order[start : start + batch_size]


def _one(logits: Tensor, classes: list[str], labels: list[Any]) -> tuple[list[Label], Any, Any]:
    """The class, its probability and that of the label, for texts with exactly one label."""
    numbers = {name: number for number, name in enumerate(classes)}
    known = torch.tensor([numbers.get(label, -1) for label in labels])
    probabilities = logits.softmax(-1)
    confidence, best = probabilities.max(-1)
    of_label = probabilities.gather(1, known.clamp(min=0)[:, None])[:, 0] * (known >= 0)
    return [classes[number] for number in best.tolist()], confidence.numpy(), of_label.numpy()


def _several(logits: Tensor, classes: list[str], labels: list[Any]) -> tuple[list[Label], Any, Any]:
    """The classes above one half and the probability of the whole prediction, for texts with any number of labels."""
    probabilities = logits.sigmoid()
    yes = probabilities > 0.5
    said: list[Label] = [[name for name, one in zip(classes, row, strict=True) if one] for row in yes.tolist()]
    truth = torch.tensor([[name in label for name in classes] for label in labels])
    known = torch.tensor([set(label) <= set(classes) for label in labels])
    confidence = torch.where(yes, probabilities, 1 - probabilities).prod(-1)
    of_label = torch.where(truth, probabilities, 1 - probabilities).prod(-1) * known
    return said, confidence.numpy(), of_label.numpy()
