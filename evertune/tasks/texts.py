"""Tokenised texts: tokenised once, padded to the longest of a batch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from evertune.tasks.token_cache import TokenCache, key_of
from evertune.utils.examples import Examples, column_of

_MORE_KINDS = ("token_type_ids",)
"""What a tokenizer may return for each token beside ``input_ids``."""
_USUAL_LENGTH = 128
LENGTHS = "lengths"
"""Name of the number of tokens of each example, among the arrays of a tokenised dataset."""
_LONGEST_UNLIMITED = 512
"""Tokens of a text for models without a maximum; attention takes memory that grows with the square of it."""


def max_tokens(transformer: nn.Module) -> int | None:
    """The maximum number of tokens that a transformer takes, special tokens included; None without a maximum.

    It is the number of positions in the configuration. The family of RoBERTa counts positions from after the padding
    token's, so two of 514 cannot be used; relative positions, as in XLNet and DeBERTa, have no maximum.

    Args:
        transformer: Model of transformers; its weights need not be loaded.
    """
    config: Any = transformer.config
    positions: int | None = getattr(config, "max_position_embeddings", None)
    relative = getattr(config, "relative_attention", False) and not getattr(config, "position_biased_input", True)
    if positions is None or positions < 1 or relative:
        return None
    for name, module in transformer.named_modules():
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return positions


def truncation_length(max_length: int | None, tokenizer: Any, module: Any = None) -> int:
    """The number of tokens after which texts are truncated.

    Args:
        max_length: The length that was asked for; None for 128, or for what tokenizer and module take if that is less.
        tokenizer: Tokenizer of transformers.
        module: The module that will get the texts. Its ``max_tokens``, if it has that attribute, is its maximum.

    Raises:
        ValueError: If ``max_length`` is more than the module takes.

    Example:
        >>> from types import SimpleNamespace
        >>> truncation_length(None, SimpleNamespace(model_max_length=10**30), SimpleNamespace(max_tokens=64))
        64
        >>> truncation_length(512, None, SimpleNamespace(max_tokens=64))
        Traceback (most recent call last):
        ValueError: max_length must be at most 64, the number of tokens that SimpleNamespace takes, got 512
    """
    limit = getattr(module, "max_tokens", None)
    if max_length is None:
        return min(_USUAL_LENGTH, getattr(tokenizer, "model_max_length", _USUAL_LENGTH), limit or _USUAL_LENGTH)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"max_length must be at most {limit}, the number of tokens that {type(module).__name__} takes, "
            f"got {max_length}"
        )
    return max_length


def checked_texts(texts: Any) -> list[Any]:
    """The texts to answer as a list, all of them texts or all of them pairs of texts.

    Raises:
        TypeError: If ``texts`` is a single string, or one of them is not a text or a pair of texts.
        ValueError: If one holds half of a surrogate pair.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a list; for one text pass [text]")
    checked = [tuple(text) if isinstance(text, list | tuple) else text for text in texts]
    for number, text in enumerate(checked):
        parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
        if not all(isinstance(part, str) for part in parts):
            hint = "; of a record, pass the field with its text" if isinstance(text, dict) else ""
            raise TypeError(f"texts[{number}] must be a text or a pair of texts, got {text!r:.80}{hint}")
        if isinstance(text, tuple) != isinstance(checked[0], tuple):
            raise TypeError(f"texts[{number}] and texts[0] must both be texts, or both pairs of texts")
        try:
            "".join(parts).encode()
        except UnicodeEncodeError:
            raise ValueError(f"texts[{number}] holds half of a surrogate pair, which is not text") from None
    return checked


def longest_text(tokenizer: Any) -> int:
    """The maximum number of tokens of a tokenizer; 512 for one without a maximum."""
    longest: int = tokenizer.model_max_length
    return longest if longest <= sys.maxsize else _LONGEST_UNLIMITED  # transformers writes about 1e30 for "unlimited"


def padded_tokens(
    tokenizer: Any, texts: Sequence[Any], max_length: int, *, first: int = 0, tensors: Literal["pt", "np"] = "pt"
) -> Any:
    """The tokens of texts to answer, padded to the longest of them.

    Args:
        tokenizer: Tokenizer of transformers.
        texts: Texts, or pairs of texts.
        max_length: Number of tokens after which a text is truncated.
        first: Position of the first text among all, for the message.
        tensors: Tensors of torch (default) or arrays of NumPy.

    Returns:
        The ``BatchEncoding``, each entry int64 ``[texts, longest]``.

    Raises:
        ValueError: If a text has no tokens.
    """
    batch = tokenizer(list(texts), truncation=True, max_length=max_length, padding=True, return_tensors=tensors)
    empty = np.flatnonzero(np.asarray(batch["attention_mask"].sum(1) == 0))
    if len(empty):
        raise ValueError(f"texts[{first + int(empty[0])}] has no tokens: leave empty texts out")
    return batch


class TokenizedDataset(Dataset[dict[str, Any]]):
    """The tokenised texts of a dataset, in flat arrays.

    An example is a dict: ``input_ids`` (and ``token_type_ids`` if the tokenizer returns them), int64 ``[length]``;
    ``labels`` (the label's name or list of names) and ``id``, if the dataset has those columns.

    Args:
        data: Examples, as dicts.
        tokenizer: Tokenizer of transformers.
        text: Column with the text, or the pair of columns.
        label: Column with the label, or None.
        id_column: Column that identifies an example, or None.
        max_length: Maximum number of tokens; longer texts are truncated.
        cache: Where tokens are kept on disk; None (default) for nowhere.
    """

    def __init__(
        self,
        data: Examples,
        tokenizer: Any,
        *,
        text: str | tuple[str, str],
        label: str | None,
        id_column: str | None,
        max_length: int,
        cache: TokenCache | None = None,
    ) -> None:
        columns = (text,) if isinstance(text, str) else tuple(text)
        texts = [column_of(data, column) for column in columns]
        self.names = {
            key: column_of(data, column) for key, column in (("labels", label), ("id", id_column)) if column is not None
        }
        if cache is None:
            arrays = self.tokenised(texts, tokenizer, max_length)
        else:
            key = key_of(texts, tokenizer, max_length, self.rules())
            arrays = cache.get(key, lambda: self.tokenised(texts, tokenizer, max_length))
        self.tokens = {name: values for name, values in arrays.items() if name != LENGTHS}
        self.lengths = arrays[LENGTHS]
        self.starts = np.cumsum(self.lengths) - self.lengths

    def tokenised(self, texts: list[list[str]], tokenizer: Any, max_length: int) -> Mapping[str, np.ndarray]:
        """The tokens of all examples one after another, int32 of each kind, and the ``lengths`` of the examples."""
        return _tokenised(texts, tokenizer, max_length)

    def rules(self) -> Mapping[str, Any]:
        """What the tokens depend on beside texts, tokenizer and length, as JSON values."""
        return {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Supports negative indices, and raises IndexError out of range.
        index = range(len(self))[index]
        run = slice(self.starts[index], self.starts[index] + self.lengths[index])
        tokens = {key: torch.from_numpy(values[run].astype(np.int64)) for key, values in self.tokens.items()}
        return {**tokens, **{key: values[index] for key, values in self.names.items()}}


def _tokenised(texts: list[list[str]], tokenizer: Any, max_length: int) -> dict[str, np.ndarray]:
    """The tokens of all texts one after another, int32 of each kind, and the number of tokens of each text."""
    flat: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    for start in range(0, len(texts[0]), 1000):
        parts = [column[start : start + 1000] for column in texts]
        encoded = tokenizer(*parts, truncation=True, max_length=max_length, return_attention_mask=False)
        lengths += [len(tokens) for tokens in encoded["input_ids"]]
        for key in ("input_ids", *(key for key in _MORE_KINDS if key in encoded)):
            flat.setdefault(key, []).append(np.concatenate([np.asarray(t, np.int32) for t in encoded[key]]))
    return {**{key: np.concatenate(chunks) for key, chunks in flat.items()}, LENGTHS: np.asarray(lengths)}


class PadCollator:
    """Collates tokenised examples, padding each kind of tokens to the longest example; labels become lists.

    Args:
        pad_token_id: Token id that pads ``input_ids``.
        side: Side on which padding is added, ``"right"`` (default) or ``"left"``.
        kinds: What there may be for each token beside ``input_ids``, padded with 0. Default: ``token_type_ids``.
    """

    def __init__(
        self, pad_token_id: int, side: Literal["right", "left"] = "right", kinds: Sequence[str] = _MORE_KINDS
    ) -> None:
        self.pad_token_id = pad_token_id
        self.side = side
        self.kinds = tuple(kinds)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples into a batch.

        Returns:
            ``input_ids``, ``attention_mask`` (and further ``kinds``): int64 ``[batch, longest]``. ``labels``: a list
            of the examples' labels, if they have labels.
        """
        mask = [torch.ones_like(example["input_ids"]) for example in examples]
        batch: dict[str, Any] = {
            "input_ids": self._pad([example["input_ids"] for example in examples], self.pad_token_id),
            "attention_mask": self._pad(mask, 0),
        }
        for key in self.kinds:
            if key in examples[0]:
                batch[key] = self._pad([example[key] for example in examples], 0)
        if "labels" in examples[0]:
            batch["labels"] = [example["labels"] for example in examples]
        return batch

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.side)


def pad_collator(tokenizer: Any) -> PadCollator:
    """A collator that pads like a tokenizer does, with the end token if there is no padding token.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    return PadCollator(padding_token(tokenizer), tokenizer.padding_side)


def padding_token(tokenizer: Any) -> int:
    """The number of the token that pads: the tokenizer's padding token, or else its end token.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    token: int | None = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ValueError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
    return token
