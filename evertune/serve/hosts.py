"""The names that a request may give as its host: a page of another site must not reach a local server by its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from evertune.serve.settings import ServerSettings

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""The names of this machine."""


def own_names(settings: ServerSettings) -> tuple[str, ...] | None:
    """The names by which a server may be asked: those of this machine; None for any, if others can reach it."""
    return (*LOOPBACK, settings.host) if settings.is_local else None


def is_for(hosts: Collection[str] | None, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request is for one of the hosts: a page of another site that a browser shows has that site's name (DNS
    rebinding).

    Args:
        hosts: Names that a request may give; None for any.
        headers: Headers of the request, as ASGI has them.

    Example:
        >>> is_for(LOOPBACK, [(b"host", b"localhost:8000")]), is_for(LOOPBACK, [(b"host", b"evil.example")])
        (True, False)
    """
    if hosts is None:
        return True
    given = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
    name = given if given.endswith("]") else given.rpartition(":")[0] or given
    return name.lower() in hosts
