"""Examples with several sequences of tokens each, in flat arrays, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from evertune._lightning import rank_zero_warn
from evertune.tasks.token_cache import TokenCache, key_of

IGNORED = -100
_ENDS = "_ends"
Tokens = Mapping[str, Sequence[np.ndarray]]
"""The tokens of each example, by their name in a batch."""


class SequenceDataset(Dataset[dict[str, Any]]):
    """Examples of ``input_ids`` and ``labels``, int64 ``[length]``, and ``id`` if there is one.

    Args:
        make: Function that tokenises all examples. Not called if a cache holds its result.
        ids: The id of each example, or None.
        cache: Where tokens are kept on disk; None for nowhere.
        key: What the tokens depend on, as arguments of :func:`~evertune.tasks.token_cache.key_of`.
    """

    def __init__(
        self,
        make: Callable[[], Tokens],
        ids: Sequence[Any] | None = None,
        cache: TokenCache | None = None,
        key: tuple[Sequence[Sequence[str]], Any, int] | None = None,
    ) -> None:
        arrays = _flat(make()) if cache is None or key is None else cache.get(key_of(*key), lambda: _flat(make()))
        self.tokens = {name: values for name, values in arrays.items() if not name.endswith(_ENDS)}
        self.ends = {name: arrays[name + _ENDS] for name in self.tokens}
        self.lengths = np.diff(self.ends["input_ids"], prepend=0)
        self.ids = ids

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # supports negative indices, and raises IndexError out of range
        example: dict[str, Any] = {}
        for name, values in self.tokens.items():
            start = self.ends[name][index - 1] if index else 0
            example[name] = torch.from_numpy(values[start : self.ends[name][index]].astype(np.int64))
        return example if self.ids is None else {**example, "id": self.ids[index]}


class SequenceCollator:
    """Collates examples, padding ``input_ids`` and ``labels`` to the right, each to its longest example.

    Args:
        pad_token_id: Token that pads ``input_ids``.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and ``labels`` (-100 where none is learned): int64 ``[batch, longest]``."""
        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "labels": pad_sequence(
                [example["labels"] for example in examples], batch_first=True, padding_value=IGNORED
            ),
        }


def of_record(number: int, n_records: int, error: ValueError) -> ValueError:
    """An error about one of several records, with the position of the record."""
    return ValueError(f"record {number}: {error}") if n_records > 1 else error


def warn_about_length(lengths: Sequence[int], max_length: int, what: str = "texts") -> None:
    """Say how many texts are truncated, if any are."""
    long = [length for length in lengths if length > max_length]
    if long:
        rank_zero_warn(
            f"{len(long)} of {len(lengths)} {what} have more than {max_length} tokens and are truncated; the longest "
            f"has {max(long)}"
        )


def _flat(tokens: Tokens) -> dict[str, np.ndarray]:
    """The sequences of each kind one after another, int32, and where each ends."""
    arrays: dict[str, np.ndarray] = {}
    for name, parts in tokens.items():
        arrays[name] = (
            np.concatenate([np.asarray(part, np.int32) for part in parts]) if parts else np.empty(0, np.int32)
        )
        arrays[name + _ENDS] = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return arrays
