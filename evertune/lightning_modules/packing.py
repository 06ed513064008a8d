"""Packing: texts of a batch behind one another in fewer rows, so that less is padded, without one seeing another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where the texts of a batch are in the packed rows.

    Args:
        rows: The row of each text.
        starts: The position in its row at which each text starts.
        n_rows: Number of rows.
    """

    rows: list[int]
    starts: list[int]
    n_rows: int


def places_for(lengths: Sequence[int], capacity: int) -> Places:
    """Place texts in rows, longest first, each in the first row with room for it.

    Example:
        >>> places_for([3, 8, 2, 4], capacity=8)
        Places(rows=[1, 0, 2, 1], starts=[4, 0, 0, 0], n_rows=3)
    """
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    used: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        row = next((row for row, length in enumerate(used) if length + lengths[text] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        rows[text], starts[text] = row, used[row]
        used[row] += lengths[text]
    return Places(rows, starts, len(used))


def packed_logits(run: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The logits of a padded batch, computed in packed rows.

    A packed row is as long as the longest text. The positions of each text start at 0 again, by which transformers
    recognises packed texts and masks the attention between them: but only without a padding mask and without a
    key-value cache, which its models make even in training unless they are told not to. With one, texts see those
    before them, and nothing reports it (transformers 5.24).

    Args:
        run: The model, a function that returns an output with ``logits``.
        input_ids: Tokens ``[batch, tokens]``.
        attention_mask: 1 for a token and 0 for padding, ``[batch, tokens]``.

    Returns:
        Logits ``[batch, tokens, vocabulary]``; those of padding mean nothing.
    """
    real = attention_mask.bool()
    places = places_for(real.sum(1).tolist(), input_ids.shape[1])
    if places.n_rows == len(input_ids):  # nothing is saved
        plain: Tensor = run(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return plain
    position = (real.cumsum(1) - 1)[real]
    n_tokens = real.sum(1)
    rows = torch.tensor(places.rows, device=real.device).repeat_interleave(n_tokens)
    columns = torch.tensor(places.starts, device=real.device).repeat_interleave(n_tokens) + position
    packed = input_ids.new_zeros(places.n_rows, input_ids.shape[1])
    positions = torch.zeros_like(packed)  # at the end of a row, each position 0 is a text of its own
    packed[rows, columns] = input_ids[real]
    positions[rows, columns] = position
    logits = run(input_ids=packed, position_ids=positions, use_cache=False).logits
    unpacked: Tensor = logits.new_zeros(*input_ids.shape, logits.shape[-1])
    unpacked[real] = logits[rows, columns]
    return unpacked


def check_packing(run: Callable[..., Any], device: torch.device) -> None:
    """Check that a model gives packed texts the logits that each has alone. Call on every rank, in evaluation mode.

    Args:
        run: As for :func:`packed_logits`.
        device: Device of the model.

    Raises:
        ValueError: If it does not.
    """
    ids = torch.arange(1, 9, device=device).reshape(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=device)
    ids, mask = torch.cat([ids, ids.flip(1)]), torch.cat([mask, mask])
    packed = packed_logits(run, ids, mask)
    alone = run(input_ids=ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    off = float((packed[real] - alone[real]).abs().max() / alone[real].abs().max())
    if not off <= max(1e-3, 8 * torch.finfo(alone.dtype).eps):
        raise ValueError(
            f"packing=True changes the logits of this model by {off:.2g} of the largest: its texts see one another in "
            "a packed row, or are computed in too little precision; leave packing out"
        )
