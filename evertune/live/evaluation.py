"""What a module says about held-out records, and what its predictions cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from evertune.gate.predictions import Cost, Label, Predictions
from evertune.lightning_modules.saving import gathered

Row = Mapping[str, Any]
"""A record of the journal: ``id``, ``origin`` and ``record``, its fields."""


class Classifier(Protocol):
    """What a module needs to be evaluated, besides being an ``nn.Module``.

    ``SequenceClassificationModule`` has it all. ``multi_label``, where a module has it and it is true, means that
    each class is a yes or no of its own; ``configure_model()``, where there is one, is called first.
    """

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the logits."""

    @property
    def tokenizer(self) -> Any:
        """A tokenizer of transformers."""

    def __call__(self, **tokens: Tensor) -> Any:
        """An output with ``logits`` [batch, classes]."""


def evaluate(
    module: Classifier,
    slices: Mapping[str, Sequence[Row]],
    text: str | Sequence[str] = "text",
    label: str = "label",
    batch_size: int = 64,
    max_length: int = 128,
) -> dict[str, Predictions]:
    """What a module says about the records of each slice.

    The module is left as it was: modes, gradients and random state. A slice is predicted by itself, so that its
    predictions do not depend on which others there are. Call it on every rank after a ZeRO-3 fit.

    Args:
        module: see :class:`Classifier`.
        slices: records by the name of their slice.
        text: the field with the text, or the two fields of a pair.
        label: the field with the label: the name of a class, or a list of names. A class that the module does not know
            makes the record count as wrong.
        batch_size: records that are predicted at a time.
        max_length: tokens after which a text is cut.

    Returns:
        The predictions by the name of the slice, each in the order of its records.

    Raises:
        ValueError: when a size is not positive, or a record lacks a field.
    """
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    fields = [text] if isinstance(text, str) else list(text)
    with _predicting(module):
        return {
            name: _evaluate(module, name, list(rows), fields, label, batch_size, max_length)
            for name, rows in slices.items()
        }


def measure(
    champion: Classifier,
    challenger: Classifier,
    texts: Sequence[str] | Sequence[Sequence[str]],
    max_length: int = 128,
    repeats: int = 15,
) -> tuple[Cost, Cost]:
    """What the predictions of two modules cost, measured side by side.

    The two take turns on the same texts, one at a time and all together, so that whatever else the machine does slows
    both alike; a time is the median over the turns. The first turn does not count.

    Args:
        champion: see :class:`Classifier`.
        challenger: as well.
        texts: texts, or pairs of them; 32 are plenty.
        max_length: tokens after which a text is cut.
        repeats: turns that count.

    Returns:
        The champion's cost and the challenger's.

    Raises:
        ValueError: when there are no texts, or ``repeats`` is not positive.
    """
    if not texts or repeats < 1:
        raise ValueError(f"measuring needs texts and at least one repeat, got {len(texts)} texts and {repeats} repeats")
    columns: list[list[Any]] = (
        [list(texts)] if isinstance(texts[0], str) else [list(c) for c in zip(*texts, strict=True)]
    )
    modules = (champion, challenger)
    single: tuple[list[float], list[float]] = ([], [])
    batch: tuple[list[float], list[float]] = ([], [])
    with _predicting(champion), _predicting(challenger):
        for turn in range(repeats + 1):
            one = [[column[turn % len(texts)]] for column in columns]
            for module, alone, together in zip(modules, single, batch, strict=True):
                alone.append(_seconds(module, one, max_length))
                together.append(_seconds(module, columns, max_length))
        costs = [
            Cost(1000 * median(alone[1:]), 1000 * median(together[1:]), size_in_bytes(module))
            for module, alone, together in zip(modules, single, batch, strict=True)
        ]
    return costs[0], costs[1]


def size_in_bytes(module: Any) -> int:
    """The bytes of a module's parameters and buffers; shared ones count once, partitioned ones whole."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size() for tensor in tensors.values())


def _evaluate(
    module: Classifier, name: str, rows: list[Row], fields: list[str], label: str, batch_size: int, max_length: int
) -> Predictions:
    missing = [(row["id"], field) for row in rows for field in (*fields, label) if field not in row["record"]]
    if missing:
        raise ValueError(f"slice {name!r}: record {missing[0][0]!r} has no field {missing[0][1]!r}")
    columns = [[row["record"][field] for row in rows] for field in fields]
    labels: list[Label] = [row["record"][label] for row in rows]
    predicted: list[Label] = [""] * len(rows)
    confidence, label_probability = np.empty(len(rows)), np.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda row: -sum(len(column[row]) for column in columns))  # like with like
    for start in range(0, len(rows), batch_size):
        places = order[start : start + batch_size]
        logits = _logits(module, [[column[row] for row in places] for column in columns], max_length)
        answer = _several if getattr(module, "multi_label", False) else _one
        names, confidence[places], label_probability[places] = answer(
            logits, module.classes, [labels[row] for row in places]
        )
        for row, said in zip(places, names, strict=True):
            predicted[row] = said
    return Predictions([row["id"] for row in rows], labels, predicted, confidence, label_probability)


def _one(logits: Tensor, classes: list[str], labels: list[Any]) -> tuple[list[Label], Any, Any]:
    """The class, its probability and that of the label, for texts with one label each."""
    numbers = {name: number for number, name in enumerate(classes)}
    known = torch.tensor([numbers.get(label, -1) for label in labels])
    probabilities = logits.softmax(-1)
    confidence, best = probabilities.max(-1)
    of_label = probabilities.gather(1, known.clamp(min=0)[:, None])[:, 0] * (known >= 0)
    return [classes[number] for number in best.tolist()], confidence.numpy(), of_label.numpy()


def _several(logits: Tensor, classes: list[str], labels: list[Any]) -> tuple[list[Label], Any, Any]:
    """The classes above one half and the probability of the whole answer, for texts with any number of labels."""
    probabilities = logits.sigmoid()
    yes = probabilities > 0.5
    said: list[Label] = [[name for name, one in zip(classes, row, strict=True) if one] for row in yes.tolist()]
    truth = torch.tensor([[name in label for name in classes] for label in labels])
    known = torch.tensor([set(label) <= set(classes) for label in labels])
    confidence = torch.where(yes, probabilities, 1 - probabilities).prod(-1)
    of_label = torch.where(truth, probabilities, 1 - probabilities).prod(-1) * known
    return said, confidence.numpy(), of_label.numpy()


def _logits(module: Any, columns: Sequence[Sequence[str]], max_length: int) -> Tensor:
    """The scores of texts, in fp64 on the CPU, so that what follows is the same on every machine."""
    tokens = module.tokenizer(
        *map(list, columns), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    logits: Tensor = module(**tokens.to(next(module.parameters()).device)).logits
    return logits.double().cpu()


def _seconds(module: Any, columns: Sequence[Sequence[str]], max_length: int) -> float:
    start = time.perf_counter()
    _logits(module, columns, max_length)  # ends with a copy to the CPU: the accelerator is done by then
    return time.perf_counter() - start


@contextmanager
def _predicting(module: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, weights whole; afterwards all as it was."""
    if hasattr(module, "configure_model"):
        module.configure_model()
    modes = [(part, part.training) for part in nn.Module.modules(module)]
    module.eval()
    try:
        with gathered(module), torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training
