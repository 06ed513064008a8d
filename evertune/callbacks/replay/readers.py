"""What is read of examples: the class, the id, a part, the features and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.replay.spool import Record
from evertune.memory.codec import decode
from evertune.tasks.base import Task, losses, task_of
from evertune.utils.batches import logits_of, name_of


def default_features(module: pl.LightningModule, batch: Any) -> Tensor:
    """``module.features(batch)`` if the module has such a method, else its logits."""
    features = getattr(module, "features", None)
    return features(batch) if callable(features) else logits_of(module, batch)


def default_losses(module: pl.LightningModule, batch: Any) -> Tensor:
    """The loss of each example, ``[batch, 1]``, of the logits and targets that the module's task finds."""
    return losses(task_of(module).outputs(module, batch)).unsqueeze(1)


class LabelReader:
    """The class of an example as a string, or None.

    Args:
        source: Function of the example, its key or its position; None uses the task's labels.
        task: Task that reads the label. By default one that looks in the usual places.

    Example:
        >>> import torch
        >>> read = LabelReader(None)
        >>> read({"text": "hello", "label": "greeting"}), read((torch.zeros(2), 3)), read({"labels": ["b", "a"]})
        ('greeting', '3', 'a, b')
    """

    def __init__(self, source: Callable[[Any], Any] | str | int | None, task: Task | None = None) -> None:
        self.source = source
        self.task = task or Task()

    def __call__(self, example: Any) -> str | None:
        """The class, or None."""
        return self.task.label(example) if self.source is None else name_of(_read(example, self.source, "label"))


class IdReader:
    """The id of an example as a string.

    Args:
        source: Function of the example, its key or its position.
    """

    def __init__(self, source: Callable[[Any], Any] | str | int) -> None:
        self.source = source

    def __call__(self, example: Any) -> str:
        """The id of an example, as a string."""
        name = name_of(_read(example, self.source, "id"))
        if name is None:
            raise ValueError(f"id={self.source!r} gives neither a string nor a whole number")
        return name


class Encoded(Sequence[Any]):
    """The examples of records, decoded when accessed."""

    def __init__(self, records: list[Record]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return decode(self._records[index].data)


class Parts(Sequence[Any]):
    """A part of each example of a dataset, taken when it is accessed."""

    def __init__(self, dataset: Any, part: Callable[[Any], Any]) -> None:
        self._dataset, self._part = dataset, part

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._part(self._dataset[index])


def _read(example: Any, source: Callable[[Any], Any] | str | int, what: str) -> Any:
    if callable(source):
        return source(example)
    try:
        return example[source]
    except (KeyError, IndexError, TypeError) as error:
        keys = f" with the keys {sorted(map(str, example))}" if isinstance(example, dict) else ""
        raise ValueError(f"{what}={source!r} is not in an example, a {type(example).__name__}{keys}") from error
