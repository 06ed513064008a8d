"""Text classification with exactly one label per text, or any number of them."""

from __future__ import annotations

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
