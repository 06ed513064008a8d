"""A quadratic pull towards an anchor, on the gradient of the weights as each rank holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evertune.shards.shards import Fragment, ParameterShards

_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Elements processed at a time; on CPU, as many as stay in the caches between two operations."""


class QuadraticPenalty:
    """Adds ``scale * importance * (weight - anchor)`` to the gradient, in place, without allocating memory per step.

    A matrix in which most rows have no importance (such as the embeddings of tokens that were not seen) is processed
    only on its other rows.

    Args:
        shards: The weights.
        importance: One tensor per fragment.
        anchor: One tensor per fragment.
    """

    def __init__(self, shards: ParameterShards, importance: Sequence[Tensor], anchor: Sequence[Tensor]) -> None:
        self._shards = shards
        self._importance = importance
        self._anchor = anchor
        self._rows = [_Rows.of(f, i, a) for f, i, a in zip(shards.fragments, importance, anchor, strict=True)]
        largest = max((i.numel() for i in importance), default=1)
        device = importance[0].device if importance else torch.device("cpu")
        self._chunk = min(largest, _CHUNK.get(device.type, _CHUNK["cuda"]))
        self._difference = torch.empty(self._chunk, device=device)

    def add_gradient(self, scale: float) -> None:
        """Add the gradient of :meth:`value`, multiplied by the current loss scale like the gradients."""
        scale *= self._shards.gradient_scale
        for i, (value, gradient) in enumerate(zip(self._shards.values(), self._shards.gradients(), strict=True)):
            rows = self._rows[i]
            if rows is not None:
                rows.add_gradient(value, gradient, scale)
                continue
            for start in range(0, value.numel(), self._chunk):
                part = slice(start, start + self._chunk)
                difference = self._difference[: value[part].numel()]
                torch.sub(value[part], self._anchor[i][part], out=difference)
                # In fp32 whatever the precision of the weights, and rounded once.
                if gradient.dtype == difference.dtype:
                    gradient[part].addcmul_(self._importance[i][part], difference, value=scale)
                else:
                    gradient[part].add_(difference.mul_(self._importance[i][part]), alpha=scale)
        self._shards.write_back()

    def value(self, scale: float) -> Tensor:
        """``scale / 2 * sum importance * (weight - anchor)^2`` over all ranks, shape ``[]``. Call on every rank."""
        steps = [value - anchor for value, anchor in zip(self._shards.values(), self._anchor, strict=True)]
        weighted = [step * importance for step, importance in zip(steps, self._importance, strict=True)]
        return scale / 2 * self._shards.dot(weighted, steps)


class _Rows:
    """The rows of a matrix, or of the complete rows in a fragment of it, that have any importance."""

    def __init__(self, first: int, width: int, rows: Tensor, importance: Tensor, anchor: Tensor) -> None:
        self._first, self._width, self._rows = first, width, rows
        self._importance = importance[rows]
        self._anchor = anchor[rows]
        self._difference = torch.empty_like(self._anchor)

    @classmethod
    def of(cls, fragment: Fragment, importance: Tensor, anchor: Tensor) -> _Rows | None:
        """None if it does not pay off: for vectors, and if at least half of the rows have importance."""
        if len(fragment.shape) < 2 or fragment.numel == 0:
            return None
        width = math.prod(fragment.shape[1:])
        first = -fragment.offset % width  # a fragment may begin and end in the middle of a row
        last = first + (fragment.numel - first) // width * width
        if last <= first or importance[:first].any() or importance[last:].any():
            return None
        whole = importance[first:last].view(-1, width)
        rows = whole.any(1).nonzero().squeeze(1)
        if 2 * len(rows) >= len(whole):
            return None
        return cls(first, width, rows, whole, anchor[first:last].view(-1, width))

    def add_gradient(self, value: Tensor, gradient: Tensor, scale: float) -> None:
        if value.dtype == self._difference.dtype:
            torch.index_select(self._of(value), 0, self._rows, out=self._difference)
        else:
            self._difference.copy_(self._of(value)[self._rows])
        self._difference.sub_(self._anchor).mul_(self._importance)
        into = self._of(gradient)
        if into.dtype == self._difference.dtype:
            into.index_add_(0, self._rows, self._difference, alpha=scale)
        else:  # added in the wider of the two types, and rounded once
            into[self._rows] = torch.add(into[self._rows], self._difference, alpha=scale).to(into.dtype)

    def _of(self, flat: Tensor) -> Tensor:
        n_rows = (flat.numel() - self._first) // self._width
        return flat[self._first : self._first + n_rows * self._width].view(n_rows, self._width)
