"""Relation extraction: a pretrained transformer that classifies the relation between two marked entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evertune.lightning_modules.heads import initial_rows, with_rows
from evertune.lightning_modules.sequence_classification import SequenceClassificationModule
from evertune.metrics.relations import RelationCounts, relation_counts
from evertune.tasks.relation_extraction import MARKERS, RelationExtractionTask, Unit, shortened
from evertune.tasks.texts import longest_text, truncation_length
from evertune.utils.batches import targets_of


class RelationExtractionModule(SequenceClassificationModule):
    """A pretrained transformer that classifies the relation between two entities of a text.

    Markers around the entities become tokens of the model, and the relation is read from what it makes of the two that
    open them (Baldini Soares et al. 2019, the "entity start" representation). Everything else is
    :class:`SequenceClassificationModule`: relations are named classes that arrive over time, under ``labels``.

    Records are those of :class:`~evertune.tasks.RelationExtractionTask`; the score of a record is 1 if its relation is
    right, and 0 otherwise. Also logs ``val_f1`` and ``test_f1``, the micro-averaged F1 without the null relation
    (:func:`evertune.metrics.relation_f1`).

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        null_relation: Name of the class that stands for no relation; None if there is none. Default: "no_relation".
        entities: Fields with the spans of head and tail. Default: ``("head", "tail")``.
        unit: What the spans count: ``characters`` (default), or ``words`` of a text that is a list of them.
        **settings: Those of :class:`SequenceClassificationModule`, except ``multi_label`` and ``pooling``.

    Raises:
        ValueError: If an argument is out of range; the message names the allowed values.

    Example::

        module = RelationExtractionModule("bert-base-uncased")
        stream = class_incremental("relations.jsonl", label="relation", n_experiences=5, task=module.task)
        ContinualTrainer(max_epochs=3, callbacks=[Replay(memory_size=500)]).fit_stream(module, stream)
        module.predict([{"text": "Ada was born in London.", "head": [0, 3], "tail": [16, 22]}])
        # [{"relation": "born_in", "probability": 0.97}]
    """

    task: RelationExtractionTask

    def __init__(
        self,
        model_name_or_path: str,
        *,
        null_relation: str | None = "no_relation",
        entities: Sequence[str] = ("head", "tail"),
        unit: Unit = "characters",
        **settings: Any,
    ) -> None:
        for name, only in (("multi_label", False), ("pooling", "auto")):
            if settings.get(name, only) != only:
                raise ValueError(
                    f"{name}={settings[name]!r} is not for relations: a record has one, read from the markers of its "
                    f"entities; leave {name} out"
                )
        super().__init__(model_name_or_path, **settings)
        self.task = RelationExtractionTask(entities, unit)
        self.null_relation = null_relation
        self._counts: dict[str, Tensor] = {}

    # --- markers

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with the markers as tokens."""
        tokenizer = super().tokenizer
        tokenizer.add_tokens(list(MARKERS), special_tokens=True)  # no effect on those that it has
        return tokenizer

    def configure_head(self) -> None:
        """Give the markers their embeddings, and build the head."""
        table = self.backbone.get_input_embeddings()
        n_tokens = len(self.tokenizer)
        if n_tokens > table.num_embeddings:
            new = initial_rows(table.num_embeddings, n_tokens, table.embedding_dim)
            table.weight = with_rows(table.weight, new)
            table.num_embeddings = self.backbone.config.vocab_size = n_tokens
        self._openings = self.tokenizer.convert_tokens_to_ids(list(MARKERS[::2]))
        super().configure_head()

    @property
    def n_features(self) -> int:
        """Size of the features: those of both entities."""
        return 2 * super().n_features

    def pooled(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The hidden states of the two opening markers [batch, features]; of the first token without a marker."""
        rows = torch.arange(hidden.shape[0], device=hidden.device)  # len() would be a constant of an exported program
        places = [(inputs["input_ids"] == token).int().argmax(1) for token in self._openings]
        return torch.cat([hidden[rows, place] for place in places], 1)

    # --- evaluation

    def on_validation_epoch_start(self) -> None:
        """Count from 0."""
        self._counts = {}

    on_test_epoch_start = on_validation_epoch_start

    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        super()._evaluate(batch, stage)
        targets = targets_of(batch)
        said = self(**{key: value for key, value in batch.items() if value is not targets}).logits.argmax(1)
        names = [[self._classes[number] for number in numbers.tolist()] for numbers in (said, targets)]
        new = torch.tensor(relation_counts(names[0], names[1], self.null_relation), device=self.device)
        self._counts[stage] = self._counts.get(stage, torch.zeros_like(new)) + new

    def on_validation_epoch_end(self) -> None:
        """Log ``val_f1`` over all ranks."""
        self._log_f1("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test_f1`` over all ranks."""
        self._log_f1("test")

    def _log_f1(self, stage: str) -> None:
        if stage in self._counts:
            counts: Any = self.trainer.strategy.reduce(self._counts[stage], reduce_op="sum")
            self.log(f"{stage}_f1", RelationCounts(*counts.tolist()).f1, prog_bar=True)

    # --- predictions

    def predict(  # type: ignore[override]
        self, records: Sequence[Mapping[str, Any] | str], batch_size: int = 32, max_length: int | None = None
    ) -> list[dict[str, Any]]:
        """The most probable relation of each record.

        Loads the weights if necessary. After a ZeRO-3 fit, call it on every rank.

        Args:
            records: Records with a ``text`` and the spans of head and tail, as in training, without a label; or texts
                that are marked already, as :meth:`~evertune.tasks.RelationExtractionTask.marked` returns them.
            batch_size: Number of records per forward pass. Default: 32.
            max_length: Maximum number of tokens; longer texts are shortened around both entities. None (default) for
                the maximum of the tokenizer and the model.

        Returns:
            For each record ``relation``, the name, and ``probability``.

        Raises:
            TypeError: If a record is neither a mapping nor a text.
            ValueError: If a field or a marker is missing, a span is outside its text, or ``max_length`` is
                more than the model takes.
        """
        marked = [self._marked(record, number) for number, record in enumerate(records)]
        self.configure_model()
        length = truncation_length(max_length or longest_text(self.tokenizer), self.tokenizer, self)
        found = super().predict(shortened(marked, self.tokenizer, length), batch_size, length)
        return [dict(zip(("relation", "probability"), next(iter(one.items())), strict=True)) for one in found]

    def _marked(self, record: Any, number: int) -> str:
        """The marked text of a record."""
        if isinstance(record, str):
            if missing := [marker for marker in MARKERS if record.count(marker) != 1]:
                raise ValueError(f"records[{number}] must have each marker once, but not so {', '.join(missing)}")
            return record
        if not isinstance(record, Mapping):
            raise TypeError(f"records[{number}] must be a record with text, head and tail, got {record!r:.80}")
        try:
            checks = {"text": self.task.check_text, **self.task.fields}
            if missing := [name for name in checks if name not in record]:
                raise ValueError(f"it has no {', '.join(missing)}")
            checked = {name: check(record[name]) for name, check in checks.items()}
            self.task.check_fields([checked["text"]], None, checked)
        except ValueError as error:
            raise ValueError(f"records[{number}]: {error}") from None
        head, tail = self.task.entities
        return self.task.marked(checked["text"], checked[head], checked[tail])
