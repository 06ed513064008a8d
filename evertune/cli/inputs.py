"""What a version reads of a record that a command was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def missing_in(record: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """The first of the fields that is absent or empty; None if there is none."""
    return next((name for name in fields if record.get(name) in (None, "", [])), None)


def input_of(record: Mapping[str, Any], fields: Sequence[str]) -> Any:
    """What a module's ``predict`` takes: the field, or a tuple of two."""
    values = tuple(record[name] for name in fields)
    return values[0] if len(values) == 1 else values
