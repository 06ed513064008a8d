"""How ZeRO cuts weights into the parts of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def parts(groups: Iterable[Iterable[int]], n: int) -> list[int]:
    """Elements of each group that one of ``n`` ranks updates under ZeRO-1 and 2, padded to a multiple of ``2 n``.

    >>> parts([[10, 7], [3]], 4)
    [6, 2]
    """
    return [2 * -(-sum(group) // (2 * n)) for group in groups]


def pieces(sizes: Iterable[int], n: int) -> int:
    """Elements that one of ``n`` ranks holds of parameters that are cut one by one, as under ZeRO-3.

    >>> pieces([10, 7, 3], 4)
    6
    """
    return sum(-(-size // n) for size in sizes)


def rows_of(sizes: Sequence[int], rows: Sequence[int], n: int) -> int:
    """Elements that one of ``n`` ranks holds of parameters of which FSDP2 divides the rows, padded to equal numbers.

    >>> rows_of([10, 7, 3], rows=[5, 7, 1], n=4)  # 2 rows of 2, 2 of 1, and one of 3
    9
    """
    return sum(-(-length // n) * (size // length) for size, length in zip(sizes, rows, strict=True))


def touched(groups: Iterable[Iterable[int]], n: int) -> int:
    """Elements of all parameters that lie in a rank's part or reach into it, for the rank with the most of them.

    >>> touched([[10, 7], [3]], 4)  # parts of 6 and 2: the second rank's reaches into both parameters of 10 and 7
    20
    """
    per_rank = [0] * n
    for group, part in zip(groups := [list(group) for group in groups], parts(groups, n), strict=True):
        start = 0
        for size in group:
            for rank in range(start // part, (start + size - 1) // part + 1) if size else ():
                per_rank[rank] += size
            start += size
    return max(per_rank)
