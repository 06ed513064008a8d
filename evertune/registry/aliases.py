"""The aliases of a registry: the small file that names the version in production, and what happened to it."""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from evertune.registry.store import RegistryError, Store
from evertune.utils.typed_json import check_seal, decode, read_json, sealed

ALIASES = ("production", "previous", "refused")

_FILE = "aliases.json"
_EVENTS = 200


@dataclass
class AliasState:
    """The content of ``aliases.json``.

    Args:
        aliases: Number of the version behind each alias that is set.
        events: What happened to them, oldest first.
        given_up: Numbers of the versions rolled back from with ``discard`` since the last promotion.
    """

    aliases: dict[str, int] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)

    def encoded(self) -> bytes:
        """The content as bytes."""
        values = {**self.aliases, "given_up": self.given_up, "events": self.events[-_EVENTS:]}
        return json.dumps(sealed(values), indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> AliasState:
        """Parse the file; a ValueError says what is wrong with it."""
        values = decode(content)
        checked = read_json(_Aliases, content)
        check_seal(values, {entry.name for entry in fields(_Aliases)})
        aliases = {name: number for name in ALIASES if (number := getattr(checked, name)) is not None}
        given_up = checked.given_up
        if given_up is None:  # written before the field existed: the events say it
            given_up = []
            for event in checked.events:
                if event.action == "promote":
                    given_up = []
                elif event.discard is not None:
                    given_up.append(event.discard)
        return cls(aliases, values["events"], given_up)


@dataclass
class _Event:
    """The entries of an event that others rely on."""

    time: str
    action: str
    to: int | None
    reason: str = ""
    by: str = ""
    discard: int | None = None


@dataclass
class _Aliases:
    """The entries of ``aliases.json``."""

    events: list[_Event]
    production: int | None = None
    previous: int | None = None
    refused: int | None = None
    given_up: list[int] | None = None


class AliasFile:
    """The file ``aliases.json``, whose atomic replacement is what puts a version into production.

    Args:
        store: Store of the registry.
        has_versions: Whether the registry has versions, so that a missing file means damage.
        check_lease: Raises if this process has lost the lease that it has taken.
    """

    def __init__(self, store: Store, has_versions: Callable[[], bool], check_lease: Callable[[], None]) -> None:
        self._store = store
        self._has_versions = has_versions
        self._check_lease = check_lease

    def create(self) -> None:
        """Write the file of a registry without versions, if there is none. The caller has the store's lock."""
        if not self._store.exists(_FILE) and not self._has_versions():
            self._store.write(_FILE, AliasState().encoded())

    def read(self) -> AliasState:
        """The content of the file.

        Raises:
            RegistryError: If it is damaged, or missing although there are versions.
        """
        address = self._store.address(_FILE)
        repair = (
            f"Restore it from a backup, or make a new one with `evertune registry promote {self._store.root} N --force`"
        )
        content = self._store.read_all([_FILE]).get(_FILE)
        if content is None:
            if self._has_versions():
                raise RegistryError(f"{address} is missing, though there are versions. {repair}")
            return AliasState()
        try:
            return AliasState.parse(content)
        except ValueError as error:
            raise RegistryError(f"{address} is damaged or cut short ({error}). {repair}") from None

    @contextmanager
    def changing(self, repair: bool = False) -> Iterator[AliasState]:
        """The content, to be changed: read, compared and replaced while no other process does the same.

        Args:
            repair: Start from scratch if the file is damaged or missing; a damaged one is kept as
                ``aliases.json.damaged``.
        """
        with self._store.locked():
            self._check_lease()
            try:
                state = self.read()
            except RegistryError:
                if not repair:
                    raise
                for damaged in self._store.read_all([_FILE]).values():
                    self._store.write(f"{_FILE}.damaged", damaged)
                state = AliasState()
            before = state.encoded()
            yield state
            if state.encoded() != before:
                self._store.write(_FILE, state.encoded())


def event(action: str, old: int | None, new: int, reason: str, by: str | None) -> dict[str, Any]:
    """A change of an alias, now.

    Args:
        action: ``"promote"``, ``"rollback"`` or ``"refused"``.
        old: Number of the version behind the alias before; None for none.
        new: Number of the version behind it now.
        reason: The reason.
        by: Who did it; None for ``user@host``.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "action": action,
        "from": old,
        "to": new,
        "reason": reason,
        "by": by or _who(),
    }


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no entry in /etc/passwd
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
