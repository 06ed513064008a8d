"""Importing optional libraries."""

from __future__ import annotations

import importlib
from typing import Any


def library(module: str, extra: str) -> Any:
    """An optional library, or an error with the command that installs it.

    Raises:
        ModuleNotFoundError: If the library is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "evertune[{extra}]"', name=error.name) from error
