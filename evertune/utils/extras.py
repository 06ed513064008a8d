"""What the sources that read from a server share: their library and their secrets."""

from __future__ import annotations

import importlib
from typing import Any


def library(module: str, extra: str) -> Any:
    """An optional library, or how to install it.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "evertune[{extra}]"', name=error.name) from error
