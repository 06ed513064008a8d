"""Dataclasses from JSON objects, with every field checked, and back to plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import datetime
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def from_json(kind: type[T], value: Any) -> T:
    """Parse a dataclass from a decoded JSON object.

    A field is a ``str``, ``int``, ``float``, ``bool``, ``datetime`` (ISO 8601), ``Literal``, dataclass or ``Any``, a
    ``list`` or ``dict`` of these, or an optional one of them. Keys without a field are ignored, since a later version
    may have written them.

    Raises:
        ValueError: If a field is missing or has another type; the message names it by its path.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Slice:
        ...     name: str
        ...     examples: int = 0
        >>> from_json(Slice, {"name": "update-1"})
        Slice(name='update-1', examples=0)
        >>> from_json(Slice, {"examples": "7"})
        Traceback (most recent call last):
        ValueError: 'name' is missing
    """
    return _parsed(kind, value, "")  # type: ignore[no-any-return]


def to_json(value: Any) -> Any:
    """Plain values for :func:`json.dumps`: dataclasses as dicts, times in ISO 8601, None for NaN and infinity."""
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _fields(kind: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind)
    return [(field, hints[field.name]) for field in fields(kind)]


def _parsed(kind: Any, value: Any, path: str) -> Any:
    """A value as ``kind``, or a ValueError that names its path."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        parsed = value
    elif origin in (UnionType, Union):
        [inner] = [one for one in arguments if one is not NoneType]
        parsed = None if value is None else _parsed(inner, value, path)
    elif origin is Literal:
        if value not in arguments:
            raise ValueError(f"{path!r} must be one of {list(arguments)}, got {value!r}")
        parsed = value
    elif origin is list:
        items = _checked(list, value, path, "a list")
        parsed = [_parsed(arguments[0], inner, f"{path}[{number}]") for number, inner in enumerate(items)]
    elif origin is dict:
        entries = _checked(dict, value, path, "an object")
        parsed = {key: _parsed(arguments[1], inner, f"{path}.{key}") for key, inner in entries.items()}
    elif is_dataclass(kind):
        parsed = _object(kind, _checked(dict, value, path, "an object"), path)
    elif kind is datetime:
        parsed = datetime.fromisoformat(_checked(str, value, path, "a time in ISO 8601"))
    else:
        if kind is float and type(value) is int:
            value = float(value)
        parsed = _checked(kind, value, path, _WORDS[kind])
    return parsed


def _object(kind: Any, value: Mapping[str, Any], path: str) -> Any:
    given = {}
    for field, hint in _fields(kind):
        where = f"{path}.{field.name}" if path else field.name
        if field.name in value:
            given[field.name] = _parsed(hint, value[field.name], where)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where!r} is missing")
    return kind(**given)


def _checked(kind: type, value: Any, path: str, words: str) -> Any:
    # Not isinstance: a bool is an int.
    if type(value) is not kind:
        raise ValueError(f"{repr(path) if path else 'it'} must be {words}, got {value!r}")
    return value
