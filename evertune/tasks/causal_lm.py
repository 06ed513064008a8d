"""Causal language models: instructions, dialogues and plain texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from evertune.sources.conversations import conversation_in, messages_value
from evertune.sources.values import text_value
from evertune.tasks.base import IGNORED, Outputs, accuracies
from evertune.tasks.generation import GenerationTask
from evertune.tasks.prompts import Prompted, answered, conversation, document, joined
from evertune.tasks.sequences import SequenceDataset, of_record, warn_about_length
from evertune.tasks.token_cache import TokenCache
from evertune.utils.examples import Examples, column_of

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from evertune._lightning import pl

Score = Literal["likelihood", "exact_match"]
TooLong = Literal["truncate", "refuse"]
_AT_ONCE = 1000  # texts that are tokenised together


class CausalLMTask(GenerationTask):
    """Texts of which a causal language model learns all, or the answers.

    A record is one of three things:

    - **a prompt and its answer**, in the fields ``text`` and ``label``; two ``text`` fields, such as an instruction and
      its input, are joined by an empty line. They are put into the tokenizer's chat template as a turn of the user and
      one of the assistant; without a template, they are two lines, with the end token behind;
    - **a conversation**, with ``label=None``: ``text`` names the field with the messages, a list of ``{"role": ...,
      "content": ...}`` or the JSON text of one. It is put into the chat template, and all turns of the assistant are
      learned;
    - **a plain text**, with ``label=None``, which is learned as a whole: continued pretraining.

    Args:
        score: Score of a record: ``likelihood`` (default), the geometric mean of the probabilities of the answer's
            tokens, or ``exact_match``, whether greedy decoding would give the whole answer and then stop.
        too_long: What to do with more tokens than the maximum: ``truncate`` (default) drops the end of a plain text
            and the beginning of a prompt, so that the answer is kept; how many are truncated is reported. ``refuse``
            raises an error, by which an update puts the record aside.

    Raises:
        ValueError: If an argument has none of these values.
    """

    needs_label = False

    def __init__(self, score: Score = "likelihood", too_long: TooLong = "truncate") -> None:
        super().__init__()
        if score not in get_args(Score):
            raise ValueError(f"score must be one of {list(get_args(Score))}, got {score!r}")
        if too_long not in get_args(TooLong):
            raise ValueError(f"too_long must be one of {list(get_args(TooLong))}, got {too_long!r}")
        self.scored_by, self.too_long = score, too_long

    def check_text(self, value: Any) -> str:
        """A text that is not empty, or a conversation, as JSON text.

        Raises:
            ValueError: If it is neither, or the conversation has no answer.

        Example:
            >>> CausalLMTask().check_text([{"role": "assistant", "content": "Hello"}])
            '[{"role": "assistant", "content": "Hello"}]'
        """
        if isinstance(value, str):
            conversation_in(value)
            return text_value(value)
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return json.dumps(messages_value(value), ensure_ascii=False)
        return text_value(value)

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
        """The examples of a split: ``input_ids`` and ``labels``, -100 where nothing is learned.

        Raises:
            ValueError: If a record cannot be learned, with its position.
        """
        columns = [column_of(data, column) for column in ([text] if isinstance(text, str) else text)]
        answers = None if label is None else column_of(data, label)
        prompted: list[Prompted] = []
        for number, parts in enumerate(zip(*columns, strict=True)):
            try:
                prompted.append(self._prompted(parts, answers and answers[number : number + 1], tokenizer))
            except ValueError as error:
                raise of_record(number, len(columns[0]), error) from None
        key = [[one.text for one in prompted], [json.dumps(one[1:]) for one in prompted]]
        return SequenceDataset(
            lambda: self._tokens(prompted, tokenizer, max_length),
            None if id_column is None else column_of(data, id_column),
            cache,
            (key, tokenizer, max_length),
        )

    def prompt_of(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """An example without its answers: the tokens before the first of them, none of a text learned as a whole."""
        prompt = super().prompt_of(example)
        if "labels" in example:
            counts: Tensor = example["labels"] != IGNORED
            prompt["input_ids"] = example["input_ids"][: int(counts.int().argmax()) if counts.any() else None]
        return prompt

    def answered(self, prompt: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
        """The example of a prompt (:meth:`prompt_of`) and the tokens of an answer ``[tokens]``, its end included.

        Example:
            >>> import torch
            >>> CausalLMTask().answered({"input_ids": torch.tensor([5, 6])}, torch.tensor([7, 2]))
            {'input_ids': tensor([5, 6, 7, 2]), 'labels': tensor([-100, -100,    7,    2])}
        """
        read: Tensor = prompt["input_ids"]
        labels = torch.cat([torch.full_like(read, IGNORED), answer])
        return {**prompt, "input_ids": torch.cat([read, answer]), "labels": labels}

    def outputs(self, module: pl.LightningModule, batch: Any) -> Outputs:
        """Logits and targets of a batch: each position is scored on the next token."""
        logits = module(**{name: value for name, value in batch.items() if name != "labels"}).logits
        targets = batch["labels"][:, 1:] if "labels" in batch else None
        return Outputs(logits[:, :-1], targets, "categorical")

    def score(self, module: pl.LightningModule, batch: Any) -> Tensor:
        """The score of each answer in [0, 1], float32 ``[batch]``; see ``score`` of the class.

        An exact match needs no generation: greedy decoding gives the answer exactly if every token of the answer is
        the most probable one after those before it.
        """
        if self.scored_by == "exact_match":
            return (accuracies(self.outputs(module, batch)) == 1).float()
        return super().score(module, batch)

    def _prompted(self, parts: Sequence[Any], answer: Sequence[Any] | None, tokenizer: Any) -> Prompted:
        messages = conversation_in(parts[0]) if len(parts) == 1 else None
        if messages is not None:
            if answer is not None:
                raise ValueError("a conversation holds its answers itself: leave the label out (label=None)")
            return conversation(messages, tokenizer)
        texts = [text_value(part) for part in parts]
        if answer is None:
            return document(joined(texts), tokenizer)
        return answered(joined(texts), self.check_label(answer[0]), tokenizer)

    def _tokens(self, prompted: Sequence[Prompted], tokenizer: Any, max_length: int) -> dict[str, list[np.ndarray]]:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token stands for, so the answers cannot "
                "be found: load a fast tokenizer"
            )
        found: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
        lengths: list[int] = []
        for start in range(0, len(prompted), _AT_ONCE):
            some = prompted[start : start + _AT_ONCE]
            encoded = tokenizer(
                [one.text for one in some],
                add_special_tokens=not some[0].templated,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for number, one in enumerate(some):
                ids, offsets = np.asarray(encoded["input_ids"][number]), np.asarray(encoded["offset_mapping"][number])
                lengths.append(len(ids))
                labels = np.where(_within(offsets.reshape(-1, 2), one.answers), ids, IGNORED)
                try:
                    kept = self._kept(labels, max_length, whole=one.answers[0][0] == 0)
                    if not (labels[kept][1:] != IGNORED).any():
                        raise ValueError(f"of {len(ids)} tokens, none is left to be learned")
                except ValueError as error:
                    raise of_record(start + number, len(prompted), error) from None
                found["input_ids"].append(ids[kept])
                found["labels"].append(labels[kept])
        warn_about_length(lengths, max_length)
        return found

    def _kept(self, labels: np.ndarray, max_length: int, whole: bool) -> slice:
        """The tokens that are kept: the last ones, but at least half of them are the context of the last answer."""
        n = len(labels)
        if n > max_length and self.too_long == "refuse":
            raise ValueError(f'the text has {n} tokens, more than max_length={max_length} (too_long="refuse")')
        if whole or n <= max_length:
            return slice(0, max_length)
        counts = labels != IGNORED
        last = int(np.flatnonzero(counts & ~np.roll(counts, 1))[-1])  # where the last answer starts
        start = max(0, min(n - max_length, last - max_length // 2))
        return slice(start, start + max_length)


def _within(offsets: np.ndarray, answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens stand for characters of an answer, bool ``[tokens]``."""
    inside = np.zeros(len(offsets), bool)
    for start, end in answers:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return inside
