"""Examples of several texts, one after another in a flat sequence of tokens, and how they are taken apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PARTS = "parts"
"""For each token, the number of its text, from 1; the negative of it in a text that was drawn; 0 in padding."""


class Parts(NamedTuple):
    """Some texts of each example of a batch, those of an example one after another.

    Args:
        tokens: The tokens, each int64 ``[batch * texts, longest]``, with their ``attention_mask``.
        present: Whether the example has the text, bool ``[batch, texts]``; for one that it lacks, there are the tokens
            of its first text.
        given: Whether it has the text and it was not drawn, bool ``[batch, texts]``.
    """

    tokens: dict[str, Tensor]
    present: Tensor
    given: Tensor


def parts_at(batch: Mapping[str, Any], numbers: Sequence[int]) -> Parts:
    """The texts with these numbers of a batch with ``parts`` [batch, tokens].

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "parts": torch.tensor([[1, 1, -2, 0]])}
        >>> parts = parts_at(batch, [1, 2])
        >>> parts.tokens["input_ids"].tolist(), parts.present.tolist(), parts.given.tolist()
        ([[5, 6], [7, 0]], [[True, True]], [[True, False]])
    """
    part = batch[PARTS][:, None]
    wanted = torch.tensor(list(numbers), device=part.device)[:, None]
    here = part.abs() == wanted
    present, given = here.any(-1), (part == wanted).any(-1)
    here = torch.where(present[..., None], here, part.abs() == 1).flatten(0, 1)
    rows = torch.arange(len(part), device=part.device).repeat_interleave(len(wanted))
    return Parts(tokens_at(batch, here, rows, ("input_ids", "token_type_ids")), present, given)


def tokens_at(batch: Mapping[str, Any], here: Tensor, rows: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Runs of tokens of a batch, each in a row of its own and padded on the right with 0.

    Args:
        batch: A batch, int64 ``[batch, tokens]`` of each kind.
        here: Which tokens are in each run, bool ``[runs, tokens]``; they are one after another.
        rows: The example of each run, int64 ``[runs]``.
        kinds: The kinds of tokens to take, if the batch has them.

    Returns:
        The tokens, ``[runs, longest]`` of each kind, and their ``attention_mask``.
    """
    lengths = here.sum(1)
    longest = torch.arange(int(lengths.max()), device=here.device)
    place = (here.float().argmax(1)[:, None] + longest).clamp(max=here.shape[1] - 1)
    mask = longest < lengths[:, None]
    tokens = {kind: torch.where(mask, batch[kind][rows[:, None], place], 0) for kind in kinds if kind in batch}
    return {**tokens, "attention_mask": mask.long()}
