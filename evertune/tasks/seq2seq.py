"""Sequence to sequence: summaries, translations, and other texts made from texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from evertune.metrics.texts import check_scorer, chrf, rouge_l
from evertune.sources.values import text_value
from evertune.tasks.base import IGNORED, Outputs
from evertune.tasks.generation import GenerationTask
from evertune.tasks.prompts import joined
from evertune.tasks.sequences import SequenceDataset, of_record, warn_about_length
from evertune.tasks.token_cache import TokenCache
from evertune.utils.examples import Examples, column_of

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from evertune._lightning import pl

Score = Literal["rouge_l", "chrf", "likelihood"]
_AT_ONCE = 1000  # texts that are tokenised together


class Seq2SeqTask(GenerationTask):
    """Texts that are made from other texts: a record has a source (``text``) and a target (``label``).

    Args:
        score: Score of a record: ``rouge_l`` (default) or ``chrf`` of the generated text against the target, or
            ``likelihood`` of the target, the geometric mean of the probabilities of its tokens, which needs no
            generation and is many times as fast.
        max_target_length: Maximum number of tokens of a target; longer ones are truncated, and how many is reported.
            Default: 128.

    Raises:
        ModuleNotFoundError: If ``chrf`` is chosen and sacreBLEU is not installed.
        ValueError: If an argument is out of range.
    """

    def __init__(self, score: Score = "rouge_l", max_target_length: int = 128) -> None:
        super().__init__()
        if score not in get_args(Score):
            raise ValueError(f"score must be one of {list(get_args(Score))}, got {score!r}")
        if max_target_length < 2:
            raise ValueError(f"max_target_length must be at least 2, got {max_target_length}")
        if score != "likelihood":
            check_scorer(score)
        self.scored_by, self.max_target_length = score, max_target_length

    def dataset(
        self,
        data: Examples,
        tokenizer: Any,
        *,
        text: str | tuple[str, str],
        label: str | None,
        id_column: str | None,
        max_length: int,
        cache: TokenCache | None = None,
    ) -> Dataset[dict[str, Any]]:
        """The examples of a split: ``input_ids`` of the source, ``labels`` of the target.

        Raises:
            ValueError: If there is no label, or a source or a target is empty, with the position of the record.
        """
        if label is None:
            raise ValueError("a source needs its target: pass label=, the name of the column that holds it")
        columns = [column_of(data, column) for column in ([text] if isinstance(text, str) else text)]
        sources, targets = [], []
        for number, (parts, target) in enumerate(zip(zip(*columns, strict=True), column_of(data, label), strict=True)):
            try:
                sources.append(joined([text_value(part) for part in parts]))
                targets.append(self.check_label(target))
            except ValueError as error:
                raise of_record(number, len(columns[0]), error) from None
        return SequenceDataset(
            lambda: self._tokens(sources, targets, tokenizer, max_length),
            None if id_column is None else column_of(data, id_column),
            cache,
            ([sources, targets, [str(self.max_target_length)]], tokenizer, max_length),
        )

    def outputs(self, module: pl.LightningModule, batch: Any) -> Outputs:
        """Logits and targets of a batch: each token of the target, given the source and those before it."""
        return Outputs(module(**batch).logits, batch.get("labels"), "categorical")

    def score(self, module: Any, batch: Any) -> Tensor:
        """The score of each text in [0, 1], float32 ``[batch]``; see ``score`` of the class. Call on every rank."""
        if self.scored_by == "likelihood":
            return super().score(module, batch)
        texts = module.generate(batch["input_ids"], batch["attention_mask"])
        measure = rouge_l if self.scored_by == "rouge_l" else chrf
        pairs = zip(texts, references(batch["labels"], module.tokenizer), strict=True)
        return torch.tensor([measure(text, reference) for text, reference in pairs], device=batch["labels"].device)

    def _tokens(
        self, sources: list[str], targets: list[str], tokenizer: Any, max_length: int
    ) -> dict[str, list[np.ndarray]]:
        read = _tokenised(sources, tokenizer, max_length, "sources")
        written = _tokenised(targets, tokenizer, self.max_target_length, "targets", as_target=True)
        for number, labels in enumerate(written):
            if not len(labels):
                raise of_record(number, len(written), ValueError("the tokenizer finds nothing in the target"))
        return {"input_ids": read, "labels": written}


def references(labels: Tensor, tokenizer: Any) -> list[str]:
    """The targets of a batch as texts."""
    tokens = [[token for token in row if token != IGNORED] for row in labels.tolist()]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _tokenised(
    texts: list[str], tokenizer: Any, max_length: int, what: str, as_target: bool = False
) -> list[np.ndarray]:
    """The tokens of texts, truncated before the end token, which is added to a target that has none."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    tokens: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        given = {"text_target": some} if as_target else {"text": some}
        for ids in tokenizer(**given, return_attention_mask=False, verbose=False)["input_ids"]:
            ended = ids if not ids or not as_target or end is None or ids[-1] == end else [*ids, end]
            lengths.append(len(ended))
            over = len(ended) > max_length
            tokens.append(np.asarray([*ended[: max_length - 1], ended[-1]] if over else ended, np.int32))
    warn_about_length(lengths, max_length, what)
    return tokens
