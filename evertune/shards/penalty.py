"""A quadratic pull towards an anchor, on the gradient of the weights as each rank holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evertune.shards.shards import Fragment, ParameterShards

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements processed at a time; on CPU, as many as stay in the caches between two operations."""


class QuadraticPenalty:
    """The pull of ``scale / 2 * sum importance * (weight - anchor)^2``, in place, a chunk at a time.

    :meth:`add_gradient` adds its gradient, ``scale * importance * (weight - anchor)``; :meth:`pull` moves a weight
    itself. A matrix in which most rows have no importance (such as the embeddings of tokens that were not seen) is
    processed only on its other rows.

    Args:
        shards: The weights.
        importance: One tensor per fragment; None if every weight has the importance 1.
        anchor: One tensor per fragment.
    """

    def __init__(self, shards: ParameterShards, importance: Sequence[Tensor] | None, anchor: Sequence[Tensor]) -> None:
        self._shards = shards
        self._importance = importance
        self._anchor = anchor
        self._rows: list[_Rows | None] = [None] * len(anchor)
        if importance is not None:
            self._rows = [_Rows.of(f, i, a) for f, i, a in zip(shards.fragments, importance, anchor, strict=True)]
        largest = max((a.numel() for a in anchor), default=1)
        device = anchor[0].device if anchor else torch.device("cpu")
        self._chunk = min(largest, _chunk_on(device))
        self._buffer = torch.empty(self._chunk, device=device)

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
                difference = self._buffer[: value[part].numel()]
                torch.sub(value[part], self._anchor[i][part], out=difference)
                # In fp32 whatever the precision of the weights, and rounded once.
                if self._importance is None:
                    gradient[part].add_(difference, alpha=scale)
                elif gradient.dtype == difference.dtype:
                    gradient[part].addcmul_(self._importance[i][part], difference, value=scale)
                else:
                    gradient[part].add_(difference.mul_(self._importance[i][part]), alpha=scale)
        self._shards.write_back()

    def pull(self, number: int, value: Tensor, scale: float) -> None:
        """Move a weight to the minimum of the penalty plus the squared distance from where it is: its proximal step.

        With ``c = scale * importance``, the weight becomes ``(weight + c * anchor) / (1 + c)``: between the two, and
        never beyond the anchor, however large ``scale`` is.

        Args:
            number: Number of the fragment.
            value: The fragment's weights, changed in place.
            scale: Strength of the penalty times the learning rate.
        """
        rows = self._rows[number]
        if rows is not None:
            rows.pull(value, scale)
            return
        for start in range(0, value.numel(), self._chunk):
            part = slice(start, start + self._chunk)
            anchor = self._anchor[number][part]
            share: Tensor | float = scale / (1 + scale)
            if self._importance is not None:
                share = _share(self._importance[number][part], scale, self._buffer[: anchor.numel()])
            if value.dtype == anchor.dtype:
                torch.lerp(value[part], anchor, share, out=value[part])
            else:
                value[part] = torch.lerp(value[part].to(anchor.dtype), anchor, share)

    def value(self, scale: float) -> Tensor:
        """``scale / 2 * sum importance * (weight - anchor)^2`` over all ranks, shape ``[]``. Call on every rank."""
        weighted = steps = [value - anchor for value, anchor in zip(self._shards.values(), self._anchor, strict=True)]
        if self._importance is not None:
            weighted = [step * importance for step, importance in zip(steps, self._importance, strict=True)]
        return scale / 2 * self._shards.dot(weighted, steps)


def _chunk_on(device: torch.device) -> int:
    return _CHUNK.get(device.type, _CHUNK["cuda"])


def _share(importance: Tensor, scale: float, out: Tensor) -> Tensor:
    """``c / (1 + c)`` for ``c = scale * importance``, also where ``c`` is 0 or infinite."""
    return torch.mul(importance, scale, out=out).reciprocal_().add_(1).reciprocal_()


class _Rows:
    """The rows of a matrix, or of the complete rows in a fragment of it, that have any importance."""

    def __init__(self, first: int, width: int, rows: Tensor, importance: Tensor, anchor: Tensor) -> None:
        self._first, self._width = first, width
        self._parts = rows.split(max(1, _chunk_on(rows.device) // width))
        self._importance, self._anchor = importance, anchor

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
        here, into = self._of(value), self._of(gradient)
        for rows in self._parts:
            pull = here[rows].to(self._anchor.dtype).sub_(self._anchor[rows]).mul_(self._importance[rows])
            if into.dtype == pull.dtype:
                into.index_add_(0, rows, pull, alpha=scale)
            else:  # added in the wider of the two types, and rounded once
                into[rows] = torch.add(into[rows], pull, alpha=scale).to(into.dtype)

    def pull(self, value: Tensor, scale: float) -> None:
        here = self._of(value)
        for rows in self._parts:
            importance = self._importance[rows]
            share = _share(importance, scale, importance)
            here[rows] = torch.lerp(here[rows].to(share.dtype), self._anchor[rows], share).to(here.dtype)

    def _of(self, flat: Tensor) -> Tensor:
        n_rows = (flat.numel() - self._first) // self._width
        return flat[self._first : self._first + n_rows * self._width].view(n_rows, self._width)
