"""What the sources that read from a server share: their library and their secrets."""

from __future__ import annotations

import importlib
import os
import re
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


def fill_in(setting: str) -> str:
    """A setting with each ``${NAME}`` replaced by that environment variable: so no configuration holds a password.

    Raises:
        ValueError: when the variable is not set.

    Example:
        >>> os.environ["REDIS_PASSWORD"] = "secret"
        >>> fill_in("redis://:${REDIS_PASSWORD}@localhost:6379/0")
        'redis://:secret@localhost:6379/0'
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"the environment variable {match[1]} is not set, and a setting names it")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, setting)


def without_secrets(url: str) -> str:
    """A URL that may be shown: without user, password and options.

    Example:
        >>> without_secrets("redis://evertune:p@ss?word@localhost:6379/0?password=secret")
        'redis://localhost:6379/0'
    """
    return re.sub(r"://.*@", "://", url, flags=re.DOTALL).split("?")[0]
