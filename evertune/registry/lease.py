"""A lease that allows one writer at a time; it ends with the process that holds it, and does not depend on clocks."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from evertune.registry.store import RegistryError, Store
from evertune.utils.typed_json import read_json

TOKEN = "EVERTUNE_LEASE"
"""Environment variable by which a child process works under the lease of its parent."""

_FOLDER = "lease"
_BEATS = 5
"""Number of heartbeats within the time to live."""
_GRACE = 1.0
"""Seconds that a process of this machine that was just killed is given to disappear."""

_TRIES = 1000
"""How often the newest file is looked for, where others take and release leases all the time."""
_MOST_TTL = 600.0
"""Seconds after which a holder without heartbeats is replaced at the latest, unless this process asks for longer."""
_MOST_BYTES = 2**16

logger = logging.getLogger(__name__)


@dataclass
class _Record:
    """The content of a lease's file."""

    owner: str = "another process"
    pid: int = 0
    started: int | None = None
    host: str = ""
    since: str = "an unknown time"
    ttl: float = 60.0
    token: str = ""
    beat: int = 0
    released: bool = False


class LeaseHeld(RegistryError):  # noqa: N818
    """Another process holds the lease."""


class LeaseLost(RegistryError):  # noqa: N818
    """Another process has taken over the lease that this one held."""


class Lease:
    """The exclusive right to write to a registry.

    Each holder creates the next of the files ``lease/1.json``, ``lease/2.json``, ..., which only one process can do;
    the highest number holds the lease. A thread of the holder increments a heartbeat counter in its file. Another
    process may take over if the file says that the lease was released; at once if the holder was a process of this
    machine that is dead (identified by its number and start time in ``/proc``); otherwise once the counter has not
    changed for ``ttl`` seconds by the monotonic clock of the waiting process. Wall-clock times are never compared.

    A holder that was suspended and wakes up too late finds a higher number in :meth:`check`, which a
    :class:`~evertune.registry.registry.Registry` calls before each write that matters.

    A child process that finds the holder's :attr:`token` in ``EVERTUNE_LEASE`` works under the lease of its parent: it
    neither renews nor releases the lease, and :meth:`check` fails if the parent has lost it.

    Args:
        store: Store of the registry.
        owner: Name of the holder, for the messages that others get. Default: the name of the program.
        ttl: Seconds without a heartbeat after which others may take over. Default: 60.
        inherit: Whether to work under the lease that ``EVERTUNE_LEASE`` names, if it is set. Default: True.

    Raises:
        ValueError: If ``ttl`` is not positive.

    Example:
        >>> with Lease(Store("memory://doc/lease"), owner="nightly") as lease:
        ...     lease.check()
        ...     lease.number
        1
    """

    def __init__(self, store: Store, owner: str | None = None, ttl: float = 60.0, *, inherit: bool = True) -> None:
        if ttl <= 0:
            raise ValueError(f"ttl must be a positive number of seconds, got {ttl}")
        self.owner = owner or Path(sys.argv[0]).name or "python"
        self.ttl = ttl
        self.number = 0
        """Number of this lease, counted over the registry's lifetime; 0 while it is not held."""
        self.token = ""
        """Value of ``EVERTUNE_LEASE`` for a child process."""
        self._store, self._inherit = store, inherit
        self._mine: dict[str, Any] = {}
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            LeaseHeld: If the holder is alive: it is running on this machine, which takes a second to establish, or its
                heartbeat advances, which takes at most a fifth of its time to live.
            LeaseLost: If ``EVERTUNE_LEASE`` names a lease that has ended.
        """
        inherited = os.environ.get(TOKEN)
        if inherited and self._inherit:
            self._join(inherited)
        else:
            self._acquire()
            self._stop.clear()
            self._thread = threading.Thread(target=self._beat, name="evertune-lease", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lease, unless it belongs to the parent or was lost."""
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
        """Whether this process has taken the lease and not released it. Whether it was lost, :meth:`check` reports."""
        return self.number > 0

    def check(self) -> None:
        """Make sure that no other process has taken over. Cheap: lists a folder and reads a small file.

        Raises:
            LeaseLost: If one has; this process must not write any more.
            OSError: If the registry cannot be read, so that the state is unknown.
        """
        number, content = _newest(self._store)
        record = _parsed(content)
        if not self.held or number != self.number or record.get("token") != self.token or record.get("released"):
            raise LeaseLost(
                f"{self.owner} has lost its lease on {self._store.root}: it missed its heartbeats, and "
                f"{_holder(record)} took over. Nothing was written; run it again"
            )

    def _join(self, token: str) -> None:
        """Work under the lease of the parent process."""
        self.number, content = _newest(self._store)
        self.token = token
        if _parsed(content).get("token") != token:
            self.number = 0
            raise LeaseLost(
                f"the lease on {self._store.root} that {TOKEN} names is over, as the process that held it has ended or "
                f"lost it: run this again without {TOKEN}"
            )

    def _acquire(self) -> None:
        """Wait until the lease is free or its holder has missed its heartbeats, and take it."""
        self.token = secrets.token_hex(16)
        first: tuple[int, bytes] | None = None
        since = 0.0
        while True:
            now = time.monotonic()  # before reading: a pause in between must not look like missed heartbeats
            seen = _newest(self._store)
            record = _parsed(seen[1])
            if seen[0] == 0 or record.get("released") or _is_dead(record):
                if self._take(seen):
                    return
                continue
            if first is None:
                first, since = seen, time.monotonic()
            # Any change shows that the holder is alive; a process that runs on this machine needs no heartbeat as
            # proof.
            elif seen != first or (now - since >= _GRACE and _is_running(record)):
                raise LeaseHeld(
                    f"{self._store.root} is being written to by {_holder(record)}, since {record.get('since')}: "
                    "wait until it is done, or end it"
                )
            elif now - since >= self._patience(record) and self._take(seen):
                return
            time.sleep(min(0.05, self.ttl / 20))

    def _take(self, seen: tuple[int, bytes]) -> bool:
        """Become the next holder, if the lease has not changed since ``seen`` and no other process is faster."""
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
            if _newest(self._store) != seen:
                return False
            try:
                self._store.create(_name(number), json.dumps(record).encode())
            except FileExistsError:
                return False
            if _newest(self._store)[0] != number:  # others took later leases and deleted this number meanwhile
                self._store.delete(_name(number))
                return False
        self.number, self._mine = number, record
        # The old files are deleted only now: until the new one exists, the newest of them is the lease.
        for older in _numbers(self._store):
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
        except OSError:  # on a full disk nothing can be written, but a file can still be deleted
            self._store.delete(_name(self.number))

    def _write(self, **changes: Any) -> None:
        with self._writing:
            self.check()
            self._mine |= changes
            self._store.write(_name(self.number), json.dumps(self._mine).encode())

    def _patience(self, record: dict[str, Any]) -> float:
        """Seconds without a heartbeat after which the holder counts as gone, whatever its file says."""
        ttl = float(record.get("ttl", self.ttl))
        return min(ttl, max(self.ttl, _MOST_TTL)) if ttl > 0 else self.ttl


@dataclass(frozen=True)
class Holder:
    """Who holds the lease of a registry.

    Args:
        words: Who it is, as a message.
        since: When it took the lease (ISO 8601).
    """

    words: str
    since: str


def holder(store: Store) -> Holder | None:
    """Who holds the lease of a registry; None if it is free, or its holder was a process of this machine that has
    ended.

    Raises:
        OSError: If the registry cannot be read.
    """
    number, content = _newest(store)
    record = _parsed(content)
    if number == 0 or record.get("released") or _is_dead(record):
        return None
    return Holder(_holder(record), str(record.get("since", "an unknown time")))


def _newest(store: Store) -> tuple[int, bytes]:
    """The highest number of a lease, and the content of its file; 0 if there has never been a lease."""
    # The next holder may delete a file between listing and reading: then the list is read again.
    numbers: list[int] = []
    for _ in range(_TRIES):
        numbers = _numbers(store)
        if not numbers:
            return 0, b""
        found = store.read_all([_name(numbers[-1])])
        if found:
            return numbers[-1], found[_name(numbers[-1])]
        time.sleep(0.001)
    address = store.address(_name(numbers[-1]))
    raise RegistryError(f"{address} is listed but cannot be read: delete it if no other process is writing")


def _numbers(store: Store) -> list[int]:
    # Names that a lease would not write, such as 007.json, are not its files.
    stems = (name.removesuffix(".json") for name in store.list(_FOLDER) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal() and str(int(stem)) == stem)


def _name(number: int) -> str:
    return f"{_FOLDER}/{number}.json"


def _parsed(content: bytes) -> dict[str, Any]:
    """The record of a lease; empty if the file cannot be parsed, which counts as a holder without heartbeats."""
    try:
        return asdict(read_json(_Record, content, most_bytes=_MOST_BYTES))
    except ValueError:
        return {}


def _holder(record: dict[str, Any]) -> str:
    host = str(record.get("host", "")).partition("/")[0] or "an unknown host"
    return f"{record.get('owner', 'another process')} (process {record.get('pid', '?')} on {host})"


def _is_dead(record: dict[str, Any]) -> bool:
    """Whether the holder was a process that this one could see, and has ended."""
    if record.get("started") is None or record.get("host") != _host():
        return False
    # The start time distinguishes the holder from a later process with the same number.
    return bool(_process(record["pid"])[0] != record["started"])


def _is_running(record: dict[str, Any]) -> bool:
    """Whether the holder is a process that this one can see, and is not stopped."""
    seen = record.get("started") is not None and record.get("host") == _host()
    return seen and not _is_dead(record) and _process(record["pid"])[1] not in "Tt"


def _process(pid: int) -> tuple[int | None, str]:
    """Start time of a process, in clock ticks since boot, and its state; None if it does not exist or has ended."""
    try:
        # The second field is the name in parentheses and may contain spaces, so that the rest is counted from the last
        # ")".
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, "X"
    state, started = fields[0], int(fields[19])
    return (None if state in "ZXx" else started), state


def _host() -> str:
    """Where a process number is unique: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
