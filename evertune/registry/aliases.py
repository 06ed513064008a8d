"""The aliases of a registry: the small file that names the version in production, and what happened to it."""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from evertune.registry.store import RegistryError, Store
from evertune.utils.typed_json import check_seal, decode, read_json, sealed

ALIASES = ("production", "previous", "refused")

_FILE = "aliases.json"
_EVENTS = 200


@dataclass
class GivenUp:
    """The records that a rollback with ``discard`` gave up: segments of the journal, which it contains.

    Args:
        version: Number of the version that was rolled back from.
        after: Number of the last segment that the version put back had learned.
        upto: Number of the last segment that the version rolled back from had learned; None if its manifest could not
            be read, so that it may have learned all that there were.
    """

    version: int
    after: int
    upto: int | None

    def __contains__(self, segment: int) -> bool:
        return self.after < segment and (self.upto is None or segment <= self.upto)


@dataclass
class AliasState:
    """The content of ``aliases.json``.

    Args:
        aliases: Number of the version behind each alias that is set.
        events: What happened to them, oldest first.
        given_up: What rollbacks have given up and no updater has withdrawn from the journal yet.
    """

    aliases: dict[str, int] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    given_up: list[GivenUp] = field(default_factory=list)

    def encoded(self) -> bytes:
        """The content as bytes."""
        given_up = [asdict(one) for one in self.given_up]
        values = {**self.aliases, "given_up": given_up, "events": self.events[-_EVENTS:]}
        return json.dumps(sealed(values), indent=1).encode()

    @classmethod
    def parse(cls, content: bytes) -> AliasState:
        """Parse the file; a ValueError says what is wrong with it."""
        values = decode(content)
        checked = read_json(_Aliases, content)
        check_seal(values, {entry.name for entry in fields(_Aliases)})
        aliases = {name: number for name in ALIASES if (number := getattr(checked, name)) is not None}
        return cls(aliases, values["events"], checked.given_up)


@dataclass
class _Event:
    """The entries of an event that others rely on."""

    time: str
    action: str
    to: int | None
    reason: str = ""
    by: str = ""


@dataclass
class _Aliases:
    """The entries of ``aliases.json``."""

    events: list[_Event]
    production: int | None = None
    previous: int | None = None
    refused: int | None = None
    given_up: list[GivenUp] = field(default_factory=list)


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
