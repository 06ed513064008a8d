"""Texts with one label each, or several."""

from __future__ import annotations

from evertune.tasks.base import Task


class SequenceClassificationTask(Task):
    """Texts with one label each, or with any number of them.

    Args:
        multi_label: whether a text has any number of labels (a Bernoulli likelihood for each class) instead of exactly
            one (a categorical likelihood).
    """

    def __init__(self, multi_label: bool = False) -> None:
        super().__init__("bernoulli" if multi_label else "categorical")
        self.multi_label = multi_label
