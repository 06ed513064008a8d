"""The top singular directions of matrices, and changes without them, for matrices that no rank holds whole."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from evertune.shards.shards import Fragment, ParameterShards
from evertune.utils.ranks import rank_and_world_size

Sides = Literal["either", "both"]

_BUCKET = 1 << 24
"""Numbers that are sent at once, as far as the matrices allow."""


class Subspaces:
    """The top singular directions of matrices, which :meth:`remove` takes out of changes of the matrices.

    For a matrix ``W`` with the top left and right singular vectors ``U`` (m x r) and ``V`` (n x r), a change ``D``
    becomes

    - ``(I - U U^T) D (I - V V^T)`` with ``sides="either"``: nothing of it has a protected direction on either side, so
      ``W v = s u`` and ``u^T W = s v^T`` stay for every protected triplet ``(u, s, v)``;
    - ``D - U U^T D V V^T`` with ``sides="both"``: only what has protected directions on both sides is removed, and
      ``u^T W v = s`` stays.

    Both are orthogonal projections. Directions whose singular value is zero but for rounding are not protected.

    A rank keeps the rows of ``U`` that belong to its fragment, and an equal share of the rows of ``V``; all of both
    where the weights are replicated. To find the directions, each matrix is put together on one rank, the matrices in
    turn on all ranks, and decomposed there in float64: its Gram matrix, the alternative, is no smaller. So the
    directions do not depend on the strategy. Call the constructor on every rank.

    Args:
        shards: The weights, of two dimensions each.
        weights: The weights to decompose, one flat fp32 tensor per fragment of ``shards``.
        ranks: For each parameter, the number of its directions to protect.
        sides: ``"either"`` or ``"both"``.

    Raises:
        ValueError: If a matrix holds NaN or infinity.
    """

    def __init__(
        self, shards: ParameterShards, weights: Sequence[Tensor], ranks: Mapping[str, int], sides: Sides
    ) -> None:
        self._shards = shards
        self._sides = sides
        held = {fragment.name: number for number, fragment in enumerate(shards.fragments)}
        device = weights[0].device if weights else torch.device("cpu")
        names = [name for name in shards.shapes if ranks[name] > 0]
        rank, world_size = rank_and_world_size()
        cuts = self._cuts(names, device)
        self._matrices: dict[str, _Matrix] = {}
        for first in range(0, len(names), world_size):
            turn = names[first : first + world_size]
            mine = torch.empty(0)
            for owner, name in enumerate(turn):
                whole = torch.zeros(shards.shapes[name].numel(), device=device)
                if name in held:
                    shards.fragments[held[name]].slice(whole).copy_(weights[held[name]])
                if shards.sharded:
                    shards.sum_over_ranks(whole)
                if owner == rank:
                    mine = whole.view(shards.shapes[name])
            found = top_directions(mine, ranks[turn[rank]]) if rank < len(turn) else ()
            for owner, name in enumerate(turn):
                (m, n), r = shards.shapes[name], ranks[name]
                sent = torch.zeros((m + n) * r, device=device)
                if owner == rank:
                    torch.cat([basis.flatten() for basis in found], out=sent)
                shards.sum_over_ranks(sent)
                if not sent.isfinite().all():
                    raise ValueError(f"{name} has no singular directions: it holds NaN or infinity")
                left, right = sent[: m * r].view(m, r), sent[m * r :].view(n, r)
                number = held.get(name, -1)
                fragment = Fragment(name, shards.shapes[name], 0, 0) if number < 0 else shards.fragments[number]
                share = range(n)
                if shards.sharded:
                    size = math.ceil(n / world_size)
                    share = range(n)[size * rank : size * (rank + 1)]
                self._matrices[name] = _Matrix(fragment, number, left, right, share, cuts[name])

    def remove(self, names: Collection[str], changes: Mapping[int, Tensor]) -> None:
        """Remove the protected directions from changes of the matrices, in place. Call on every rank.

        Args:
            names: Parameters that have changed, in the same order on all ranks; those without directions do not matter.
            changes: For the number of each of this rank's fragments of them, how it has changed: flat, in fp32.
        """
        matrices = [self._matrices[name] for name in names if name in self._matrices]
        with _full_precision():
            for bucket in self._buckets(matrices):
                blocks = [one.block(changes) for one in bucket]
                for one, block, parts in zip(bucket, blocks, self._exchanged(bucket, blocks), strict=True):
                    self._remove(one, block, *parts)
                    one.write(block, changes)

    def _remove(self, one: _Matrix, block: Tensor, products: Tensor, right: Tensor, cut: Tensor) -> None:
        """Project this rank's rows of a change ``D``; ``products`` is ``U^T D``."""
        if self._sides == "both":
            block.addmm_(one.left, products @ right @ right.T, alpha=-1)
            return
        here, there = one.cuts_here()
        block[here] = cut[there]
        block.addmm_(one.left, products, alpha=-1)
        block.addmm_(block @ right, right.T, alpha=-1)

    def _exchanged(self, bucket: list[_Matrix], blocks: list[Tensor]) -> Iterator[list[Tensor]]:
        """For each matrix: ``U^T D``, ``V``, and the rows of ``D`` that are divided among ranks; one collective."""
        parts = [part for one, block in zip(bucket, blocks, strict=True) for part in one.parts(block)]
        if self._shards.sharded:
            sent = self._shards.sum_over_ranks(torch.cat([part.flatten() for part in parts]))
            pieces = sent.split([part.numel() for part in parts])
            parts = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        for first in range(0, len(parts), 3):
            yield parts[first : first + 3]

    def _buckets(self, matrices: list[_Matrix]) -> Iterator[list[_Matrix]]:
        bucket: list[_Matrix] = []
        for one in matrices:
            if bucket and sum(other.n_sent for other in bucket) + one.n_sent > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(one)
        if bucket:
            yield bucket

    def _cuts(self, names: list[str], device: torch.device) -> dict[str, list[int]]:
        """For each matrix, the rows in the middle of which a fragment of some rank starts."""
        if not self._shards.sharded or self._sides == "both":
            return {name: [] for name in names}
        rank, world_size = rank_and_world_size()
        starts = torch.zeros(len(names), world_size, dtype=torch.int64, device=device)
        offsets = {fragment.name: fragment.offset for fragment in self._shards.fragments}
        starts[:, rank] = torch.tensor([offsets.get(name, 0) for name in names])
        widths = {name: self._shards.shapes[name][1] for name in names}
        return {
            name: sorted({start // widths[name] for start in row if start % widths[name]})
            for name, row in zip(names, self._shards.sum_over_ranks(starts).tolist(), strict=True)
        }


class _Matrix:
    """This rank's rows of a matrix, the first and the last of them perhaps in part, and of its directions.

    Args:
        fragment: What this rank holds of the matrix.
        number: Number of the fragment; -1 if this rank holds nothing.
        left: All of ``U``, of which the rows of the fragment are kept.
        right: All of ``V``, of which ``share`` is kept.
        share: Rows of ``V`` that this rank keeps.
        cuts: Rows of the matrix that are divided among ranks.
    """

    def __init__(
        self, fragment: Fragment, number: int, left: Tensor, right: Tensor, share: range, cuts: list[int]
    ) -> None:
        self._number, self._share, self._cuts = number, share, cuts
        self._width = fragment.shape[1]
        self._first = fragment.offset // self._width
        self._n_rows = math.ceil((fragment.offset + fragment.numel) / self._width) - self._first
        self._start = fragment.offset - self._first * self._width
        self._numel = fragment.numel
        self._has_whole_rows = self._numel == self._n_rows * self._width
        self._n_right = len(right)
        self.left = left[self._first : self._first + self._n_rows].clone()
        self._right = right[share.start : share.stop].clone()

    @property
    def n_sent(self) -> int:
        """How many numbers are sent in a step."""
        return (2 * self.left.shape[1] + len(self._cuts)) * self._width

    def block(self, changes: Mapping[int, Tensor]) -> Tensor:
        """The change of this rank's rows, zero where they belong to others; the fragment itself if they do not."""
        if self._number in changes and self._has_whole_rows:
            return changes[self._number].view(self._n_rows, self._width)
        block = self.left.new_zeros(self._n_rows * self._width)
        if self._number in changes:
            block[self._start : self._start + self._numel] = changes[self._number]
        return block.view(self._n_rows, self._width)

    def write(self, block: Tensor, changes: Mapping[int, Tensor]) -> None:
        """Write a block back where it is a copy."""
        if self._number in changes and not self._has_whole_rows:
            changes[self._number].copy_(block.flatten()[self._start : self._start + self._numel])

    def parts(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What this rank contributes to ``U^T D``, to ``V`` and to the rows that are divided."""
        right = self._right
        if len(self._share) < self._n_right:
            right = right.new_zeros(self._n_right, right.shape[1])
            right[self._share.start : self._share.stop] = self._right
        cut = block.new_zeros(len(self._cuts), self._width)
        here, there = self.cuts_here()
        cut[there] = block[here]
        return self.left.T @ block, right, cut

    def cuts_here(self) -> tuple[list[int], list[int]]:
        """The divided rows of which this rank has a part: their numbers in the block, and among all divided rows."""
        own = [(row - self._first, i) for i, row in enumerate(self._cuts) if 0 <= row - self._first < self._n_rows]
        return [row for row, _ in own], [i for _, i in own]


def top_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the spaces that the top left and right singular vectors of a matrix span.

    They are computed in float64, from the smaller of the two Gram matrices. Instead of directions whose singular value
    is zero up to the rounding of fp32 there are columns of zeros; NaN, if the matrix is not finite.

    Args:
        matrix: Matrix of shape ``[m, n]``.
        rank: Number of directions, at most ``min(m, n)``.

    Returns:
        The bases in fp32, ``[m, rank]`` and ``[n, rank]``.

    Example:
        >>> left, right = top_directions(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), rank=1)
        >>> left.abs().flatten().tolist(), right.abs().flatten().tolist()
        ([1.0, 0.0, 0.0], [1.0, 0.0])
    """
    m, n = matrix.shape
    if not matrix.isfinite().all():
        return matrix.new_full((m, rank), math.nan), matrix.new_full((n, rank), math.nan)
    if m < n:
        right, left = top_directions(matrix.T, rank)
        return left, right
    tall = matrix.double()
    squares, vectors = torch.linalg.eigh(tall.T @ tall)  # ascending
    squares, vectors = squares[n - rank :].flip(0), vectors[:, n - rank :].flip(1)
    others = torch.linalg.qr(tall @ vectors).Q
    smallest = torch.finfo(torch.float32).eps * max(m, n)
    real = squares > squares[:1] * smallest**2
    return (others * real).float(), (vectors * real).float()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, whatever has been set for the training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
