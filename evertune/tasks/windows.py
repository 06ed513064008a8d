"""Questions with long contexts, tokenised into overlapping windows that each fit the model."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune.tasks.parts import tokens_at
from evertune.tasks.texts import LENGTHS, PadCollator, TokenizedDataset
from evertune.tasks.token_cache import TokenCache
from evertune.utils.examples import Examples, column_of

KINDS = ("token_type_ids", "windows", "char_start", "char_end", "spans")
"""What there is for each token beside ``input_ids``, see :class:`WindowedDataset`; 0 for padding."""
FIRST, LAST = 1, 2
"""In ``spans``: the token is the first one of the answer, or the last one; both add up."""


class WindowedDataset(TokenizedDataset):
    """Questions with their contexts, each example in one or more windows of at most ``max_length`` tokens.

    A window is the question followed by a part of the context; consecutive windows share ``stride`` tokens of the
    context (Devlin et al. 2019 call it the document stride). The windows of an example are one after another in a flat
    sequence of tokens, so that an example looks like any other text. In addition to what :class:`TokenizedDataset`
    gives, each token has, int64 ``[length]``:

    - ``windows``: the number of its window, from 1;
    - ``char_start`` and ``char_end``: where it stands in the context; both are 0 for tokens outside the context;
    - ``spans``, if there is a label: ``FIRST`` and ``LAST`` at the ends of the answer. In a window that does not hold
      the answer, both are at the first token of the window, which stands for "no answer here".

    and each example has the text of its ``context``.

    Args:
        data: Examples, as dicts.
        tokenizer: Fast tokenizer of transformers.
        text: Columns with the question and the context.
        label: Column with the answers, ``{"text": [...], "answer_start": [...]}``, or None.
        id_column: Column that identifies an example, or None.
        max_length: Maximum number of tokens of a window.
        stride: Number of context tokens that consecutive windows share.
        training: Whether to give the windows to train on, each as an example of its own, rather than the records: every
            window that holds an answer, and of each record one other window, to learn that it holds none.
        cache: Where tokens are kept on disk; None (default) for nowhere.

    Raises:
        ValueError: If the tokenizer is not a fast one, a question leaves too little room for the context, or no window
            holds an answer as a whole.
    """

    def __init__(
        self,
        data: Examples,
        tokenizer: Any,
        *,
        text: tuple[str, str],
        label: str | None,
        id_column: str | None,
        max_length: int,
        stride: int,
        training: bool = False,
        cache: TokenCache | None = None,
    ) -> None:
        self.stride = stride
        super().__init__(
            data, tokenizer, text=text, label=label, id_column=id_column, max_length=max_length, cache=cache
        )
        self.names["context"] = column_of(data, text[1])
        if label is not None:
            marked = [self._answered(record, max_length) for record in range(len(self))]
            self.tokens = {**self.tokens, "spans": np.concatenate(marked) if marked else np.empty(0, np.int32)}
        if training:
            self._keep_for_training()

    def rules(self) -> Mapping[str, Any]:
        """The stride."""
        return {"windows": self.stride}

    def tokenised(self, texts: list[list[str]], tokenizer: Any, max_length: int) -> Mapping[str, np.ndarray]:
        """The windows of all examples one after another."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"answers are found by the places of tokens, which {type(tokenizer).__name__} does not give; load a "
                "fast tokenizer"
            )
        _check_questions(texts[0], tokenizer, max_length, self.stride)
        flat: dict[str, list[np.ndarray]] = {}
        lengths = np.zeros(len(texts[0]), np.int64)
        for record, number, kinds in _windows(texts, tokenizer, max_length, self.stride):
            size = len(kinds["input_ids"])
            lengths[record] += size
            for kind, values in (*kinds.items(), ("windows", np.full(size, number))):
                flat.setdefault(kind, []).append(np.asarray(values, np.int32))
        return {**{kind: np.concatenate(parts) for kind, parts in flat.items()}, LENGTHS: lengths}

    def _places(self, record: int) -> Iterator[slice]:
        """Where the tokens of each window of a record stand."""
        start = int(self.starts[record])
        numbers = self.tokens["windows"][start : start + self.lengths[record]]
        ends = np.flatnonzero(np.diff(numbers, append=0)) + 1
        for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            yield slice(start + begin, start + end)

    def _answered(self, record: int, max_length: int) -> np.ndarray:
        """The ``spans`` of a record."""
        answers, context = self.names["labels"][record], self.names["context"][record]
        ranges = [
            (start, start + len(text)) for start, text in zip(answers["answer_start"], answers["text"], strict=True)
        ]
        windows = list(self._places(record))
        spans = [self._in_window(place, ranges, place is windows[0], place is windows[-1]) for place in windows]
        if ranges and not any(last for _, last in spans):
            raise ValueError(
                f"the answer {answers['text'][0]!r:.80} in {context!r:.60} is not in any window as a whole: windows "
                f"have max_length={max_length} tokens and share stride={self.stride}; raise these or shorten it"
            )
        marked = np.zeros(self.lengths[record], np.int32)
        for place, (first, last) in zip(windows, spans, strict=True):
            begin = place.start - self.starts[record]
            marked[begin + first] += FIRST
            marked[begin + last] += LAST
        return marked

    def _in_window(
        self, place: slice, ranges: Sequence[tuple[int, int]], is_first: bool, is_last: bool
    ) -> tuple[int, int]:
        """The first and the last token of the first answer that a window holds as a whole; (0, 0) if it holds none."""
        starts, ends = self.tokens["char_start"][place], self.tokens["char_end"][place]
        inside = ends > 0
        if not inside.any():
            return 0, 0
        low = 0 if is_first else starts[inside].min()
        high = np.inf if is_last else ends[inside].max()
        for start, end in ranges:
            tokens = np.flatnonzero(inside & (starts < end) & (ends > start))
            if len(tokens) and low <= start and end <= high:
                return int(tokens[0]), int(tokens[-1])
        return 0, 0

    def _keep_for_training(self) -> None:
        """Make an example of each window to train on."""
        kept: list[tuple[int, slice, bool]] = []
        for record in range(len(self)):
            places = list(self._places(record))
            answered = [bool(self.tokens["spans"][place][0] == 0) for place in places]
            kept += [(record, place, True) for place, has in zip(places, answered, strict=True) if has]
            others = [
                place for place, has in zip(places, answered, strict=True) if not has and self._is_free(record, place)
            ]
            if others:
                draw = zlib.crc32(self.names["context"][record].encode(errors="surrogatepass"))
                kept.append((record, others[draw % len(others)], False))
        self.starts = np.array([place.start for _, place, _ in kept], np.int64)
        self.lengths = np.array([place.stop - place.start for _, place, _ in kept], np.int64)
        self.tokens = {**self.tokens, "windows": np.ones_like(self.tokens["windows"])}
        self.names = {key: [values[record] for record, _, _ in kept] for key, values in self.names.items()}
        none: dict[str, list[Any]] = {"text": [], "answer_start": []}
        self.names["labels"] = [
            label if has else none for label, (_, _, has) in zip(self.names["labels"], kept, strict=True)
        ]

    def _is_free(self, record: int, place: slice) -> bool:
        """Whether a window holds no part of any answer."""
        starts, ends = self.tokens["char_start"][place], self.tokens["char_end"][place]
        answers = self.names["labels"][record]
        return not any(
            ((starts < start + len(text)) & (ends > start)).any()
            for start, text in zip(answers["answer_start"], answers["text"], strict=True)
        )


class WindowCollator(PadCollator):
    """Collates examples of a :class:`WindowedDataset`.

    A batch has, beside the tokens, the lists ``context`` and ``answers`` of the examples. If every example has one
    window, as in training, ``labels`` holds :func:`targets_in` them.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples into a batch."""
        batch = {**super().__call__(examples), "context": [example["context"] for example in examples]}
        if "labels" in batch:
            batch["answers"] = batch.pop("labels")
            if int(batch["windows"].max()) == 1:
                batch["labels"] = targets_in(batch)
        return batch


def targets_in(tokens: Mapping[str, Tensor]) -> Tensor:
    """The first and the last token of the answer in each window, int64 ``[windows, 2]``."""
    return torch.stack([(tokens["spans"] & bit).argmax(1) for bit in (FIRST, LAST)], 1)


def unstacked(batch: Mapping[str, Any], first: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """The windows of a batch, each in a row.

    Args:
        batch: A batch with ``windows`` [batch, tokens].
        first: Whether to take one window of each example: the first that holds an answer, or else the first.

    Returns:
        The tokens of the windows, [windows, longest] of each kind and the ``attention_mask``, padded on the right; and
        the number of the example of each window.
    """
    windows = batch["windows"]
    present = [windows == number for number in range(1, int(windows.max()) + 1)]
    if first:
        chosen = present[0]
        for one in reversed(present):
            holds = (one & (batch["spans"] > 0)).float().argmax(1) != one.float().argmax(1)
            chosen = torch.where((holds & one.any(1))[:, None], one, chosen)
        present = [chosen]
    here = torch.stack(present, 1).flatten(0, 1)
    rows = torch.arange(len(windows), device=windows.device).repeat_interleave(len(present))
    here, rows = here[here.any(1)], rows[here.any(1)]
    return tokens_at(batch, here, rows, ("input_ids", *KINDS)), rows


def _check_questions(questions: Sequence[str], tokenizer: Any, max_length: int, stride: int) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for question, tokens in zip(questions, _plain(questions, tokenizer), strict=True):
        room = max_length - special - len(tokens)
        if not tokens:
            raise ValueError(f"the tokenizer finds nothing in the question {question!r:.80}")
        if room <= stride:
            raise ValueError(
                f"the question {question!r:.80} has {len(tokens)} tokens, which leaves {max(room, 0)} of "
                f"max_length={max_length} for a window of the context, and windows share stride={stride}: shorten the "
                "question, raise max_length, or lower stride"
            )


def _plain(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of texts as they are."""
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return found


def _windows(
    texts: Sequence[Sequence[str]], tokenizer: Any, max_length: int, stride: int
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The record, the number and the tokens of each window."""
    questions, contexts = texts
    for start in range(0, len(questions), 1000):
        encoded = tokenizer(
            list(questions[start : start + 1000]),
            list(contexts[start : start + 1000]),
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        number, before = 0, -1
        for place, record in enumerate(encoded["overflow_to_sample_mapping"]):
            number = number + 1 if record == before else 1
            before = record
            in_context = np.array([one == 1 for one in encoded.sequence_ids(place)])
            if not in_context.any():
                context = contexts[start + record]
                raise ValueError(f"the tokenizer finds nothing in the context {context!r:.80}")
            kinds = {kind: encoded[kind][place] for kind in ("input_ids", "token_type_ids") if kind in encoded}
            offsets = np.where(in_context[:, None], np.asarray(encoded["offset_mapping"][place]), 0)
            yield start + record, number, {**kinds, "char_start": offsets[:, 0], "char_end": offsets[:, 1]}
