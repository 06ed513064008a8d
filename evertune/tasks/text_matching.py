"""Text matching: which of many items fits a text; recommendation is the same with a history for the text."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import rank_zero_warn
from evertune.metrics.ranking import reciprocal_ranks
from evertune.sources.base import Row
from evertune.sources.values import absent, text_value
from evertune.tasks.base import IGNORED, Change, Outputs, Task
from evertune.tasks.parts import PARTS
from evertune.tasks.sequences import SequenceDataset, of_record
from evertune.tasks.texts import PadCollator, padding_token
from evertune.tasks.token_cache import TokenCache
from evertune.utils.examples import Examples, column_of

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Architecture = Literal["two_tower", "cross_encoder"]
MatchingLoss = Literal["listwise", "binary"]
BETWEEN = "; "
"""What stands between two items of a history."""
_AT_ONCE = 1000  # texts that are tokenised together


class TextMatchingTask(Task):
    """Queries and the items that fit them: a record has a query (``text``) and the item that answers it (``label``).

    A query is a text, or a user's history: a list of the texts of items, the most recent last. A history becomes one
    text, the most recent item first, so that truncation takes the oldest. For recommendation, the label is the item
    that was clicked.

    The candidates of a record are its positive and ``n_negatives`` others: first its given negatives, then items of
    other records of the same split, drawn by a hash of query and positive. They are part of the example, so that the
    score of a record is the reciprocal rank of its positive among them, whatever else is in the batch. Ties count
    against it.

    Args:
        architecture: ``two_tower`` (default) reads query and items apart, ``cross_encoder`` each pair together.
        loss: How the logits of the candidates are to be read: ``listwise`` (default), a softmax over them, or
            ``binary``, a yes or no for each.
        negatives: Field with a record's own negatives, a list of texts that may be empty. Default: None, no such field.
        n_negatives: Number of candidates beside the positive. Default: 7.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> task = TextMatchingTask(negatives="negatives")
        >>> task.check_text(["a lamp", "a desk"])
        'a desk; a lamp'
        >>> task.check_fields(["a desk"], "a chair", {"negatives": ["a boat", "a chair"]})
        Traceback (most recent call last):
        ValueError: the positive 'a chair' is among the negatives: leave it out of them
    """

    fixed_classes = False
    tolerates: frozenset[Change] = frozenset({"rewrite", "hide"})
    example: Any = ("a text", "an item")

    def __init__(
        self,
        architecture: Architecture = "two_tower",
        loss: MatchingLoss = "listwise",
        negatives: str | None = None,
        n_negatives: int = 7,
    ) -> None:
        if architecture not in get_args(Architecture):
            raise ValueError(f"architecture must be one of {list(get_args(Architecture))}, got {architecture!r}")
        if loss not in get_args(MatchingLoss):
            raise ValueError(f"loss must be one of {list(get_args(MatchingLoss))}, got {loss!r}")
        if n_negatives < 1:
            raise ValueError(f"n_negatives must be positive, got {n_negatives}")
        super().__init__("bernoulli" if loss == "binary" else "categorical")
        self.in_pairs = architecture == "cross_encoder"
        self.negatives = negatives
        self.n_negatives = n_negatives

    @property
    def candidates(self) -> range:
        """The numbers of the candidates among the ``parts`` of an example, that of the positive first."""
        first = 1 if self.in_pairs else 2  # of two towers, the query is number 1
        return range(first, first + 1 + self.n_negatives)

    # --- records

    def check_text(self, value: Any) -> str:
        """The query as one text; a history has its most recent item first.

        Raises:
            ValueError: If it is empty, or an item of the history has no text.
        """
        items = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(items, list | tuple):
            return text_value(items)
        if not items:
            raise ValueError("the history is empty: leave out users who have none, or write a text for them")
        return BETWEEN.join(reversed(_texts(items, "item")))

    def check_label(self, value: Any) -> str:
        """The positive.

        Raises:
            ValueError: If it has no text.
        """
        return _texts([value])[0]

    def check_record(self, texts: Sequence[str], label: Any) -> None:
        """Check that there is one query.

        Raises:
            ValueError: If there are two texts.
        """
        if len(texts) != 1:
            raise ValueError(
                f"a record has one query, and its item as the label; got {len(texts)} texts: set text to one"
            )

    @property
    def fields(self) -> Mapping[str, Callable[[Any], Any]]:
        """The field with the negatives, if there is one."""
        return {} if self.negatives is None else {self.negatives: negatives_value}

    def check_fields(self, texts: Sequence[str], label: Any, fields: Mapping[str, Any]) -> None:
        """Check that the positive is not a negative.

        Raises:
            ValueError: If it is.
        """
        if self.negatives is not None and label in fields[self.negatives]:
            raise ValueError(f"the positive {label[:80]!r} is among the negatives: leave it out of them")

    def label(self, example: Any) -> None:
        """None: items are not classes."""

    def label_names(self, value: Any) -> list[str]:
        """None: items are not classes."""
        return []

    # --- texts

    def texts(self, rows: Sequence[Row], text: str | Sequence[str], tokenizer: Any, max_length: int) -> list[list[str]]:
        """The queries of records."""
        return super().texts(rows, _one_field(text), tokenizer, max_length)

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
        """The examples of a split, each with its candidates; how many have none or too many is reported.

        Raises:
            ValueError: If there is no label, or a record cannot be learned, with its position.
        """
        if label is None:
            raise ValueError("a query needs the item that fits it: pass label=, the name of the column that holds it")
        queries, positives, given = self._checked(data, _one_field(text), label)
        candidates = drawn_candidates(queries, positives, given, self.n_negatives)
        if longer := sum(len(some) > self.n_negatives for some in given):
            rank_zero_warn(
                f"{longer} of {len(queries)} records bring more than n_negatives={self.n_negatives} negatives: "
                "the others are left out"
            )
        if alone := sum(len(items) == 1 for items, _ in candidates):
            rank_zero_warn(
                f"{alone} of {len(queries)} records have nothing that their positive could be compared with, and count "
                "as right: there are no other items in their split; give negatives"
            )
        return SequenceDataset(
            lambda: self._tokens(queries, candidates, tokenizer, max_length),
            None if id_column is None else column_of(data, id_column),
            cache,
            (
                [
                    queries,
                    [item for items, _ in candidates for item in items],
                    [str(one) for one in _shape(candidates)],
                ],
                tokenizer,
                max_length,
            ),
        )

    def collator(self, tokenizer: Any) -> PadCollator:
        """The function that collates examples into a batch."""
        return PadCollator(padding_token(tokenizer), tokenizer.padding_side, ("token_type_ids", PARTS))

    # --- batches

    def outputs(self, module: Any, batch: Any) -> Outputs:
        """Logits of the candidates, ``[batch, 1 + n_negatives]``, the positive first; absent ones do not count.

        Candidates are read one after another, each for the whole batch, so that the gradient of each example follows
        from the layers' inputs, and all ranks run equally many forward passes.
        """
        logits, present = module.candidate_logits(batch, together=False)
        return self.targets_for(logits, present)

    def targets_for(self, logits: Tensor, present: Tensor) -> Outputs:
        """Logits of candidates ``[batch, candidates]`` with their targets; ``present`` says which there are."""
        if self.likelihood == "categorical":
            return Outputs(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device), "categorical")
        targets = torch.zeros_like(logits)
        targets[:, 0] = 1
        return Outputs(logits, targets.masked_fill(~present, IGNORED), "bernoulli")

    def score(self, module: Any, batch: Any) -> Tensor:
        """The reciprocal rank of each positive among its candidates: float32 ``[batch]``."""
        return reciprocal_ranks(module.candidate_logits(batch)[0])

    def _checked(self, data: Examples, text: str, label: str) -> tuple[list[str], list[str], list[list[str]]]:
        """The queries, positives and negatives of records."""
        columns: list[Any] = [column_of(data, text), column_of(data, label)]
        columns.append([] if self.negatives is None else column_of(data, self.negatives))
        queries, positives, given = list[str](), list[str](), list[list[str]]()
        for number in range(len(data)):
            try:
                queries.append(self.check_text(columns[0][number]))
                positives.append(self.check_label(columns[1][number]))
                given.append([] if self.negatives is None else negatives_value(columns[2][number]))
                self.check_fields(queries[-1:], positives[-1], {self.negatives or "": given[-1]})
            except ValueError as error:
                raise of_record(number, len(data), error) from None
        return queries, positives, given

    def _tokens(
        self, queries: list[str], candidates: list[tuple[list[str], int]], tokenizer: Any, max_length: int
    ) -> dict[str, list[np.ndarray]]:
        """The tokens of all examples, with the number of the part that each belongs to."""
        texts: list[list[Any]] = [
            [(query, item) for item in items] if self.in_pairs else [query, *items]
            for query, (items, _) in zip(queries, candidates, strict=True)
        ]
        kinds = _tokenised(list(dict.fromkeys(one for some in texts for one in some)), tokenizer, max_length)
        found: dict[str, list[np.ndarray]] = {kind: [] for kind in (*kinds, PARTS)}
        for some, (items, n_given) in zip(texts, candidates, strict=True):
            n_own = len(some) - len(items) + 1 + n_given
            numbers = [number if number <= n_own else -number for number in range(1, len(some) + 1)]
            for kind, tokens in kinds.items():
                found[kind].append(np.concatenate([tokens[one] for one in some]))
            lengths = [len(kinds["input_ids"][one]) for one in some]
            found[PARTS].append(np.repeat(np.asarray(numbers, np.int32), lengths))
        return found


def drawn_candidates(
    queries: Sequence[str], positives: Sequence[str], given: Sequence[Sequence[str]], n_negatives: int
) -> list[tuple[list[str], int]]:
    """The candidates of each record, the positive first, and how many of its given negatives are among them.

    Missing negatives are drawn from the items of the other records, without those that are a positive of the same
    query. The draw depends on the query, the positive and the items there are, not on the order of the records.

    Example:
        >>> drawn_candidates(["a", "b", "a"], ["x", "y", "z"], [["w"], [], []], n_negatives=2)
        [(['x', 'w', 'y'], 1), (['y', 'z', 'w'], 0), (['z', 'y', 'w'], 0)]
    """
    right: defaultdict[str, set[str]] = defaultdict(set)
    for query, positive in zip(queries, positives, strict=True):
        right[query].add(positive)
    items = sorted({*positives, *(item for some in given for item in some)})
    found = []
    for query, positive, some in zip(queries, positives, given, strict=True):
        own = list(some)[:n_negatives]
        taken = right[query].union(own)
        missing = n_negatives - len(own)
        draw = np.random.default_rng(zlib.crc32(f"{query}\0{positive}".encode(errors="surrogatepass")))
        places = draw.choice(len(items), min(missing + len(taken), len(items)), replace=False) if missing else ()
        others = [items[place] for place in places if items[place] not in taken]
        found.append(([positive, *own, *others[:missing]], len(own)))
    return found


def negatives_value(value: Any) -> list[str]:
    """The negatives of a record, each once; none if there is no value.

    Raises:
        ValueError: If they are not a list, or one has no text.

    Example:
        >>> negatives_value(["a boat", "a kite", "a boat"]), negatives_value(None)
        (['a boat', 'a kite'], [])
    """
    items = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(items, list | tuple):
        return list(dict.fromkeys(_texts(items, "negative")))
    if absent(items):
        return []
    raise ValueError(f"the negatives must be a list of texts, got {value!r:.80}")


def _texts(items: Sequence[Any], what: str = "") -> list[str]:
    for number, item in enumerate(items, 1):
        try:
            text_value(item)
        except ValueError as error:
            raise ValueError(f"{what} {number} of {len(items)}: {error}" if what else str(error)) from None
    return list(items)


def _one_field(text: str | Sequence[str]) -> str:
    fields = [text] if isinstance(text, str) else list(text)
    if len(fields) != 1:
        raise ValueError(f"a record has one query, and its item as the label; set text to one field, got {fields}")
    return fields[0]


def _shape(candidates: Sequence[tuple[list[str], int]]) -> list[tuple[int, int]]:
    return [(len(items), n_given) for items, n_given in candidates]


def _tokenised(texts: list[Any], tokenizer: Any, max_length: int) -> dict[str, dict[Any, np.ndarray]]:
    """The tokens of texts, or of pairs of texts, by the text: of each kind that the tokenizer returns."""
    kinds: dict[str, dict[Any, np.ndarray]] = {"input_ids": {}}
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        encoded = tokenizer(some, truncation=True, max_length=max_length, return_attention_mask=False)
        for kind in ("input_ids", "token_type_ids"):
            for text, tokens in zip(some, encoded.get(kind, ()), strict=False):
                kinds.setdefault(kind, {})[text] = np.asarray(tokens, np.int32)
    return kinds
