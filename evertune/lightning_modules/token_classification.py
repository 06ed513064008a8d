"""Entities of named types that arrive over time, as tags of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evertune._lightning import rank_zero_warn
from evertune.callbacks.training_data import TrainingData
from evertune.lightning_modules.backbone import pool
from evertune.lightning_modules.heads import LinearHead
from evertune.lightning_modules.imbalance import (
    ClassWeights,
    Loss,
    balanced_weights,
    check_imbalance,
    weighted_losses,
)
from evertune.lightning_modules.named_classes import NamedClassesModule
from evertune.lightning_modules.saving import gathered
from evertune.lightning_modules.sequence_classification import HEAD_DROPOUT
from evertune.metrics.entities import OUTSIDE, EntityScores, Scheme, entities_in
from evertune.tasks.base import IGNORED
from evertune.tasks.texts import longest_text, truncation_length
from evertune.tasks.token_classification import TokenClassificationTask, entities_of_batch
from evertune.tasks.well_formed import best_tags
from evertune.tasks.words import Span, first_pieces, tags_of_words, words_between_spaces, words_in
from evertune.utils.batches import TARGET_KEYS, targets_of, without_targets
from evertune.utils.evaluation import evaluation_mode


class TaggerOutput(NamedTuple):
    """The output of a tagger for a batch.

    Args:
        logits: Logits [batch, tokens, tags], in the order of ``module.tags``.
        features: Tokens [batch, tokens, features], the input of the head; with ``text_features``, twice as many.
    """

    logits: Tensor
    features: Tensor


class TokenClassificationModule(NamedClassesModule):
    """A pretrained transformer that finds entities: which words belong to one, and of which type it is.

    Its interface is the names of types, not numbers. The first token of a word carries the word's tag: ``O``, or
    ``B-TYPE`` and ``I-TYPE`` for the first and the other words of an entity; other tokens do not count. A batch is the
    output of a tokenizer, with the tags under ``labels``: a list for each text, of one tag for each of its tokens,
    which is empty where it does not count. (A tensor of numbers [batch, tokens] passes through.)
    :class:`~evertune.tasks.TokenClassificationTask` makes such batches of records. The head has one row for ``O`` and
    two for each type. New types append rows, and the old ones stay bit-identical.

    An experience labels its own types only, so that entities of older ones are ``O`` in it:
    :class:`~evertune.callbacks.PseudoLabels` keeps the model from unlearning them.

    Logs ``train_loss``, and for validation and test the loss and ``precision``, ``recall`` and ``f1`` of the entities:
    ``val_f1``, ``test_f1``, ... They are over all entities of an epoch, each right if its words and its type are.

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
            Its tokenizer must be a fast one.
        classes: Types of entities known so far, in the order of the head's rows. Default: none.
        scheme: What the tags of records are: ``IOB2`` (default) or ``BIOES``. The model's own tags are IOB2.
        n_classes_ahead: Number of types for which rows are allocated from the start. Default: None.
        loss: ``cross_entropy`` (default), or ``focal``: words that the model is sure of, most of them ``O``, count less
            (Lin et al. 2017), see :func:`~evertune.lightning_modules.imbalance.weighted_losses`. Only in training:
            ``val_loss`` and ``test_loss`` are always cross-entropy without weights, so that they compare.
        focal_gamma: Exponent of the focal loss, positive. Default: 2, as in the paper.
        class_weights: Weights of the words of each type in the training loss: ``balanced``, with which all types and
            ``O`` count alike however often the batches of an update have them, new and replayed texts together; or a
            mapping of types (and ``O``) to positive numbers, 1 for the others. Default: None.
        text_features: Whether the head reads, beside each token, the mean of the text's tokens (Liu et al. 2019, "GCDT:
            A Global Context Enhanced Deep Transition Architecture for Sequence Labeling"): what a text is about says
            which of similar types it may have, such as writers and scientists. Default: False.
        **settings: Those of :class:`TransformerModule`, such as ``learning_rate``. ``dropout`` is also the head's (by
            default 0.1).

    Raises:
        ValueError: If an argument is out of range; the message names the allowed values. When ``fit`` starts, with
            ``balanced``, if the tags of the training data are not known before training.

    Example::

        module = TokenClassificationModule("bert-base-cased", classes=["ORG", "LOC"])
        trainer = pl.Trainer(max_epochs=3)
        trainer.fit(module, datamodule)
        module.predict(["Ada flew to Paris."])
        # [[{"start": 12, "end": 17, "label": "LOC", "text": "Paris", "score": 0.98}]]
        module.add_classes(["PER"])  # the next fit learns it too
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        classes: Sequence[str] = (),
        scheme: Scheme = "IOB2",
        n_classes_ahead: int | None = None,
        loss: Loss = "cross_entropy",
        focal_gamma: float = 2.0,
        class_weights: ClassWeights | None = None,
        text_features: bool = False,
        **settings: Any,
    ) -> None:
        check_imbalance(loss, focal_gamma, class_weights)
        super().__init__(model_name_or_path, **settings)
        self.task = TokenClassificationTask(scheme)
        self.gamma = focal_gamma if loss == "focal" else 0.0
        self.class_weights = class_weights
        self._weights = dict(class_weights) if isinstance(class_weights, Mapping) else {}  # in this fit
        self._counts: dict[str, Tensor] = {}
        self.text_features = text_features
        self._start_classes(classes, n_classes_ahead)

    # --- the model

    @property
    def tags(self) -> list[str]:
        """The tags, in the order of the logits."""
        return [OUTSIDE, *(f"{prefix}-{name}" for name in self._classes for prefix in "BI")]

    def _rows_of(self, n_classes: int) -> int:
        return 1 + 2 * n_classes

    def configure_head(self) -> None:
        """Build the head: a row for ``O``, and two for each type."""
        self.head_dropout = nn.Dropout(HEAD_DROPOUT if self.dropout is None else self.dropout)
        size = self.backbone.config.hidden_size
        self.head = LinearHead(2 * size if self.text_features else size, self.n_rows)

    def forward(self, **inputs: Any) -> TaggerOutput:
        """Scores of the tags of each token: ``module(input_ids=..., attention_mask=...)``."""
        features = self.encode(**inputs).last_hidden_state
        if self.text_features:
            whole = pool(features, inputs.get("attention_mask"), "mean").unsqueeze(1)
            features = torch.cat([features, whole.expand_as(features)], -1)
        logits = self.head(self.head_dropout(features))
        # Rows allocated ahead are cut off, so they neither take part in the softmax nor get gradients.
        return TaggerOutput(logits[..., : self._rows_of(len(self._classes))], features)

    # --- labels

    def encode_labels(self, labels: Sequence[Sequence[str]], mask: Tensor) -> Tensor:
        """The tags of tokens as a target tensor, int64 ``[batch, tokens]``; -100 where there is none.

        Args:
            labels: The tags of each text's tokens, without padding.
            mask: Attention mask ``[batch, tokens]``, on either side of which there may be padding.

        Raises:
            ValueError: If a tag is of an unknown type, or a text has another number of tags than of tokens.
        """
        numbers = {tag: number for number, tag in enumerate(self.tags)} | {"": IGNORED}
        target = torch.full(mask.shape, IGNORED)
        for row, tags in enumerate(labels):
            unknown = [tag for tag in tags if tag not in numbers]
            if unknown:
                raise ValueError(
                    f"unknown tag {unknown[0]!r}: the types are {self._classes}; call "
                    f"add_classes([{unknown[0].partition('-')[2]!r}]) before fit"
                )
            there = mask[row].bool()
            if len(tags) != int(there.sum()):
                raise ValueError(f"a text has {len(tags)} tags for {int(there.sum())} tokens")
            target[row, there.cpu()] = torch.tensor([numbers[tag] for tag in tags])
        return target

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Replace tags with target tensors."""
        if not isinstance(batch, Mapping):
            return batch
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        named = {key: batch[key] for key in TARGET_KEYS if key in batch and not isinstance(batch[key], Tensor)}
        return {**batch, **{key: self.encode_labels(labels, mask) for key, labels in named.items()}}

    # --- steps

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the texts in fp32; that of a text is the mean cross-entropy of its tokens that count.

        Texts of all lengths count alike, so that the loss does not depend on how they are divided among batches and
        ranks.
        """
        each = F.cross_entropy(logits.float().movedim(-1, 1), targets, ignore_index=IGNORED, reduction="none")
        return _mean_of_texts(each, targets)

    def training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the texts to train on: :meth:`loss`, focal or with weights if the settings say so."""
        if not self.gamma and self.class_weights is None:
            return self.loss(logits, targets)
        types = [tag.partition("-")[2] or tag for tag in self.tags]
        weights = torch.tensor([float(self._weights.get(name, 1.0)) for name in types], device=logits.device)
        counted = targets != IGNORED
        each = torch.zeros(targets.shape, device=logits.device)
        each[counted] = weighted_losses(logits[counted], targets[counted], weights=weights, gamma=self.gamma)
        return _mean_of_texts(each, targets)

    def on_train_start(self) -> None:
        """Weigh the types of this fit, and report weights of types that do not exist."""
        super().on_train_start()
        if self.class_weights == "balanced":
            shares = TrainingData(self.trainer, "class_weights='balanced'").class_shares(self._shares_of_types)
            self._weights = dict(zip([OUTSIDE, *self._classes], balanced_weights(shares).tolist(), strict=True))
        elif unknown := [name for name in self._weights if name not in (*self._classes, OUTSIDE)]:
            rank_zero_warn(f"class_weights has {unknown}, which are not among the types yet: {self._classes}")

    def _shares_of_types(self, targets: Tensor) -> Tensor:
        """The share of ``O`` and of each type among the words of each text, float64 ``[batch, 1 + types]``."""
        counts = targets != IGNORED
        types = torch.where(counts, (targets + 1) // 2, 0)  # the rows of a type are next to each other
        words = F.one_hot(types, 1 + len(self._classes)).double() * counts.unsqueeze(-1)
        return words.sum(1) / counts.sum(1, keepdim=True).clamp(min=1)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch, logged as ``train_loss``."""
        targets = targets_of(batch)
        loss = self.training_loss(self(**without_targets(batch)).logits, targets)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val_loss``; the entities are counted for the end of the epoch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test_loss``; the entities are counted for the end of the epoch."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log ``val_precision``, ``val_recall`` and ``val_f1`` over all ranks."""
        self._log_entities("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test_precision``, ``test_recall`` and ``test_f1`` over all ranks."""
        self._log_entities("test")

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        targets = targets_of(batch)
        logits = self(**without_targets(batch)).logits
        loss = self.loss(logits, targets)
        self.log(f"{stage}_loss", loss, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(targets))
        gold, said = (
            {(row, *entity) for row, entities in enumerate(texts) for entity in entities}
            for texts in entities_of_batch(self, logits, targets)
        )
        counts = torch.tensor([len(gold & said), len(said), len(gold)], dtype=torch.float64, device=self.device)
        self._counts[stage] = self._counts.get(stage, 0) + counts

    def _log_entities(self, stage: str) -> None:
        counts = self._counts.pop(stage, None)
        if counts is None:
            return
        total = self.trainer.strategy.reduce(counts, reduce_op="sum")
        n_right, n_predicted, n_gold = (int(count) for count in total.tolist())
        scores = EntityScores(n_right, n_predicted, n_gold)
        values = {f"{stage}_{name}": getattr(scores, name) for name in ("precision", "recall", "f1")}
        self.log_dict(values, prog_bar=True, sync_dist=True)  # equal on all ranks already

    # --- predictions

    def predict(
        self, texts: Sequence[str] | Sequence[Sequence[str]], batch_size: int = 32, max_length: int | None = None
    ) -> list[list[dict[str, Any]]]:
        """The entities of each text, in order.

        Loads the weights if necessary. After a ZeRO-3 fit, call it on every rank.

        Args:
            texts: Texts, or lists of words, which are joined by spaces.
            batch_size: Number of texts per forward pass. Default: 32.
            max_length: Maximum number of tokens; longer texts are truncated, with a warning that counts them. None
                (default) uses the tokenizer's and the model's maximum, or 512 if neither has one.

        Returns:
            For each text a list of entities: ``start`` and ``end`` (excluded) in characters, ``label``, ``text``, and
            ``score``, the least of the probabilities of its words' tags.

        Raises:
            TypeError: If ``texts`` is a single string, or one of them is neither a text nor a list of words.
            ValueError: If ``max_length`` is more than the model takes, or a text is empty.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list; for one text pass [text]")
        for number, text in enumerate(texts):
            if not isinstance(text, str | list | tuple):
                raise TypeError(f"texts[{number}] must be a text or a list of words, got {text!r:.80}")
        split = [words_in if isinstance(text, str) else words_between_spaces for text in texts]
        plain = [self.task.check_text(text) for text in texts]
        self.configure_model()
        length = truncation_length(max_length or longest_text(self.tokenizer), self.tokenizer, self)
        found: list[list[dict[str, Any]]] = []
        n_cut = 0
        with evaluation_mode(self), gathered(self), torch.inference_mode():
            for start in range(0, len(plain), batch_size):
                some = plain[start : start + batch_size]
                batch = self.tokenizer(
                    some,
                    truncation=True,
                    max_length=length,
                    padding=True,
                    return_offsets_mapping=True,
                    return_tensors="pt",
                )
                places = batch.pop("offset_mapping").tolist()
                logits = self(**batch.to(self.device)).logits.float().log_softmax(-1).cpu()
                words = [split[start + row](text) for row, text in enumerate(some)]
                first = [first_pieces(*one) for one in zip(some, words, places, strict=True)]
                heads = [[piece for piece in row if piece is not None] for row in first]
                tags = best_tags([logits[row, pieces] for row, pieces in enumerate(heads)], self.tags)
                for row, text in enumerate(some):
                    read = max((last for _, last in places[row]), default=0)
                    n_cut += bool(words[row]) and words[row][-1][0] >= read
                    tag_of = dict(zip(heads[row], tags[row], strict=True))
                    found.append(self._entities(text, words[row], first[row], tag_of, logits[row], read))
        if n_cut:
            rank_zero_warn(
                f"{n_cut} of {len(plain)} texts have more than {length} tokens: no entity is found after them; divide "
                "the texts"
            )
        return found

    def _entities(
        self, text: str, words: list[Span], first: list[int | None], tag_of: dict[int, str], logits: Tensor, read: int
    ) -> list[dict[str, Any]]:
        """The entities of one text, from the tags of the first tokens of its words and the log-probabilities of all."""
        numbers, found = {tag: number for number, tag in enumerate(self.tags)}, []
        for entity in entities_in(tags_of_words(words, first, tag_of, read)):
            start, end = words[entity.start][0], words[entity.end - 1][1]
            sure = [
                float(logits[n, numbers[tag_of[n]]].exp()) for n in first[entity.start : entity.end] if n is not None
            ]
            found.append(
                {"start": start, "end": end, "label": entity.type, "text": text[start:end], "score": min(sure)}
            )
        return found


def _mean_of_texts(each: Tensor, targets: Tensor) -> Tensor:
    """The mean over the texts of the mean loss of the tokens of each that count."""
    return (each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)).mean()
