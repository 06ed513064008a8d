"""What is read of examples: the class, the id and a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evertune.callbacks.replay.spool import Record
from evertune.memory.codec import decode
from evertune.tasks.base import Task
from evertune.utils.batches import name_of


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
