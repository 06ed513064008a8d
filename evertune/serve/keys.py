"""API keys: a file with their hashes, what each may do, and how much of it."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from evertune.utils.files import write_atomically
from evertune.utils.typed_json import decode, from_json

SCOPES = ("predict", "explain", "feedback", "metrics", "view", "change")
"""What a key may be allowed to do: the first three at ``evertune serve``, the others at ``evertune ui``."""

_KEY = re.compile(r"evt_([0-9a-f]{8})_([0-9A-Za-z_-]{43})")
_NAME = re.compile(r"[\w.@-]{1,60}")
_LOOK = 1.0  # seconds between two looks at the file

logger = logging.getLogger("evertune.serve")


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key, as the file holds it.

    Args:
        id: The part of the key that is not secret, by which it is found, shown and revoked.
        name: Who uses it, for logs and metrics.
        sha256: Hash of the whole key. A key has 256 random bits, so a plain hash cannot be reversed by trying.
        scopes: What it may do.
        created: When it was made.
        expires: When it ends; None for never.
        rate: Records a second that it may send, on average; None for any number.
    """

    id: str
    name: str
    sha256: str
    scopes: list[str]
    created: datetime
    expires: datetime | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, dots, @ and dashes, at most 60, got {self.name!r}")
        if not self.scopes or (unknown := set(self.scopes) - set(SCOPES)):
            given = ", ".join(sorted(unknown)) if self.scopes else "none"
            raise ValueError(f"scopes must be among {', '.join(SCOPES)}, got {given}")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate must be positive, got {self.rate}")

    def is_valid(self, now: datetime) -> bool:
        """Whether it has not expired."""
        return self.expires is None or now < self.expires


@dataclass
class _Content:
    keys: list[Key] = field(default_factory=list)


class KeyFile:
    """The file with the hashes of the keys. A key itself is shown once, when it is made, and kept nowhere.

    Args:
        path: The file; it is made by the first :meth:`add`, readable by its owner only.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = KeyFile(Path(mkdtemp()) / "keys.json")
        >>> secret = file.add("web", ["predict"])
        >>> secret[:4], secret in file.path.read_text(), file.read()[0].name
        ('evt_', False, 'web')
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> list[Key]:
        """The keys, oldest first.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged.
        """
        try:
            return from_json(_Content, decode(self.path.read_bytes())).keys
        except FileNotFoundError:
            raise FileNotFoundError(
                f"cannot find {self.path}: make a key with `evertune keys add {self.path} --name web`"
            ) from None
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from None

    def add(
        self, name: str, scopes: Sequence[str] = ("predict",), days: float | None = None, rate: float | None = None
    ) -> str:
        """Make a key; returns it.

        Args:
            name: Who uses it.
            scopes: What it may do.
            days: Days until it expires; None for never.
            rate: Records a second that it may send, on average; None for any number.

        Raises:
            ValueError: If an argument is invalid, or the file is damaged.
        """
        if days is not None and days <= 0:
            raise ValueError(f"days must be positive, got {days}")
        now = datetime.now(UTC).replace(microsecond=0)
        id = secrets.token_hex(4)
        secret = f"evt_{id}_{secrets.token_urlsafe(32)}"
        expires = None if days is None else now + timedelta(days=days)
        key = Key(id=id, name=name, sha256=_hash(secret), scopes=list(scopes), created=now, expires=expires, rate=rate)
        self._write([*(self.read() if self.path.exists() else []), key])
        return secret

    def rotate(self, id: str, grace_hours: float = 24.0) -> str:
        """Make a key with the name, scopes and rate of another, which expires after a while; returns the new one.

        Args:
            id: Id of the old key.
            grace_hours: Hours in which both work. Default: 24.

        Raises:
            ValueError: If there is no such key.
        """
        old = self._find(id)
        end = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=grace_hours)
        expires = end if old.expires is None else min(end, old.expires)
        self._write([replace(key, expires=expires) if key.id == id else key for key in self.read()])
        return self.add(old.name, old.scopes, rate=old.rate)

    def revoke(self, id: str) -> None:
        """Delete a key.

        Raises:
            ValueError: If there is no such key.
        """
        self._find(id)
        self._write([key for key in self.read() if key.id != id])

    def _find(self, id: str) -> Key:
        keys = {key.id: key for key in self.read()}
        if id not in keys:
            raise ValueError(f"{self.path} has no key {id}; it has {', '.join(keys) or 'none'}")
        return keys[id]

    def _write(self, keys: Sequence[Key]) -> None:
        content = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1, default=datetime.isoformat)
        write_atomically(self.path, content.encode())
        self.path.chmod(0o600)


class KeyRing:
    """The keys of a file, as a server checks them. A changed file is read again within a second.

    A file that is damaged or gone changes nothing: the keys read before stay, and the problem is logged once.

    Args:
        file: The file.
        clock: Seconds, for tests.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """

    def __init__(self, file: KeyFile, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._stamp = self._current_stamp()
        self._keys = {key.id: key for key in file.read()}
        self._looked = clock()
        self._warned = False

    def find(self, secret: str) -> Key | None:
        """The key that a client has sent; None if it is none, or has expired."""
        self._look()
        match = _KEY.fullmatch(secret)
        key = self._keys.get(match[1]) if match else None
        # In constant time, and also for an unknown id, so that the time of the answer says nothing.
        right = hmac.compare_digest(_hash(secret), key.sha256 if key else "")
        return key if key is not None and right and key.is_valid(datetime.now(UTC)) else None

    def _look(self) -> None:
        if self._clock() - self._looked < _LOOK:
            return
        self._looked = self._clock()
        try:
            stamp = self._current_stamp()
            if stamp != self._stamp:
                self._keys = {key.id: key for key in self._file.read()}
                self._stamp, self._warned = stamp, False
                logger.info("the API keys were read again", extra={"event": "keys", "keys": len(self._keys)})
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                logger.warning("the API keys stay as they are: %s", error, extra={"event": "keys"})

    def _current_stamp(self) -> tuple[int, int, int]:
        found = self._file.path.stat() if self._file.path.exists() else None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else (0, 0, 0)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
