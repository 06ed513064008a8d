"""Texts with one label each, or several."""

from __future__ import annotations

from evertune.tasks.base import Task


class SequenceClassificationTask(Task):
    """Texts with one label each, or with any number of them."""
