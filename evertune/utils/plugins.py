"""Extensions of evertune by other packages, through entry points: launchers, sources, triggers and methods."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from evertune.utils.terminal import complain

CLASSES = ("sources", "triggers", "methods")
"""Kinds of entry points that are classes, which YAML can name; the fourth kind is ``launchers``."""


def class_at(path: str) -> Any:
    """The class at an import path, ``package.module.Name`` or ``package.module:Name``.

    Raises:
        ImportError, AttributeError: If there is none.
        ValueError: If the path names no package.

    Example:
        >>> class_at("collections.Counter")
        <class 'collections.Counter'>
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise ValueError(f"a class is named by its import path, such as my_package.MyModule, got {path!r}")
    return getattr(import_module(module), name)


def plugins(kind: str) -> dict[str, EntryPoint]:
    """The entry points of the group ``evertune.<kind>`` by name; nothing is imported."""
    return {point.name: point for point in sorted(entry_points(group=f"evertune.{kind}"))}


def load(point: EntryPoint) -> Any:
    """The object of an entry point; None, and a line on stderr with its name and the reason, if it cannot be used."""
    try:
        found = point.load()
        if point.group.removeprefix("evertune.") in CLASSES and getattr(found, "__name__", None) != point.name:
            raise ValueError(f"{point.value} is not a class of that name: name the entry point after its class")
    except Exception as error:  # a broken package must not break the others
        package = f" of {point.dist.name}" if point.dist else ""
        reason = f"{type(error).__name__}: {error}"
        complain("evertune", f"the entry point {point.group}: {point.name}{package} cannot be used: {reason}")
        return None
    return found


def load_classes() -> None:
    """Import the sources, triggers and methods of other packages, so that a configuration can name them."""
    for kind in CLASSES:
        for point in plugins(kind).values():
            load(point)
