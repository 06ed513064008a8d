"""Asymmetric cross-entropy: new examples do not push the classes of the past down."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.logit_adjustment import LogitAdjustment
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.step_logits import LogitsMethod
from evertune.callbacks.training_data import TrainingData, class_counts
from evertune.shards.support import check_strategy
from evertune.utils.batches import targets_of

Among = Literal["update", "batch"]


class ERACE(LogitsMethod):
    """New examples compete only among the new classes, replayed ones among all (ER-ACE).

    Caccia et al. 2022, "New Insights on Reducing Abrupt Representation Change in Online Continual Learning". With plain
    cross-entropy, every new example pushes the logits of all old classes down, and the few replayed ones pull the
    features about to repair it. While training, and only then, the loss of a batch becomes the mean over its examples
    of::

        -log softmax(h(x) restricted to C_new)[y]    for a new example
        -log softmax(h(x))[y]                        for a replayed one

    With ``among="batch"``, ``C_new`` are the classes of the new examples of the batch, on all ranks together, as in the
    paper, where batches are small and come from a stream. With ``among="update"``, they are all classes of the update's
    training data: then the result does not depend on the batch size, and ranks exchange nothing.

    The logits of the other classes are replaced by a very small number on their way to the module's own loss, so
    with several labels per example (a sigmoid for each class) they have no gradient, either. The module's logged
    training loss is that of the remaining classes. There is no state. In evaluation nothing is replaced.

    Args:
        among: ``"update"`` (default) or ``"batch"``.
        head: Name of the submodule that returns the logits, ``[batch, classes]``. Found by itself by default.

    Raises:
        ValueError: If ``among`` is unknown. In ``setup``, if there is no :class:`Replay`; if there is a
            :class:`LogitAdjustment`, which corrects the same imbalance in another way; or if the module smooths labels
            over all classes. Before the first step, if targets are not classes, or, with ``"update"``, the training
            data cannot be read by index. On the first batch, if the training step does not use the logits exactly once.

    Example::

        callbacks = [Replay(memory_size=600), ERACE()]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    def __init__(self, among: Among = "update", head: str | None = None) -> None:
        if among not in get_args(Among):
            raise ValueError(f"among must be one of {list(get_args(Among))}, got {among!r}")
        self.among, self.head = among, head
        self._present: Tensor | None = None  # how often the update has each class
        self._replay: Replay | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        self._replay = Replay.of(trainer)
        if self._replay is None:
            raise ValueError(
                "ERACE needs a Replay: without replayed examples, nothing teaches old classes against new ones"
            )
        if any(isinstance(one, LogitAdjustment) for one in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("ERACE and LogitAdjustment both correct for the classes of new examples; use one of them")
        if smoothing := getattr(pl_module, "label_smoothing", 0.0):
            raise ValueError(
                f"ERACE leaves classes out of the loss, over which label_smoothing={smoothing} spreads the targets; "
                "set it to 0"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the classes of the update."""
        self._present = None
        if self.among == "update":
            self._present = class_counts(TrainingData(trainer, type(self).__name__).targets())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave classes out of the loss of the new examples."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._step is not None and self._replay is not None
        n_new = self._replay.joined(trainer, batch).n_new
        counts = self._of_batch(trainer, batch, n_new) if self._present is None else self._present
        absent = torch.ones(self._step.n_classes, dtype=torch.bool)
        absent[: len(counts)] = counts[: len(absent)].cpu() == 0
        self._step.exclude(slice(n_new), absent.to(pl_module.device))

    def _of_batch(self, trainer: pl.Trainer, batch: Any, n_new: int) -> Tensor:
        """How often the new examples of the batch have each class, on all ranks together."""
        assert self._step is not None
        targets = targets_of(batch)
        if not isinstance(targets, Tensor) or targets.ndim > 2 or (targets.ndim == 1 and targets.is_floating_point()):
            got = f"shape {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                f"ERACE needs targets that are class numbers [batch], or 0 and 1 [batch, classes]; got {got}"
            )
        counts = class_counts(targets[:n_new], self._step.n_classes)
        everyones: Tensor = trainer.strategy.reduce(counts, reduce_op="sum")
        return everyones

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Check that the training step has used the logits."""
        assert self._step is not None
        self._step.check()
