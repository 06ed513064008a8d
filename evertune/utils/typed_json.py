"""JSON from elsewhere: decoded within limits, parsed into dataclasses with every field checked, and written back."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

MOST_BYTES = 256 * 2**20
"""Size up to which a file of JSON is decoded, which takes about ten times as much memory."""
MOST_LEVELS = 100
"""Number of nested lists and objects up to which JSON is decoded; evertune's own files need fewer than ten."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
SEAL = "digest"
"""Name of the entry that :func:`sealed` adds."""
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def decode(content: bytes | str, *, most_bytes: int = MOST_BYTES, surrogates: bool = False) -> Any:
    """Decode JSON that somebody else may have written or damaged. Whatever is wrong with it is a ValueError.

    Args:
        content: The JSON.
        most_bytes: Size up to which it is decoded. Default: 256 MiB.
        surrogates: Whether strings may contain half of a surrogate pair, which no file or terminal can show. Default:
            False.

    Raises:
        ValueError: If it is not JSON in UTF-8, too large, nested too deep, or holds a number that is not finite.

    Example:
        >>> decode(b'{"loss": 0.5}')
        {'loss': 0.5}
        >>> decode(b'{"loss": 1e400}')
        Traceback (most recent call last):
        ValueError: it holds the number 1e400, which is not finite
    """
    raw = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    if len(raw) > most_bytes:
        raise ValueError(f"it has {len(raw)} bytes, more than the {most_bytes} that are read")
    try:
        value = json.loads(content, parse_float=_finite, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep") from None
    # Counting the brackets costs nothing, and rules out deep nesting in nearly all files.
    if raw.count(b"[") + raw.count(b"{") > MOST_LEVELS and _is_deeper(value, MOST_LEVELS):
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
    if not surrogates and _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is not text") from None
    return value


def read_json(kind: type[T], content: bytes | str, *, most_bytes: int = MOST_BYTES) -> T:
    """Decode JSON that somebody else may have written or damaged, and parse it as :func:`from_json` does.

    Raises:
        ValueError: As for :func:`decode` and :func:`from_json`.
    """
    return from_json(kind, decode(content, most_bytes=most_bytes))


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


@contextmanager
def foreign(what: str | Path) -> Iterator[None]:
    """A context for the use of decoded values that nothing has checked: whatever does not fit becomes a ValueError.

    Args:
        what: Name of the file that they come from, for the message.

    Raises:
        ValueError: If the values lack something, or have another type or an impossible value.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        known = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} is damaged or was written by something else: {known}") from error


def sealed(values: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """JSON values with a digest of them, by which :func:`check_seal` finds what was changed later.

    Args:
        values: An object of JSON values.
        without: Names of entries that the digest leaves out.
    """
    return {**values, SEAL: _digest(json.loads(json.dumps(values)), without)}


def check_seal(values: Mapping[str, Any], known: Collection[str], without: Collection[str] = ()) -> None:
    """Compare the values of a file with their digest. A file without one, as others may write it, is not checked.

    Args:
        values: Decoded content of the file.
        known: Names of the entries that it may have. Without a digest, other names are an error: one of them may have
            been that of the digest.
        without: As for :func:`sealed`.

    Raises:
        ValueError: If a value was changed.
    """
    if SEAL in values and values[SEAL] != _digest(values, without):
        raise ValueError("it does not match its own digest: it was changed after it was written")
    if SEAL not in values and (unknown := sorted(values.keys() - set(known))):
        raise ValueError(f"it has the unknown entry {unknown[0]!r}")


def _digest(values: Mapping[str, Any], without: Collection[str]) -> str:
    rest = {name: value for name, value in values.items() if name != SEAL and name not in without}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
        if not isinstance(value, str | int) or value not in arguments:
            raise ValueError(f"{path!r} must be one of {list(arguments)}, got {_shown(value)}")
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
        parsed = _time(_checked(str, value, path, "a time in ISO 8601"), path)
    else:
        if kind is float and type(value) is int:
            value = _float(value, path)
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
        raise ValueError(f"{repr(path) if path else 'it'} must be {words}, got {_shown(value)}")
    return value


def _time(value: str, path: str) -> datetime:
    try:
        time = datetime.fromisoformat(value)
        time.astimezone(UTC)  # fails within a day of the first and the last year
    except (ValueError, OverflowError):
        raise ValueError(f"{path!r} must be a time in ISO 8601, got {_shown(value)}") from None
    return time


def _float(value: int, path: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{path!r} must be a number, got {_shown(value)}, which is too large") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text[:40]}, which is not finite")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than so many levels deep."""
    level = [value]
    for _ in range(levels):
        inner = (one.values() if type(one) is dict else one for one in level if type(one) in (dict, list))
        level = [one for many in inner for one in many]
    return any(type(one) in (dict, list) for one in level)


def _shown(value: Any) -> str:
    """A foreign value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
