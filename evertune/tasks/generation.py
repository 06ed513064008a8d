"""What tasks whose answers are texts have in common: nothing in them is a class, and every record has a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from evertune.gate.predictions import Predictions
from evertune.sources.base import Row
from evertune.sources.values import text_value
from evertune.tasks.base import IGNORED, Change, Outputs, Task
from evertune.tasks.predicting import scores_of
from evertune.tasks.sequences import SequenceCollator

if TYPE_CHECKING:
    from evertune._lightning import pl


class GenerationTask(Task):
    """A task whose answers are texts. A subclass makes the examples (``dataset``) and the logits (``outputs``)."""

    tolerates: frozenset[Change] = frozenset({"rewrite", "hide"})

    def __init__(self) -> None:
        super().__init__("categorical")

    def label(self, example: Any) -> None:
        """None: an answer is not a class."""

    def label_names(self, value: Any) -> list[str]:
        """None: an answer is not a class."""
        return []

    def prompt_of(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """An example of the dataset without its answer: ``input_ids`` are what the model reads before it writes one."""
        return {name: value for name, value in example.items() if name != "labels"}

    def answered(self, prompt: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
        """The example of a prompt (:meth:`prompt_of`) and the tokens of an answer ``[tokens]``, its end included."""
        return {**prompt, "labels": answer}

    def check_label(self, value: Any) -> str:
        """The answer of a record: a text that is not empty.

        Raises:
            ValueError: If it is empty or not a text.
        """
        try:
            return text_value(value)
        except ValueError as error:
            raise ValueError(f"there is no answer to learn: {error}") from None

    def collator(self, tokenizer: Any) -> Callable[[list[Any]], Any]:
        """Pads to the right, with the end token if there is no padding token.

        Raises:
            ValueError: If the tokenizer has neither.
        """
        token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if token is None:
            raise ValueError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
        return SequenceCollator(token)

    def predict(
        self,
        module: Any,
        rows: Sequence[Row],
        *,
        text: str | Sequence[str],
        label: str | None,
        batch_size: int,
        max_length: int,
    ) -> Predictions:
        """The score of each record."""
        scores = np.empty(len(rows))
        if rows:
            pair = text if isinstance(text, str) else (text[0], text[1])
            data: Any = [dict(row["record"]) for row in rows]
            examples: Any = self.dataset(
                data, module.tokenizer, text=pair, label=label, id_column=None, max_length=max_length
            )
            order = np.argsort(-examples.lengths, kind="stable")
            for start in range(0, len(rows), batch_size):
                places = order[start : start + batch_size]
                scores[places] = scores_of(self, module, [examples[place] for place in places])
        labels = ["" if label is None else row["record"][label] for row in rows]
        return Predictions.scored([row["id"] for row in rows], labels, scores)

    def score(self, module: pl.LightningModule, batch: Any) -> Tensor:
        """The likelihood of each answer: the geometric mean of the probabilities of its tokens, float32 ``[batch]``.

        It is the exponential of the mean log-likelihood, the inverse of the perplexity, so that it lies in [0, 1].
        """
        return (-answer_losses(self.outputs(module, batch))).exp()


def answer_losses(outputs: Outputs) -> Tensor:
    """The mean negative log-likelihood of the tokens of each answer: float32 ``[batch]``.

    Only positions that count are turned into probabilities, which saves memory: a vocabulary has many tokens, and most
    positions of a prompt count for nothing.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)
        >>> answer_losses(Outputs(logits, torch.tensor([[-100, 2, 1]]), "categorical"))
        tensor([1.3863])
    """
    total, n_tokens = answer_sums(outputs)
    return total / n_tokens


def answer_sums(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of each answer, float32 ``[batch]``, and its number of tokens, ``[batch]``."""
    assert outputs.targets is not None
    counts, size = outputs.targets != IGNORED, len(outputs.logits)
    each = F.cross_entropy(outputs.logits[counts].float(), outputs.targets[counts], reduction="none")
    return each.new_zeros(size).index_add(0, counts.nonzero()[:, 0], each), counts.sum(1)
