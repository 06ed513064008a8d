"""JSON values: parsed strictly from the text of a message, or converted from the values of a database or table."""

from __future__ import annotations

import json
import math
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

_MAX_DEPTH = 100


def json_object(data: bytes, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: Its text, in UTF-8.
        strict: Refuse values that cannot be written back as JSON: NaN, numbers and nesting that are too large, half
            surrogate pairs. Otherwise only what cannot be parsed, and nesting that is too deep, is refused.

    Raises:
        ValueError: With the reason, if ``data`` is not a JSON object, or has values that are refused.

    Example:
        >>> json_object(b'{"text": "hello"}')
        {'text': 'hello'}
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError("not valid UTF-8") from None
    try:
        value = (_DECODER if strict else _LENIENT).decode(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}")
    # The full check is slow and needed only for deep nesting, or for an escape that may be half a surrogate pair.
    deep = text.count("{") + text.count("[") > _MAX_DEPTH
    if strict and (deep or "\\ud" in text or "\\uD" in text):
        plain(value)
    elif deep and _depth(value, _MAX_DEPTH) > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    return value


def plain(value: Any, depth: int = _MAX_DEPTH, decode: bool = False) -> Any:  # noqa: PLR0911
    """Convert a value to JSON: times to ISO 8601, decimals (exactly) and UUIDs to strings, durations to seconds.

    Args:
        value: Any value.
        depth: Maximum nesting depth.
        decode: Decode bytes as UTF-8; by default they are refused.

    Raises:
        ValueError: With the reason, if the value has no JSON equivalent.

    Example:
        >>> plain({"at": date(2026, 1, 31), "price": Decimal("1.10")})
        {'at': '2026-01-31', 'price': '1.10'}
    """
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return _whole(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a JSON number")
        return value
    if depth == 0:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    if isinstance(value, dict):
        return {_whole(str(name)): plain(item, depth - 1, decode) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth - 1, decode) for item in value]
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    if decode and isinstance(value, bytes):
        return value.decode()
    raise ValueError(f"a value of type {type(value).__name__} has no JSON equivalent")


def _depth(value: Any, most: int) -> int:
    """How deep a value is nested, 0 for a number; counted to ``most + 1``."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None or most < 0:
        return 0
    return 1 + max((_depth(part, most - 1) for part in parts), default=0)


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("contains half a surrogate pair, which is not a valid character") from None
    return text


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"the number {number[:20]} is too large")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


_LENIENT = json.JSONDecoder()
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_number)
