"""Secrets: read from the environment and never shown."""

from __future__ import annotations

import os
import re


def fill_in(setting: str) -> str:
    """A setting with each ``${NAME}`` replaced by that environment variable, so that configurations need no passwords.

    Raises:
        ValueError: If the variable is not set.

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


def place_of(url: str) -> str:
    """The address in a URL, without user, password and options.

    Example:
        >>> place_of("redis://evertune:p@ss?word@localhost:6379/0?password=secret")
        'redis://localhost:6379/0'
    """
    return re.sub(r"://.*@", "://", url, flags=re.DOTALL).split("?")[0]


def without_secrets(words: str) -> str:
    """Text with the passwords and tokens in URLs masked.

    Example:
        >>> without_secrets("redis://feed:p@ss@broker:6379 and https://host/x?a=1&token=secret do not answer")
        'redis://feed:***@broker:6379 and https://host/x?a=1&token=*** do not answer'
    """
    words = re.sub(r"(://[^/\s:@\"]*):[^/\s\"]+@", r"\1:***@", words)
    return re.sub(r"(?i)([?&](?:password|passwd|token|secret|key|sig|signature)=)[^&\s\"']+", r"\1***", words)
