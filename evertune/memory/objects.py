"""Objects of common types as plain values and back, without running code named in a file.

Namedtuples, dataclasses and enums are rebuilt from the import path of their class. Importing a module runs its code, so
a class is only looked up in modules that the process has already imported. It must be of exactly the kind that was
stored, and its instances are filled without calling its own ``__new__``, ``__init__`` or ``__post_init__``.
"""

from __future__ import annotations

import datetime
import enum
import sys
from collections import OrderedDict
from types import MemberDescriptorType
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

_BATCH_ENCODING = ("transformers.tokenization_utils_base", "BatchEncoding")


class MissingTypeError(ValueError):
    """The class of a stored object is missing, or is not of the kind that was stored."""


def take_apart(value: Any) -> tuple[str, list[Any], Any] | None:  # noqa: PLR0911  (one return a type)
    """Split an object into its kind, details as JSON values, and a plain value with its content.

    Returns:
        None if the type is not supported.
    """
    cls = type(value)
    if cls is OrderedDict:
        return "ordered", [], dict(value)
    if cls is np.str_:
        return "text", [str(value)], None
    if cls is datetime.date:
        return "date", [value.isoformat()], None
    if cls is datetime.timedelta:
        return "timedelta", _units(value), None
    if cls is datetime.datetime:
        zone = _zone(value.tzinfo)
        return None if zone is None else ("datetime", [value.replace(tzinfo=None).isoformat(), value.fold, zone], None)
    if (cls.__module__, cls.__qualname__) == _BATCH_ENCODING:
        return "encoding", [], dict(value)
    kind = _kind(cls)
    if kind is None or _find(cls.__module__, cls.__qualname__) is not cls:
        return None
    path = [cls.__module__, cls.__qualname__]
    if kind == "enum":
        return (kind, [*path, value.name], None) if value.name in vars(cls)["_member_map_"] else None
    return kind, path, tuple(value) if kind == "namedtuple" else _state(value)


def put_together(kind: str, details: list[Any], inner: Any) -> Any:  # noqa: PLR0911  (one return a type)
    """Rebuild an object that :func:`take_apart` split.

    Raises:
        MissingTypeError: If the class of a namedtuple, dataclass or enum is not in an imported module.
    """
    match kind:
        case "ordered":
            return OrderedDict(inner)
        case "text":
            return np.str_(details[0])
        case "date":
            return datetime.date.fromisoformat(details[0])
        case "timedelta":
            return datetime.timedelta(*details)
        case "datetime":
            iso, fold, zone = details
            return datetime.datetime.fromisoformat(iso).replace(fold=fold, tzinfo=_zone_of(zone))
        case "encoding":
            from transformers import BatchEncoding

            return BatchEncoding(inner)
    module, name, *rest = details
    cls = _find(module, name)
    if cls is None or _kind(cls) != kind:
        raise MissingTypeError(
            f"a stored example holds a {module}.{name}, and there is no such {kind} in this process: import {module} "
            "before the memory is read, or bring the class back to where it was when the example was stored"
        )
    if kind == "enum":
        members = vars(cls)["_member_map_"]
        if rest[0] not in members:
            raise MissingTypeError(f"a stored example holds {module}.{name}.{rest[0]}, which the enum no longer has")
        return members[rest[0]]
    if kind == "namedtuple":
        if len(inner) != len(vars(cls)["_fields"]):
            raise MissingTypeError(f"a stored example holds a {module}.{name} with {len(inner)} fields: it has changed")
        return tuple.__new__(cls, inner)
    return _filled(cls, inner)


def _find(module: str, qualname: str) -> type | None:
    """A class of an imported module, found without triggering code of the module or of a class."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        # vars() instead of getattr(), which would call a module's or a metaclass's __getattr__.
        found = None if found is None else vars(found).get(name)
        if not isinstance(found, type):
            return None
    return found  # type: ignore[no-any-return]


def _kind(cls: type) -> str | None:
    """The kind of a class, if its instances can be filled without running its code."""
    if isinstance(cls, enum.EnumMeta):
        return "enum"
    if hasattr(cls, "__del__"):  # it would run when the object is deleted
        return None
    if cls.__bases__ == (tuple,) and isinstance(vars(cls).get("_fields"), tuple):
        return "namedtuple"
    own_new: Any = cls.__new__
    return "dataclass" if "__dataclass_fields__" in vars(cls) and own_new is object.__new__ else None


def _slots(cls: type) -> dict[str, MemberDescriptorType]:
    return {
        name: slot
        for base in reversed(cls.__mro__)
        for name, slot in vars(base).items()
        if isinstance(slot, MemberDescriptorType)
    }


def _state(value: Any) -> dict[str, Any]:
    """All attributes of an instance, including those in slots."""
    slots = {name: slot for name, slot in _slots(type(value)).items() if hasattr(value, name)}
    # Bypasses a __getattribute__ of the class.
    attributes = object.__getattribute__(value, "__dict__") if type(value).__dictoffset__ else {}
    return {name: slot.__get__(value) for name, slot in slots.items()} | dict(attributes)


def _filled(cls: type, state: dict[str, Any]) -> Any:
    value: Any = object.__new__(cls)
    slots = _slots(cls)
    for name, item in state.items():
        if name in slots:
            slots[name].__set__(value, item)
        elif cls.__dictoffset__:
            object.__getattribute__(value, "__dict__")[name] = item
        else:
            raise MissingTypeError(f"{cls.__module__}.{cls.__qualname__} no longer has {name!r}, which an example has")
    return value


def _units(delta: datetime.timedelta) -> list[int]:
    return [delta.days, delta.seconds, delta.microseconds]


def _zone(zone: datetime.tzinfo | None) -> list[Any] | None:
    """A time zone as plain values; empty for none, None for an unsupported kind."""
    if zone is None:
        return []
    if type(zone) is datetime.timezone:
        return [_units(zone.utcoffset(None)), zone.tzname(None)]
    return [zone.key] if type(zone) is ZoneInfo and zone.key else None


def _zone_of(zone: list[Any]) -> datetime.tzinfo | None:
    if len(zone) == 2:
        return datetime.timezone(datetime.timedelta(*zone[0]), zone[1])
    return ZoneInfo(zone[0]) if zone else None
