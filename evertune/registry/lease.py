"""One writer at a time: a lease that ends with the process that holds it, and that no clock can break."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from evertune.registry.store import RegistryError, Store

TOKEN = "EVERTUNE_LEASE"
"""The environment variable that lets a child process work under the lease of its parent."""

_FOLDER = "lease"
_BEATS = 5
"""Heartbeats within the time to live."""
_GRACE = 1.0
"""Seconds in which a process of this machine that was just killed may go away."""

logger = logging.getLogger(__name__)


class LeaseHeld(RegistryError):  # noqa: N818
    """Another process holds the lease."""


class LeaseLost(RegistryError):  # noqa: N818
    """Another process has taken over the lease that this one held."""


class Lease:
    """The right to write to a registry, for one process at a time.

    Each holder creates the next of the files ``lease/1.json``, ``lease/2.json``, ..., which only one process can do;
    the highest number holds the lease. A thread of the holder counts a heartbeat up in its file. The next holder may
    come when the file says that it was released; at once when the holder was a process of this machine that is dead
    (known by its number and start time, from ``/proc``); else when the count has stood still for ``ttl`` seconds by the
    monotonic clock of whoever waits. Times of day are never compared.

    A holder that was stopped and wakes up too late finds a higher number in :meth:`check`, which a
    :class:`~evertune.registry.registry.Registry` calls before each write that counts.

    A child process that finds the holder's :attr:`token` in ``EVERTUNE_LEASE`` works under the lease of its parent:
    it neither renews nor releases it, and :meth:`check` fails when the parent has lost it.

    Args:
        store: of the registry.
        owner: who this is, for the message that others get; by default the program's name.
        ttl: Seconds without a heartbeat after which others may take over.

    Raises:
        ValueError: when ``ttl`` is not positive.

    Example:
        >>> with Lease(Store("memory://doc/lease"), owner="nightly") as lease:
        ...     lease.check()
        ...     lease.number
        1
    """

    def __init__(self, store: Store, owner: str | None = None, ttl: float = 60.0) -> None:
        if ttl <= 0:
            raise ValueError(f"ttl must be a positive number of seconds, got {ttl}")
        self.owner = owner or Path(sys.argv[0]).name or "python"
        self.ttl = ttl
        self.number = 0
        """Counts the leases of the registry; 0 as long as this one is not held."""
        self.token = ""
        """What a child process needs in ``EVERTUNE_LEASE``."""
        self._store = store
        self._mine: dict[str, Any] = {}
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            LeaseHeld: when its holder is alive: it runs on this machine, which takes a second to tell, or its heart
                beats, which takes a fifth of its time to live at most.
            LeaseLost: when ``EVERTUNE_LEASE`` names a lease that is over.
        """
        inherited = os.environ.get(TOKEN)
        if inherited:
            self._join(inherited)
        else:
            self._acquire()
            self._stop.clear()
            self._thread = threading.Thread(target=self._beat, name="evertune-lease", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lease, unless it is the parent's or lost."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            try:
                self._release()
            except (OSError, LeaseLost) as error:
                logger.warning("the lease is not released, others take it when this process has ended: %s", error)
        self.number = 0

    @property
    def held(self) -> bool:
        """Whether this process has taken the lease and not released it; :meth:`check` says whether it was lost."""
        return self.number > 0

    def check(self) -> None:
        """Make sure that no other process has taken over. Cheap: lists a folder and reads a small file.

        Raises:
            LeaseLost: when one has; this process must write no more.
            OSError: when the registry cannot be read, so that nobody knows.
        """
        number, content = self._newest()
        record = _parsed(content)
        if not self.held or number != self.number or record.get("token") != self.token or record.get("released"):
            raise LeaseLost(
                f"{self.owner} has lost its lease on {self._store.root}: it missed its heartbeats, and "
                f"{_holder(record)} took over. Nothing was written; run it again"
            )

    def _join(self, token: str) -> None:
        """Work under the lease of the parent process."""
        self.number, content = self._newest()
        self.token = token
        if _parsed(content).get("token") != token:
            self.number = 0
            raise LeaseLost(
                f"the lease on {self._store.root} that {TOKEN} names is over, as the process that held it has ended or "
                f"lost it: run this again without {TOKEN}"
            )

    def _acquire(self) -> None:
        """Wait until the lease is free or its holder's heart has stood still, and take it."""
        self.token = secrets.token_hex(16)
        first: tuple[int, bytes] | None = None
        since = 0.0
        while True:
            now = time.monotonic()  # before reading: a pause in between must not look like a heart that stands still
            seen = self._newest()
            record = _parsed(seen[1])
            if seen[0] == 0 or record.get("released") or _is_dead(record):
                if self._take(seen):
                    return
                continue
            if first is None:
                first, since = seen, time.monotonic()
            elif seen != first or (now - since >= _GRACE and _is_running(record)):
                raise LeaseHeld(
                    f"{self._store.root} is being written to by {_holder(record)}, since {record.get('since')}: "
                    "wait until it is done, or end it"
                )
            elif now - since >= record.get("ttl", self.ttl) and self._take(seen):
                return
            time.sleep(min(0.05, self.ttl / 20))

    def _take(self, seen: tuple[int, bytes]) -> bool:
        """Become the next holder, if the lease is still as it was seen and no other is quicker."""
        number = seen[0] + 1
        record = {
            "owner": self.owner,
            "pid": os.getpid(),
            "started": _process(os.getpid())[0],
            "host": _host(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "ttl": self.ttl,
            "token": self.token,
            "beat": 0,
            "released": False,
        }
        with self._store.locked():
            if self._newest() != seen:
                return False
            try:
                self._store.create(_name(number), json.dumps(record).encode())
            except FileExistsError:
                return False
            if self._newest()[0] != number:  # it went on without us, and our number was free again
                self._store.delete(_name(number))
                return False
        self.number, self._mine = number, record
        for older in self._numbers():
            if older < number:
                self._store.delete(_name(older))
        return True

    def _beat(self) -> None:
        while not self._stop.wait(self.ttl / _BEATS):
            try:
                self._write(beat=self._mine["beat"] + 1)
            except LeaseLost as error:
                logger.warning("%s", error)
                return
            except OSError as error:
                logger.warning("the lease could not be renewed, and is tried again: %s", error)

    def _release(self) -> None:
        try:
            self._write(released=True)
        except OSError:  # on a full disk there is no room to say so, but a file can be deleted
            self._store.delete(_name(self.number))

    def _write(self, **changes: Any) -> None:
        with self._writing:
            self.check()
            self._mine |= changes
            self._store.write(_name(self.number), json.dumps(self._mine).encode())

    def _newest(self) -> tuple[int, bytes]:
        """The highest number and its file; 0 when there was never a lease."""
        while numbers := self._numbers():
            found = self._store.read_all([_name(numbers[-1])])
            if found:
                return numbers[-1], found[_name(numbers[-1])]
        return 0, b""

    def _numbers(self) -> list[int]:
        stems = (name.removesuffix(".json") for name in self._store.list(_FOLDER))
        return sorted(int(stem) for stem in stems if stem.isdecimal())


def _name(number: int) -> str:
    return f"{_FOLDER}/{number}.json"


def _parsed(content: bytes) -> dict[str, Any]:
    """The record of a lease; an empty one where the file cannot be read, whose heart then stands still."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _holder(record: dict[str, Any]) -> str:
    host = str(record.get("host", "")).partition("/")[0] or "an unknown host"
    return f"{record.get('owner', 'another process')} (process {record.get('pid', '?')} on {host})"


def _is_dead(record: dict[str, Any]) -> bool:
    """Whether the holder was a process that this one would see, and is gone."""
    if record.get("started") is None or record.get("host") != _host():
        return False
    return bool(_process(int(record["pid"]))[0] != record["started"])


def _is_running(record: dict[str, Any]) -> bool:
    """Whether the holder is a process that this one sees, and is not stopped."""
    seen = record.get("started") is not None and record.get("host") == _host()
    return seen and not _is_dead(record) and _process(int(record["pid"]))[1] not in "Tt"


def _process(pid: int) -> tuple[int | None, str]:
    """When a process started, in clock ticks since the machine did, and its state; None when it is not or no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, "X"
    state, started = fields[0], int(fields[19])
    return (None if state in "ZXx" else started), state


def _host() -> str:
    """Where process numbers mean the same: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
