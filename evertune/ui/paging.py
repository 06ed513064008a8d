"""Long lists, a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urlencode

from starlette.requests import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a long list.

    Args:
        items: The items of the page.
        total: Number of all items.
        number: Number of the page, counted from 1.
        last: Number of the last page.
        address: Address of any page, to which its number is added.
    """

    items: Sequence[T]
    total: int
    number: int
    last: int
    address: str

    @classmethod
    def of(cls, items: Sequence[T], request: Request, size: int) -> Page[T]:
        """The page that a request asks for by ``page``; the nearest one there is."""
        last = max(1, -(-len(items) // size))
        asked = request.query_params.get("page", "1")
        number = min(max(int(asked), 1), last) if asked.isdecimal() and len(asked) < 10 else 1
        others = [(name, value) for name, value in request.query_params.multi_items() if name != "page"]
        start = (number - 1) * size
        return cls(items[start : start + size], len(items), number, last, f"?{urlencode([*others, ('page', '')])}")
