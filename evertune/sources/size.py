"""The size of a record, whatever source it comes from: bounded before anything else looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_CHARACTERS = 1 << 22
"""The most characters of a record, all fields together: 4 MiB of ASCII, as a line of an inbox may have by default."""
_MAX_DEPTH = 100
_TEXTS = (str, bytes, bytearray)
_NUMBERS = (int, float, type(None))  # asked first: whether something is a Mapping takes much longer
_CONTAINERS = (list, dict, tuple, set, frozenset, Mapping)


def check_size(record: Mapping[str, Any]) -> None:
    """Refuse a record that is too large or too deep to be masked, checked and kept.

    Every name and value counts as its length if it is a text or bytes, and every value as one more. A list is only
    looked into while the count allows it, so that even one that contains itself ends soon.

    Raises:
        ValueError: If it has more than :data:`MOST_CHARACTERS` characters, or is nested more than 100 levels deep.

    Example:
        >>> check_size({"text": ["x" * 3_000_000, "y" * 3_000_000]})
        Traceback (most recent call last):
        ValueError: the record has more than 4,194,304 characters
    """
    size, level = 0, [record]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for container in level:
            size += len(container)
            if size <= MOST_CHARACTERS:
                named = isinstance(container, (dict, Mapping))
                for part in [*container, *container.values()] if named else container:
                    if isinstance(part, _TEXTS):
                        size += len(part)
                    elif not isinstance(part, _NUMBERS) and isinstance(part, _CONTAINERS):
                        inner.append(part)
            if size > MOST_CHARACTERS:
                raise ValueError(f"the record has more than {MOST_CHARACTERS:,} characters")
        if not inner:
            return
        level = inner
    raise ValueError(f"the record is nested more than {_MAX_DEPTH} levels deep")
