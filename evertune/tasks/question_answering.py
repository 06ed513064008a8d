"""Extractive question answering: the answer is a span of the context, or there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evertune.metrics.answers import answer_f1
from evertune.sources.values import text_value
from evertune.tasks.base import Change, Outputs, Task
from evertune.tasks.texts import padding_token
from evertune.tasks.token_cache import TokenCache
from evertune.tasks.windows import KINDS, WindowCollator, WindowedDataset, targets_in, unstacked

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from evertune._lightning import pl

_SHOWN = 40  # characters of a text in a message


class QuestionAnsweringTask(Task):
    """Questions about a context, answered by a span of it (Rajpurkar et al. 2016), or by "there is none" (2018).

    A record has two texts, the question and the context, and for a label the right answers, as in SQuAD:
    ``{"text": ["Rome"], "answer_start": [17]}``, or ``[{"text": "Rome", "answer_start": 17}]``. ``answer_start`` counts
    characters. Without answers (``[]``), the question has none in this context.

    The score of a record is the F1 of its answer's words (:func:`evertune.metrics.answer_f1`). Exact match is 0 or 1,
    and 0 also for an answer that lacks a word; F1 differs less from one update to the next for no reason, so that the
    gate sees a real change in fewer records.

    Args:
        stride: Number of context tokens that consecutive windows share. An answer of up to this length is always in one
            window as a whole. Default: 32.
        max_answer_tokens: Longest answer, in tokens, that is considered. Default: 30, as for BERT (Devlin et al. 2019).
        no_answer_threshold: Log-odds against "no answer" that an answer must exceed. Default: 0, the more probable of
            the two.

    Raises:
        ValueError: If ``stride`` is negative or ``max_answer_tokens`` is not positive.

    Example:
        >>> task = QuestionAnsweringTask()
        >>> task.check_label([{"text": "Rome", "answer_start": 17}])
        {'text': ['Rome'], 'answer_start': [17]}
        >>> task.check_record(["Where?", "She was born in a town"], {"text": ["Rome"], "answer_start": [16]})
        Traceback (most recent call last):
        ValueError: the answer 'Rome' is not in its context, which has 'a to' at answer_start=16
    """

    fixed_classes = False
    tolerates: frozenset[Change] = frozenset()
    example = ("Who found it?", "Ann found it.")

    def __init__(self, stride: int = 32, max_answer_tokens: int = 30, no_answer_threshold: float = 0.0) -> None:
        super().__init__("categorical")
        if stride < 0:
            raise ValueError(f"stride must not be negative, got {stride}")
        if max_answer_tokens < 1:
            raise ValueError(f"max_answer_tokens must be positive, got {max_answer_tokens}")
        self.stride = stride
        self.max_answer_tokens = max_answer_tokens
        self.no_answer_threshold = no_answer_threshold

    # --- records

    def check_label(self, value: Any) -> dict[str, list[Any]]:
        """The right answers as ``{"text": [...], "answer_start": [...]}``; both lists are empty if there is none.

        Raises:
            ValueError: If they are in neither form of SQuAD, or an answer is empty.
        """
        if isinstance(value, Mapping):
            texts, starts = _listed(value.get("text")), _listed(value.get("answer_start"))
        elif isinstance(value, Sequence) and all(isinstance(one, Mapping) for one in value):
            texts, starts = [one.get("text") for one in value], [one.get("answer_start") for one in value]
        else:
            texts = starts = None
        if texts is None or starts is None or len(texts) != len(starts):
            raise ValueError(
                'the answers must be {"text": [...], "answer_start": [...]} or a list of {"text": ..., "answer_start": '
                f"...}}, empty for a question without an answer; got {value!r:.80}"
            )
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"an answer must be a text that is not empty, got {text!r:.80}; write [] for no answer"
                )
            if isinstance(start, bool) or not isinstance(start, int) or start < 0:
                raise ValueError(f"answer_start of {text!r:.80} must be a number of characters, got {start!r:.80}")
        return {"text": [text_value(text) for text in texts], "answer_start": list(starts)}

    def check_record(self, texts: Sequence[str], label: Any) -> None:
        """Check that each answer stands in the context where it is said to.

        Raises:
            ValueError: If one does not, or the record has not two texts.
        """
        _, context = _pair(tuple(texts), "a record")
        for text, start in zip(label["text"], label["answer_start"], strict=True):
            there = context[start : start + len(text)]
            if there != text:
                where = context.find(text)
                hint = f"; it is at {where}" if where >= 0 else ""
                raise ValueError(
                    f"the answer {text[:_SHOWN]!r} is not in its context, which has {there[:_SHOWN]!r} at "
                    f"answer_start={start}{hint}"
                )

    def label(self, example: Any) -> None:
        """None: answers are not classes."""

    def label_names(self, value: Any) -> list[str]:
        """None: answers are not classes."""
        return []

    # --- texts

    def dataset(
        self,
        data: Any,
        tokenizer: Any,
        *,
        text: str | tuple[str, str],
        label: str | None,
        id_column: str | None,
        max_length: int,
        cache: TokenCache | None = None,
        training: bool = False,
    ) -> Dataset[dict[str, Any]]:
        """The records of a split, each with all its windows.

        Raises:
            ValueError: If a record does not fit into windows of ``max_length`` tokens, see :class:`WindowedDataset`.
        """
        return WindowedDataset(
            data,
            tokenizer,
            text=_pair(text, "question answering"),
            label=label,
            id_column=id_column,
            max_length=max_length,
            stride=self.stride,
            training=training,
            cache=cache,
        )

    def training_dataset(self, data: Any, tokenizer: Any, **settings: Any) -> Dataset[dict[str, Any]]:
        """The windows to train on, each an example: those with an answer, and of each record one without.

        Raises:
            ValueError: As in :meth:`dataset`, or if there is no column of answers.
        """
        if settings.get("label") is None:
            raise ValueError("training needs the column of the answers, got label=None")
        return self.dataset(data, tokenizer, **settings, training=True)

    def collator(self, tokenizer: Any) -> Callable[[list[Any]], Any]:
        """The function that collates examples into a batch, see :class:`WindowCollator`."""
        return WindowCollator(padding_token(tokenizer), tokenizer.padding_side, KINDS)

    # --- batches

    def outputs(self, module: pl.LightningModule, batch: Any) -> Outputs:
        """Logits ``[batch, 2, tokens]`` over the tokens of a window, and the first and last token of the answer.

        Of an example with several windows, the first that holds an answer, or else the first.
        """
        tokens = batch if int(batch["windows"].max()) == 1 else unstacked(batch, first=True)[0]
        return Outputs(module(**tokens).logits, targets_in(tokens), "categorical")

    def score(self, module: Any, batch: Any) -> Tensor:
        """The F1 of each answer over all windows, by SQuAD's rules: float32 ``[batch]``."""
        said = module.answers(batch)
        scores = [answer_f1(one["answer"], label["text"]) for one, label in zip(said, batch["answers"], strict=True)]
        return torch.tensor(scores, device=batch["input_ids"].device)


def _listed(value: Any) -> list[Any] | None:
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, list | tuple) else None


def _pair(text: str | Sequence[str], who: str) -> tuple[str, str]:
    if isinstance(text, str) or len(text) != 2:
        got = [text] if isinstance(text, str) else list(text)
        raise ValueError(
            f"{who} has two texts, the question and the context, got {got!r:.80}; set text to their fields, such as "
            '["question", "context"]'
        )
    return text[0], text[1]
