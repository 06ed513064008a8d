"""What the sources that read from a server share: their library, their secrets, the JSON in their messages."""

from __future__ import annotations

import importlib
import json
import os
import re
from typing import Any, NoReturn


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
            raise ValueError(f"the environment variable {match[1]} is not set, and a setting of the source names it")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, setting)


def without_secrets(url: str) -> str:
    """A URL that may be shown: without user, password and options.

    Example:
        >>> without_secrets("redis://evertune:p@ss?word@localhost:6379/0?password=secret")
        'redis://localhost:6379/0'
    """
    return re.sub(r"://.*@", "://", url, flags=re.DOTALL).split("?")[0]


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a message holds.

    Raises:
        ValueError: with the reason why it holds none.

    Example:
        >>> json_object(b'{"text": "hello"}')
        {'text': 'hello'}
    """
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("not readable: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
