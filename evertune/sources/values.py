"""The checks of a record's text and label."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Integral, Rational, Real
from typing import Any


def text_value(value: Any) -> str:
    """Return the value if it is a text that is not empty."""
    if absent(value):
        raise ValueError("no text")
    if not isinstance(value, str):
        raise ValueError(f"the text is a {type(value).__name__}, not a string")
    if not value.strip():
        raise ValueError("the text is empty")
    if not is_utf8([value]):
        raise ValueError("the text has a lone surrogate, which no encoding can write")
    return value


def label_value(value: Any) -> str | list[str]:
    """The name of a label, or the names of several labels; whole numbers and truth values become names.

    Scalars of numpy and torch count as the values they hold.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if absent(value) or (isinstance(value, str) and value == ""):
        raise ValueError("no label")
    if isinstance(value, str):
        if not is_utf8([value]):  # a lone surrogate, which no encoding can write
            raise ValueError(f"the label {value[:80]!r} is not a name")
        return value
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, Integral) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if hasattr(value, "tolist") or (isinstance(value, Sequence) and not isinstance(value, bytes | bytearray)):
        names = [label_value(name) for name in value]
        if all(isinstance(name, str) for name in names):
            return list(dict.fromkeys(names))  # type: ignore[arg-type]
    raise ValueError(f"the label {reprlib.repr(value)} is not a name")


def absent(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, and pandas' NaT and NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # by name, to do without pandas
        return True
    return isinstance(value, Real) and not isinstance(value, Rational) and math.isnan(value)


def is_utf8(cells: Sequence[str]) -> bool:
    """Whether texts can be encoded as UTF-8, that is, whether none contains a lone surrogate."""
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True
