"""Text classification with named classes that arrive over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evertune._lightning import rank_zero_warn
from evertune.callbacks.logit_adjustment import LogitAdjustment
from evertune.callbacks.training_data import TrainingData
from evertune.lightning_modules.answering import answers_to
from evertune.lightning_modules.backbone import POOLINGS, Attention, Pooling, pool, resolve_pooling
from evertune.lightning_modules.heads import HEADS, HeadKind
from evertune.lightning_modules.imbalance import (
    ClassWeights,
    Loss,
    balanced_weights,
    check_imbalance,
    weighted_losses,
)
from evertune.lightning_modules.named_classes import NamedClassesModule
from evertune.lightning_modules.schedule import Schedule
from evertune.tasks.sequence_classification import SequenceClassificationTask
from evertune.utils.batches import TARGET_KEYS, targets_of, without_targets

HEAD_DROPOUT = 0.1


class ClassifierOutput(NamedTuple):
    """The output of a classifier for a batch.

    Args:
        logits: Logits [batch, classes], in the order of ``module.classes``.
        features: Pooled texts [batch, features], the input of the head.
    """

    logits: Tensor
    features: Tensor


class SequenceClassificationModule(NamedClassesModule):
    """A pretrained transformer that classifies texts, with exactly one label or several labels each.

    Its interface is label names, not numbers. A batch is the output of a tokenizer, with the names under ``labels``: a
    list of names, or with ``multi_label`` a list of lists of names. (Tensors pass through: class numbers, or rows of 0
    and 1.) The head has one row per class. New classes append rows, the old ones stay bit-identical, and the loss is
    over the classes named so far. ``ContinualTrainer``, or a datamodule with an ``experience``, names them before each
    fit.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``test_loss`` and ``test_accuracy`` (multi-label: a text is
    correct if all its labels are).

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        classes: Names of the classes known so far, in the order of the head's rows. Default: none.
        head: ``linear`` (default), or ``cosine`` (:class:`~evertune.lightning_modules.CosineHead`), which does not
            favour the newest classes, and whose rows :class:`~evertune.callbacks.Imprinting` can set.
        multi_label: Whether a text has any number of labels (sigmoids) instead of exactly one (softmax). Default:
            False.
        label_smoothing: Share of the target, in [0, 1), that is spread over all classes (Szegedy et al., 2016).
            Default: 0.
        loss: ``cross_entropy`` (default), or ``focal``: examples that the model is sure of count less (Lin et al.
            2017), see :func:`~evertune.lightning_modules.imbalance.weighted_losses`. Only in training: ``val_loss`` and
            ``test_loss`` are always cross-entropy without weights, so that they compare.
        focal_gamma: Exponent of the focal loss, positive. Default: 2, as in the paper.
        class_weights: Weights of the classes in the training loss: ``balanced``, with which all classes count alike
            however often the batches of an update have them, new and replayed examples together; or a mapping of names
            to positive weights, 1 for the others. With ``multi_label``, those of texts that have the label. Default:
            None.
        pooling: ``mean`` over the tokens, ``cls`` (the first one) or ``last``. ``auto`` (default) is ``last`` for a
            model that only reads left to right, and ``mean`` for the others.
        n_classes_ahead: Number of rows allocated from the start, so that the head keeps its shape until there are more
            classes; rows without a name are not used. Default: None.
        learning_rate: Peak learning rate of AdamW; None (default) chooses it by the size of the transformer, see
            :class:`TransformerModule`, and halves it for a cosine head, which leaves the encoder less to change.
        head_learning_rate: Peak learning rate of the head. None (default): the same.
        weight_decay: Weight decay of AdamW; biases and norms are exempt. Default: 0.01.
        warmup_ratio: Share of an update's steps used for the warm-up. Default: 0.1.
        schedule: ``linear`` (default), ``cosine``, ``infinite`` or ``constant``, see :class:`TransformerModule`.
        final_ratio: Share of the peak at which an update ends, and from which the next one warms up. Default: 0.
        cooldown_ratio: Share of an update's steps used for the cool-down of ``infinite``. Default: 0.2.
        unfreeze_ratio: Share of an update's steps over which the layers join the training from top to bottom, see
            :class:`TransformerModule`. Default: 0, all from the first step.
        layer_decay: Factor of the learning rate from each layer of the transformer to the one below it. Default: 1.
        freeze_layers: 0 (default) trains everything, n freezes the embeddings and the first n layers, -1 everything but
            the head.
        freeze_word_embeddings: Whether to freeze the word embeddings. Default: False.
        dropout: Replaces every dropout probability, including the head's (0.1); None (default) keeps them.
        attention: ``auto`` (default), ``sdpa`` or ``eager``, see :class:`TransformerModule`.
        peft: Adapters to train instead of the transformer, such as ``{"method": "lora", "r": 8}``, see
            :class:`TransformerModule`. Default: None, none.

    Raises:
        ValueError: If an argument is out of range; the message names the allowed values. When ``fit`` starts, if there
            are ``class_weights`` and a :class:`~evertune.callbacks.LogitAdjustment`, which corrects for the same; with
            ``balanced``, if the classes of the training data are not known before training.

    Example::

        module = SequenceClassificationModule("bert-base-uncased", classes=["business", "sport"])
        trainer = pl.Trainer(max_epochs=3)
        trainer.fit(module, datamodule)
        module.predict(["Shares fell after the merger."])  # [{"business": 0.98, "sport": 0.02}]
        module.add_classes(["politics"])  # the next fit learns it too
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        classes: Sequence[str] = (),
        head: HeadKind = "linear",
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        loss: Loss = "cross_entropy",
        focal_gamma: float = 2.0,
        class_weights: ClassWeights | None = None,
        pooling: Pooling = "auto",
        n_classes_ahead: int | None = None,
        learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        schedule: Schedule = "linear",
        final_ratio: float = 0.0,
        cooldown_ratio: float = 0.2,
        freeze_layers: int = 0,
        unfreeze_ratio: float = 0.0,
        layer_decay: float = 1.0,
        freeze_word_embeddings: bool = False,
        dropout: float | None = None,
        attention: Attention = "auto",
        peft: dict[str, Any] | None = None,
    ) -> None:
        if head not in get_args(HeadKind):
            raise ValueError(f"head must be one of {list(get_args(HeadKind))}, got {head!r}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {list(POOLINGS)}, got {pooling!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        check_imbalance(loss, focal_gamma, class_weights)
        super().__init__(
            model_name_or_path,
            learning_rate=learning_rate,
            head_learning_rate=head_learning_rate,
            weight_decay=weight_decay,
            warmup_ratio=warmup_ratio,
            schedule=schedule,
            final_ratio=final_ratio,
            cooldown_ratio=cooldown_ratio,
            freeze_layers=freeze_layers,
            unfreeze_ratio=unfreeze_ratio,
            layer_decay=layer_decay,
            freeze_word_embeddings=freeze_word_embeddings,
            dropout=dropout,
            attention=attention,
            peft=peft,
        )
        self.head_kind = head
        self._head_ignores_norms = head == "cosine"
        self.multi_label = multi_label
        self.task = SequenceClassificationTask(multi_label)
        self.label_smoothing = label_smoothing
        self.loss_kind = loss
        self.focal_gamma = focal_gamma
        self.class_weights = class_weights
        self._weights: Tensor | None = None  # of the classes, in this fit
        self.pooling = pooling
        self._start_classes(classes, n_classes_ahead)

    # --- the model

    def configure_head(self) -> None:
        """Build the head, with one row per class or per allocated row, whichever are more."""
        self._pooling = resolve_pooling(self.pooling, self.backbone.config)
        self.head_dropout = nn.Dropout(HEAD_DROPOUT if self.dropout is None else self.dropout)
        self.head = HEADS[self.head_kind](self.n_features, self.n_rows)

    @property
    def n_features(self) -> int:
        """Size of the features of a text, the input of the head."""
        return int(self.backbone.config.hidden_size)

    def pooled(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The features of texts [batch, features], of their hidden states [batch, tokens, hidden size]."""
        return pool(hidden, inputs.get("attention_mask"), self._pooling)

    def default_learning_rate(self) -> float:
        """The peak learning rate where none was given: half of the usual one with a cosine head.

        Rows that start as class means are right from the first step, and the encoder need not be pulled about for them.
        """
        return super().default_learning_rate() / (2 if self.head_kind == "cosine" else 1)

    def forward(self, **inputs: Any) -> ClassifierOutput:
        """Class scores of a batch of tokenised texts: ``module(input_ids=..., attention_mask=...)``."""
        hidden = self.encode(**inputs).last_hidden_state
        features = self.pooled(hidden, inputs)
        logits = self.head(self.head_dropout(features))
        # Rows allocated ahead are cut off, so they neither take part in the softmax nor get gradients.
        return ClassifierOutput(logits[:, : len(self._classes)], features)

    def features(self, batch: Mapping[str, Any]) -> Tensor:
        """The pooled texts of a batch [batch, features], used by herding and drift detectors."""
        output: ClassifierOutput = self(**without_targets(batch))
        return output.features

    # --- labels

    def encode_labels(self, labels: Sequence[Any]) -> Tensor:
        """Label names as a target tensor: class numbers [batch], or with ``multi_label`` 0 and 1 [batch, classes].

        Raises:
            ValueError: If a name is not a class, if an example has a list of names without ``multi_label``, or a single
                name with it.
        """
        if self.multi_label:
            target = torch.zeros(len(labels), len(self._classes))
            for row, names in enumerate(labels):
                if isinstance(names, str):
                    raise ValueError(f"multi_label=True expects a list of names for each example, got {names!r}")
                for name in names:
                    target[row, self._number(name)] = 1.0
            return target
        return torch.tensor([self._number(name) for name in labels])

    def _number(self, name: Any) -> int:
        if isinstance(name, list | tuple):
            raise ValueError(f"an example has the labels {name}; use multi_label=True for more than one label each")
        try:
            return self._classes.index(name)
        except ValueError:
            raise ValueError(
                f"unknown label {name!r}: the classes are {self._classes}; call add_classes([{name!r}]) before fit"
            ) from None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Replace label names with target tensors."""
        if not isinstance(batch, Mapping):
            return batch
        named = {key: batch[key] for key in TARGET_KEYS if key in batch and not isinstance(batch[key], Tensor)}
        return {**batch, **{key: self.encode_labels(labels) for key, labels in named.items()}}

    # --- steps

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch in fp32: cross-entropy, or binary cross-entropy per class with ``multi_label``."""
        if not self.multi_label:
            return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
        smooth = targets.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits.float(), smooth)

    def training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch to train on: :meth:`loss`, focal or with weights if the settings say so."""
        focal = self.loss_kind == "focal"
        if not focal and self._weights is None:
            return self.loss(logits, targets)
        return weighted_losses(
            logits,
            targets,
            weights=self._weights,
            gamma=self.focal_gamma if focal else 0.0,
            label_smoothing=self.label_smoothing,
        ).mean()

    def setup(self, stage: str) -> None:
        """Add the classes of the datamodule's experience, and check that nothing is corrected twice."""
        super().setup(stage)
        adjusted = any(isinstance(one, LogitAdjustment) for one in self.trainer.callbacks)  # type: ignore[attr-defined]
        if stage == "fit" and self.class_weights is not None and adjusted:
            raise ValueError(
                "class_weights and LogitAdjustment both correct for the numbers of examples of the classes; use one of "
                "them"
            )

    def on_train_start(self) -> None:
        """Weigh the classes of this fit."""
        super().on_train_start()
        self._weights = self._weights_of_classes()

    def _weights_of_classes(self) -> Tensor | None:
        if self.class_weights is None:
            return None
        weights = torch.ones(len(self._classes), dtype=torch.float64)
        if isinstance(self.class_weights, Mapping):
            if unknown := [name for name in self.class_weights if name not in self._classes]:
                rank_zero_warn(f"class_weights has {unknown}, which are not among the classes yet: {self._classes}")
            weights = torch.tensor([float(self.class_weights.get(name, 1.0)) for name in self._classes])
        else:
            balanced = balanced_weights(
                TrainingData(self.trainer, "class_weights='balanced'").class_shares(), self.multi_label
            )
            weights[: len(balanced)] = balanced
        return weights.float().to(self.device)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch, logged as ``train_loss``."""
        targets = targets_of(batch)
        loss = self.training_loss(self(**without_targets(batch)).logits, targets)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val_loss`` and ``val_accuracy`` over all ranks."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test_loss`` and ``test_accuracy`` over all ranks."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        targets = targets_of(batch)
        logits = self(**without_targets(batch)).logits
        right = ((logits > 0) == targets.bool()).all(1) if self.multi_label else logits.argmax(1) == targets
        values = {f"{stage}_loss": self.loss(logits, targets), f"{stage}_accuracy": right.float().mean()}
        self.log_dict(values, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(targets))

    # --- predictions

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, float]]:
        """The probability of each class for each text, most probable first."""
        logits = self(**without_targets(batch)).logits.float()
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        return [
            dict(sorted(zip(self._classes, row, strict=True), key=lambda item: -item[1]))
            for row in probabilities.tolist()
        ]

    def predict(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], batch_size: int = 32, max_length: int | None = None
    ) -> list[dict[str, float]]:
        """The probability of each class for each text, most probable first.

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
