"""Packages that import a module only when one of its names is accessed."""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def face(package: str, homes: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """The attributes that a package's ``__init__`` needs to export names lazily.

    Args:
        package: ``__name__`` of the package.
        homes: Names of modules, each with the names that it defines, separated by spaces.

    Returns:
        ``(__all__, __getattr__, __dir__)`` of the package.

    Example:
        >>> names, get, _ = face("evertune.metrics", {"evertune.metrics.functional": "forgetting average_accuracy"})
        >>> names, get("forgetting").__module__
        (['average_accuracy', 'forgetting'], 'evertune.metrics.functional')
    """
    home = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home[name]), name)
        # Cached: Python calls a module's __getattr__ only for names that are missing.
        setattr(sys.modules[package], name, value)
        return value

    return sorted(home), get, lambda: sorted(home)
