"""Regularised dropout: two passes with other dropout must give the same answer."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from evertune._lightning import pl
from evertune.callbacks.reference_method import training_loss
from evertune.callbacks.step_logits import LogitsMethod, counted_rows
from evertune.callbacks.teacher import sum_over_examples
from evertune.shards.support import check_strategy


class RDrop(LogitsMethod):
    """Each batch is learned twice, with different dropout, and both answers are drawn together (R-Drop).

    Wu et al. 2021, "R-Drop: Regularized Dropout for Neural Networks". The loss gets the loss of a second pass, and
    ``strength`` times the mean over examples of the symmetric divergence of the two answers ``p`` and ``q``::

        loss(first) + loss(second) + strength * (KL(p || q) + KL(q || p)) / 2

    For a sequence of predictions, the divergence is averaged over the positions that count, whose target is not -100;
    for several labels per example, over the labels. A step takes twice the time. Without dropout in the module there is
    nothing to gain. What ``training_step`` logs in the second pass is dropped.

    Args:
        strength: Factor of the divergence. Default: 1 (the paper: 0.5 to 1 for classifying texts, 5 for translation).
        head: Name of the submodule that returns the logits, ``[batch, ..., classes]``. Found by itself by default.

    Raises:
        ValueError: If ``strength`` is not positive and finite. In ``setup``, if optimization is manual, the strategy is
            not supported, or the module has no dropout. On the first batch, if the training step does not use the
            logits exactly once.

    Example:
        >>> from evertune.callbacks.rdrop import RDrop
        >>> RDrop(strength=0.5).strength
        0.5
    """

    keeps_nothing = True

    def __init__(self, strength: float = 1.0, head: str | None = None) -> None:
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength must be positive and finite, got {strength}")
        self.strength, self.head = strength, head

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        if not pl_module.automatic_optimization:
            raise ValueError("RDrop needs automatic optimization: it runs training_step again")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is dropout."""
        super().on_train_start(trainer, pl_module)
        rates = [float(getattr(part, "p", 0.0)) for part in pl_module.modules() if "Dropout" in type(part).__name__]
        if not any(rates):
            raise ValueError(
                f"RDrop compares two passes with different dropout, and {type(pl_module).__name__} has none: set its "
                "dropout, or leave RDrop out"
            )

    def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor | None:
        """The loss of a second pass, and the divergence of its answers from those of the first."""
        assert self._step is not None
        first = self._step.logits(batch)
        with self._step.second_pass():
            loss = training_loss(trainer, module, batch)
            second = self._step.logits(batch)
        p, n_rows = counted_rows(first)
        q, _ = counted_rows(second)
        several = getattr(module, "multi_label", False)
        each = (_divergence(p.float(), q.float(), several) + _divergence(q.float(), p.float(), several)) / 2
        return loss + self.strength * sum_over_examples(each, n_rows) / len(first.logits)


def _divergence(p: Tensor, q: Tensor, several: bool) -> Tensor:
    """``KL(p || q)`` of each row of logits, ``[R]``; with several labels, the mean over the labels."""
    if several:
        yes, no = p.sigmoid(), (-p).sigmoid()
        log = nn.functional.logsigmoid
        return (yes * (log(p) - log(q)) + no * (log(-p) - log(-q))).mean(1)
    return (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)
