"""Scores of a validation or a test as a whole, by torchmetrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from evertune._lightning import LightningModule


class StageScores(nn.ModuleDict):
    """Metrics of a module for ``val`` and ``test``: over all batches of an epoch and all ranks, then from 0 again.

    Args:
        metrics: The metrics (of torchmetrics) by name, logged as ``val_NAME`` and ``test_NAME``.
    """

    def __init__(self, metrics: dict[str, Any]) -> None:
        from torchmetrics import MetricCollection

        super().__init__({stage: MetricCollection(metrics).clone(prefix=f"{stage}_") for stage in ("val", "test")})

    def take_in(self, stage: str, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        metrics: Any = self[stage]
        metrics.update(predictions, targets)

    def log(self, module: LightningModule, stage: str) -> None:
        """Log the scores of the epoch, which are equal on all ranks; means where a metric has several numbers."""
        metrics: Any = self[stage]
        if any(metric.update_called for metric in metrics.values()):
            module.log_dict({name: value.mean() for name, value in metrics.compute().items()}, prog_bar=True)
        metrics.reset()
