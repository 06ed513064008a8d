"""Regression: numbers from texts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evertune.lightning_modules.answering import answers_to
from evertune.lightning_modules.backbone import POOLINGS, Pooling, pool, resolve_pooling
from evertune.lightning_modules.heads import LinearHead
from evertune.lightning_modules.stage_scores import StageScores
from evertune.lightning_modules.transformer import TransformerModule
from evertune.tasks.regression import RegressionTask
from evertune.utils.batches import TARGET_KEYS, targets_of, without_targets


class RegressionOutput(NamedTuple):
    """The output of a regression for a batch.

    Args:
        logits: Numbers [batch, n_targets], as multiples of ``scale`` from ``mean``.
        features: Pooled texts [batch, features], the input of the head.
    """

    logits: Tensor
    features: Tensor


class SequenceRegressionModule(TransformerModule):
    """A pretrained transformer that gives a number, or several numbers, for a text or a pair of texts.

    A batch is the output of a tokenizer, with the numbers under ``labels``: a list of numbers or of lists, or a tensor
    ``[batch]`` or ``[batch, n_targets]``. The model learns ``(label - mean) / scale`` with the mean squared error, so
    that the learning rate, the importance of weights and the scores of records do not depend on the unit of the labels.
    Pass the mean and the standard deviation of your labels; they stay the same from update to update, or weights
    learned with the old ones would be wrong. There is no dropout before the head, which would blur the numbers.

    Logs ``train_loss``, and for validation and test the loss (both in squares of ``scale``), ``mae``, ``rmse``,
    ``pearson`` and ``spearman`` (in units of the labels, means over the numbers of a label): ``val_mae``, ...

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        n_targets: How many numbers a label has. Default: 1.
        mean: Mean of the labels; a list with ``n_targets`` of them if they differ. Default: 0.
        scale: Standard deviation of the labels, or whatever error is large; positive. A list if they differ. Default:
            1.
        pooling: ``auto`` (default), ``mean``, ``cls`` or ``last``, see :class:`SequenceClassificationModule`.
        **settings: Those of :class:`TransformerModule`, such as ``learning_rate``.

    Raises:
        ValueError: If an argument is out of range; the message names the allowed values.

    Example::

        module = SequenceRegressionModule("bert-base-uncased", mean=3.2, scale=1.1)  # stars from 1 to 5
        pl.Trainer(max_epochs=3).fit(module, datamodule)
        module.predict(["It broke after a day."])  # [1.3]
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        n_targets: int = 1,
        mean: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
        pooling: Pooling = "auto",
        **settings: Any,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {list(POOLINGS)}, got {pooling!r}")
        super().__init__(model_name_or_path, **settings)
        self.task = RegressionTask(n_targets)
        self.n_targets = n_targets
        self.pooling = pooling
        self._mean, self._scale = _each("mean", mean, n_targets), _each("scale", scale, n_targets)
        if not bool((self._scale > 0).all()):
            raise ValueError(f"scale must be positive, got {scale}")

    # --- the model

    def configure_head(self) -> None:
        """Build the head, with one row per number, and the metrics."""
        from torchmetrics import MeanAbsoluteError, MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

        n = self.n_targets
        self._pooling = resolve_pooling(self.pooling, self.backbone.config)
        self.head = LinearHead(self.backbone.config.hidden_size, n)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*SpearmanCorr.*")  # it needs all predictions of an epoch, as it says
            spearman = SpearmanCorrCoef(num_outputs=n)
        self.scores = StageScores(
            {
                "mae": MeanAbsoluteError(num_outputs=n),
                "rmse": MeanSquaredError(squared=False, num_outputs=n),
                "pearson": PearsonCorrCoef(num_outputs=n),
                "spearman": spearman,
            }
        )

    def forward(self, **inputs: Any) -> RegressionOutput:
        """Numbers for a batch of tokenised texts: ``module(input_ids=..., attention_mask=...)``."""
        hidden = self.encode(**inputs).last_hidden_state
        features = pool(hidden, inputs.get("attention_mask"), self._pooling)
        return RegressionOutput(self.head(features), features)

    def features(self, batch: Mapping[str, Any]) -> Tensor:
        """The pooled texts of a batch [batch, features], used by herding and drift detectors."""
        output: RegressionOutput = self(**without_targets(batch))
        return output.features

    def encode_labels(self, labels: Any) -> Tensor:
        """Labels as multiples of ``scale`` from ``mean``: float32 ``[batch, n_targets]``.

        Raises:
            ValueError: If a label has more or fewer numbers.
        """
        numbers = torch.as_tensor(labels, dtype=torch.float64).cpu()
        numbers = numbers.unsqueeze(-1) if numbers.ndim == 1 else numbers
        if numbers.shape[1:] != (self.n_targets,):
            raise ValueError(f"labels must be of shape [batch, {self.n_targets}], got {list(numbers.shape)}")
        return ((numbers - self._mean) / self._scale).float()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Replace labels with multiples of ``scale`` from ``mean``."""
        if not isinstance(batch, Mapping):
            return batch
        return {**batch, **{key: self.encode_labels(batch[key]) for key in TARGET_KEYS if key in batch}}

    def numbers(self, encoded: Tensor) -> Tensor:
        """Numbers in the unit of the labels, float64 on the CPU, from multiples of ``scale`` from ``mean``."""
        return encoded.double().cpu() * self._scale + self._mean

    # --- steps

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean squared error of a batch, logged as ``train_loss``."""
        targets = targets_of(batch)
        loss = F.mse_loss(self(**without_targets(batch)).logits.float(), targets)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val_loss``, ``val_mae``, ``val_rmse``, ``val_pearson`` and ``val_spearman`` over all ranks."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test_loss``, ``test_mae``, ``test_rmse``, ``test_pearson`` and ``test_spearman`` over all ranks."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation."""
        self.scores.log(self, "val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test."""
        self.scores.log(self, "test")

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        targets = targets_of(batch)
        said = self(**without_targets(batch)).logits.float()
        loss = F.mse_loss(said, targets)
        self.log(f"{stage}_loss", loss, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(targets))
        pair = [self.numbers(one).float().to(self.device) for one in (said, targets)]
        predicted, labels = (one.squeeze(-1) if self.n_targets == 1 else one for one in pair)
        self.scores.take_in(stage, predicted, labels)

    # --- predictions

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[Any]:
        """The number, or the list of numbers, of each text."""
        found = self.numbers(self(**without_targets(batch)).logits)
        numbers: list[Any] = (found.squeeze(-1) if self.n_targets == 1 else found).tolist()
        return numbers

    def predict(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], batch_size: int = 32, max_length: int | None = None
    ) -> list[Any]:
        """The number of each text; with ``n_targets`` above 1, the list of its numbers.

        Loads the weights if necessary. After a ZeRO-3 fit, call it on every rank.

        Args:
            texts: Texts, or pairs of texts.
            batch_size: Number of texts per forward pass. Default: 32.
            max_length: Maximum number of tokens; longer texts are truncated. None (default) uses the tokenizer's and
                the model's maximum, or 512 if neither has one.

        Raises:
            TypeError: If ``texts`` is a single string, or one of them is not a text or a pair of texts.
            ValueError: If ``max_length`` is more than the model takes, or a text has no tokens, or holds half of a
                surrogate pair.
        """
        return answers_to(self, texts, batch_size, max_length)


def _each(name: str, value: float | Sequence[float], n_targets: int) -> Tensor:
    """A setting as float64 [n_targets]: one number for all, or one for each."""
    numbers = [float(value)] * n_targets if isinstance(value, int | float) else [float(one) for one in value]
    if len(numbers) != n_targets or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be a finite number, or a list of n_targets={n_targets} of them, got {value}")
    return torch.tensor(numbers, dtype=torch.float64)
