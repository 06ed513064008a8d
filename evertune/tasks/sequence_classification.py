"""Text classification with exactly one label per text, any number of them, or one of an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evertune.tasks.base import Task


class SequenceClassificationTask(Task):
    """Texts with exactly one label, or with any number of labels.

    Args:
        multi_label: Whether a text has any number of labels (a Bernoulli likelihood per class) instead of exactly one
            (a categorical likelihood). Default: False.
    """

    def __init__(self, multi_label: bool = False) -> None:
        super().__init__("bernoulli" if multi_label else "categorical")
        self.multi_label = multi_label

    def check_label(self, value: Any) -> str | list[str]:
        """One name, or with ``multi_label`` a list of names, which may be empty.

        Raises:
            ValueError: If the label is not a name, is a list without ``multi_label``, or a single name with it.

        Example:
            >>> SequenceClassificationTask().check_label(3)
            '3'
            >>> SequenceClassificationTask(multi_label=True).check_label(["sport", 3])
            ['sport', '3']
        """
        label: str | list[str] = super().check_label(value)
        if self.multi_label and isinstance(label, str):
            raise ValueError(f"multi_label=True expects a list of names, got {label!r}; write [{label!r}]")
        if not self.multi_label and isinstance(label, list):
            raise ValueError(f"one label is expected, got the list {label!r}; multi_label=True learns lists")
        return label


class OrdinalTask(SequenceClassificationTask):
    """Texts with exactly one of some classes that have an order, all of them known from the start.

    Args:
        classes: Names of the classes, lowest first.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = list(classes)

    def check_label(self, value: Any) -> str:
        """One of the names.

        Raises:
            ValueError: If the label is another one.

        Example:
            >>> OrdinalTask(["1", "2", "3"]).check_label(3)
            '3'
            >>> OrdinalTask(["bad", "good"]).check_label("fair")
            Traceback (most recent call last):
            ValueError: the label 'fair' is none of the classes ['bad', 'good'], whose order is fixed
        """
        label = super().check_label(value)
        if label not in self.classes:
            raise ValueError(f"the label {label!r} is none of the classes {self.classes}, whose order is fixed")
        return str(label)
