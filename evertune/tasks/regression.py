"""Regression: the label of a text is a number, or several."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evertune.sources.values import absent
from evertune.tasks.base import Task

if TYPE_CHECKING:
    from evertune._lightning import pl


class RegressionTask(Task):
    """Texts, or pairs of texts, with a number or several numbers.

    Numbers are not classes: a head does not grow by them, ``Replay`` keeps a uniform sample, and the checks of the gate
    on classes do not apply. The score of a record is ``1 / (1 + error)``, with the mean absolute error of its numbers
    in units of the module's ``scale``: 1 for the exact numbers, one half for an error of one ``scale``, and never so
    small that a single record decides. The gate compares the scores of two versions by Fisher's paired randomisation
    test.

    Args:
        n_targets: How many numbers a label has. Default: 1.

    Raises:
        ValueError: If ``n_targets`` is not positive.

    Example:
        >>> RegressionTask().check_label("3.5"), RegressionTask(2).check_label([1, 2.5])
        (3.5, [1.0, 2.5])
        >>> RegressionTask().check_label("good")
        Traceback (most recent call last):
        ValueError: the label 'good' is not a number
    """

    def __init__(self, n_targets: int = 1) -> None:
        if n_targets < 1:
            raise ValueError(f"n_targets must be positive, got {n_targets}")
        super().__init__("gaussian")
        self.n_targets = n_targets

    def check_label(self, value: Any) -> float | list[float]:
        """The number, or the list of ``n_targets`` numbers. A number may be written as a text, as in CSV files.

        Raises:
            ValueError: If it is not a finite number, or there are more or fewer.
        """
        if hasattr(value, "tolist"):
            value = value.tolist()
        if self.n_targets == 1:
            return _number(value)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != self.n_targets:
            raise ValueError(f"a list of {self.n_targets} numbers is expected, got {reprlib.repr(value)}")
        return [_number(one) for one in value]

    def label(self, example: Any) -> None:
        """None: numbers are not classes."""

    def label_names(self, value: Any) -> list[str]:
        """None: numbers are not classes."""
        return []

    def score(self, module: pl.LightningModule, batch: Any) -> Tensor:
        """``1 / (1 + error)`` of each example: float32 ``[batch]``, in (0, 1]."""
        outputs = self.outputs(module, batch)
        assert outputs.targets is not None
        return 1 / (1 + (outputs.logits.float() - outputs.targets).abs().mean(-1))


def _number(value: Any) -> float:
    if absent(value):
        raise ValueError("no label, or a number that is not finite")
    shown = reprlib.repr(value)
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise ValueError(f"the label {shown} is not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"the label {shown} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"the label {shown} is not a finite number")
    return number
