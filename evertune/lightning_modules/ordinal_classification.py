"""Classification into classes that have an order: stars, grades, severities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evertune.lightning_modules.heads import OrdinalHead
from evertune.lightning_modules.sequence_classification import SequenceClassificationModule
from evertune.lightning_modules.stage_scores import StageScores
from evertune.tasks.sequence_classification import OrdinalTask
from evertune.utils.batches import targets_of, without_targets


class OrdinalClassificationModule(SequenceClassificationModule):
    """A pretrained transformer that classifies texts into classes with an order, such as stars from 1 to 5.

    :class:`SequenceClassificationModule` with an :class:`~evertune.lightning_modules.OrdinalHead`: one number for each
    text, and a threshold between each class and the next (cumulative logits). What it gives are probabilities of named
    classes, so predictions, memory, importance, distillation and the gate are the same. The classes are named from the
    start and do not grow: a class at the end of the list would be above all others.

    Also logs, for validation and test, ``mae``, the mean absolute difference of ranks, and ``kappa``, the quadratically
    weighted kappa (Cohen 1968): ``val_mae``, ``val_kappa``, ...

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        classes: Names of the classes, lowest first, at least two.
        **settings: Those of :class:`SequenceClassificationModule`, except ``head``, ``multi_label`` and
            ``n_classes_ahead``.

    Raises:
        ValueError: If an argument is out of range, or a class arrives that was not named.

    Example::

        module = OrdinalClassificationModule("bert-base-uncased", classes=["bad", "fair", "good"])
        pl.Trainer(max_epochs=3).fit(module, datamodule)
        module.predict(["It broke after a day."])  # [{"bad": 0.91, "fair": 0.08, "good": 0.01}]
    """

    def __init__(self, model_name_or_path: str, *, classes: Sequence[str], **settings: Any) -> None:
        for name, only in (("head", "linear"), ("multi_label", False), ("n_classes_ahead", None)):
            if settings.get(name, only) != only:
                raise ValueError(f"{name}={settings[name]!r} is not for classes with an order; leave {name} out")
        if len(classes) < 2:
            raise ValueError(f"classes must be at least two, lowest first, got {list(classes)}")
        super().__init__(model_name_or_path, classes=classes, **settings)
        self.task = OrdinalTask(self.classes)

    def configure_head(self) -> None:
        """Build the head and the metrics."""
        from torchmetrics import CohenKappa, MeanAbsoluteError

        super().configure_head()
        self.head = OrdinalHead(self.n_features, len(self._classes))
        kappa = CohenKappa(task="multiclass", num_classes=len(self._classes), weights="quadratic")
        self.scores = StageScores({"mae": MeanAbsoluteError(), "kappa": kappa})

    def _name_classes(self, new: list[str]) -> None:
        if self._classes and new:
            raise ValueError(f"the classes {self._classes} have an order, in which {new} have no place: name all first")
        super()._name_classes(new)

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        super()._evaluate(batch, stage)
        self.scores.take_in(stage, self(**without_targets(batch)).logits.argmax(1), targets_of(batch))

    def on_validation_epoch_end(self) -> None:
        """Log ``val_mae`` and ``val_kappa`` over all ranks."""
        self.scores.log(self, "val")

    def on_test_epoch_end(self) -> None:
        """Log ``test_mae`` and ``test_kappa`` over all ranks."""
        self.scores.log(self, "test")
