"""Secrets: read from the environment, and never shown or recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")

_REFERENCE = re.compile(r"\$\{(\w+)\}")
_MASK = "***"

_OPEN = r"passw(?:or)?d|passphrase|pwd|secret|credentials?|signature|authorization|connection[-_.]?string"
_KEYS = r"(?:api|access|account|secret|private|shared|encryption|master)[-_.]?key"
_TOKENS = r"(?:access|auth|refresh|id|session|security|sas|bearer|api)[-_.]?token"
_STRONG = rf"[\w.-]{{0,60}}(?:{_OPEN}|{_KEYS}|{_TOKENS})"
"""Names that hold a secret wherever they stand; ``pad_token`` and ``sort_key`` do not."""
_WEAK = rf"{_STRONG}|(?:[\w.-]{{0,60}}[-_.])?(?:key|token|sig|auth|pass)"
"""Names that hold a secret as a parameter of a URL, or among credentials."""
_CREDENTIALS = ("storage_options", "headers")

# A host with its port and path, up to where it ends: the colon in it does not begin a password.
_HOST = r"(?:[\w.-]*|\[[\da-fA-F:.]*\])(?::\d{1,5})?(?:[/?#][^\s\"'@]{0,2000})?(?:[\s\"',;)\]}>]|$)"
_KEPT = r"(?!\*\*\*|\$\{\w+\})"  # masked already, or a reference
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^&\s"';]+)"""
_MASKED = (
    # Passwords may have slashes, spaces and @ in them: the last @ before the next address ends them.
    (rf"(\w://)(?!{_HOST})([^/\s:@\"']*:){_KEPT}(?:(?!\w://)[^\n]){{0,1000}}@", rf"\1\2{_MASK}@"),
    (rf"(\w://){_KEPT}[^/\s:@\"']{{1,1000}}@", rf"\1{_MASK}@"),  # a token in place of user and password
    (rf"(?i)([?&;#](?:{_WEAK})=){_KEPT}[^&\s\"';#]+", rf"\1{_MASK}"),
    (rf"(?i)((?<![\w.-]){_STRONG}\s?=\s?){_KEPT}{_VALUE}", rf"\1{_MASK}"),
    (rf"(?i)([\"'](?:{_STRONG})[\"']\s?:\s?)(?!['\"]\$\{{\w+\}})(?:\"[^\"]*\"|'[^']*')", rf"\1'{_MASK}'"),
    (r"(?i)\b(bearer|basic) [\w.~+/=-]{8,}", rf"\1 {_MASK}"),
)


def fill_in(setting: _T) -> _T:
    """A setting with each ``${NAME}`` replaced by that environment variable, so that configurations need no passwords.

    Args:
        setting: A text, or a mapping or a list of settings. All other values are returned as they are.

    Raises:
        ValueError: If the variable is not set.

    Example:
        >>> os.environ["REDIS_PASSWORD"] = "secret"
        >>> fill_in("redis://:${REDIS_PASSWORD}@localhost:6379/0")
        'redis://:secret@localhost:6379/0'
        >>> fill_in({"password": "${REDIS_PASSWORD}", "timeout": 3})
        {'password': 'secret', 'timeout': 3}
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"the environment variable {match[1]} is not set, and a setting names it")
        return os.environ[match[1]]

    found: Any = setting
    if isinstance(setting, str):
        found = _REFERENCE.sub(value, setting)
    elif isinstance(setting, Mapping):
        found = {name: fill_in(inner) for name, inner in setting.items()}
    elif isinstance(setting, list):
        found = [fill_in(inner) for inner in setting]
    return found  # type: ignore[no-any-return]


def without_secrets(value: _T) -> _T:
    """A text or nested settings with passwords, keys, tokens and signatures masked, for logs, messages and records.

    In a text, these are credentials and parameters of URLs, and what follows a name such as ``password=``. In settings,
    also the values of such names, unless they are references: ``${NAME}`` stays.

    Args:
        value: A text, or a mapping or a list of settings. All other values are returned as they are.

    Example:
        >>> without_secrets("redis://feed:p@ss/wo rd@broker:6379 and https://host/x?a=1&api_key=secret do not answer")
        'redis://feed:***@broker:6379 and https://host/x?a=1&api_key=*** do not answer'
        >>> without_secrets({"storage_options": {"key": "${KEY}", "secret": "abc", "endpoint_url": "http://s3:9000"}})
        {'storage_options': {'key': '${KEY}', 'secret': '***', 'endpoint_url': 'http://s3:9000'}}
    """
    found: Any = _masked(value, re.compile(_STRONG, re.IGNORECASE))
    return found  # type: ignore[no-any-return]


def _masked(value: Any, secret: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        for pattern, instead in _MASKED:
            value = re.sub(pattern, instead, value)
        return value
    if isinstance(value, Mapping):
        made = {}
        for name, inner in value.items():
            hidden = isinstance(inner, str) and secret.fullmatch(str(name)) and not _REFERENCE.search(inner)
            inside = re.compile(_WEAK, re.IGNORECASE) if name in _CREDENTIALS else secret
            made[name] = _MASK if hidden else _masked(inner, inside)
        return made
    if isinstance(value, list):
        return [_masked(inner, secret) for inner in value]
    return value
