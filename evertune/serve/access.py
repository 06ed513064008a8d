"""Who may do what, and how much of it."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from evertune.serve.keys import KeyFile, KeyRing
from evertune.serve.settings import AccessSettings
from evertune.serve.tokens import TokenChecker

_MOST_CLIENTS = 10_000  # whose rates are remembered
_CHALLENGE = {"www-authenticate": 'Bearer realm="evertune"'}


class DeniedError(Exception):
    """A client may not do this.

    Args:
        status: 401 without valid credentials, 403 without the scope, 429 above the rate.
        error: Why, as a message to the client.
        reason: The reason in one word, for the metrics.
        headers: Headers of the answer.
    """

    def __init__(self, status: int, error: str, reason: str, headers: Mapping[str, str]) -> None:
        super().__init__(error)
        self.status, self.error, self.reason, self.headers = status, error, reason, dict(headers)


@dataclass(frozen=True)
class Client:
    """Who has sent a request.

    Args:
        name: Name of the key's user or the token's subject; the address if neither is asked for.
        id: What its rate is counted by.
        scopes: What it may do; None for everything.
        rate: Records a second that it may send, on average; None for any number.
    """

    name: str
    id: str
    scopes: frozenset[str] | None
    rate: float | None


class _Credentials(Protocol):
    def __call__(self, secret: str) -> Client | None: ...


class Access:
    """Checks the key or token of a request, its scope, and the rate of its client.

    Credentials are read from ``Authorization: Bearer ...`` or ``X-API-Key``.

    Args:
        settings: See :class:`AccessSettings`.
        clock: Seconds, for tests.

    Raises:
        OSError: If the file of the keys does not exist, or the keys of the tokens cannot be fetched.
        ValueError: If one of these is damaged.
    """

    def __init__(self, settings: AccessSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._default_rate, self._clock = settings.rate, clock
        self._checks: list[_Credentials] = []
        if settings.keys is not None:
            self._checks.append(self._of_keys(KeyRing(KeyFile(settings.keys))))
        if settings.jwks is not None:
            self._checks.append(self._of_tokens(TokenChecker(settings)))
        self._balances: OrderedDict[str, tuple[float, float]] = OrderedDict()

    @property
    def is_open(self) -> bool:
        """Whether anyone may do everything."""
        return not self._checks

    def admit(self, headers: Mapping[str, str], address: str, scope: str) -> Client:
        """The client of a request.

        Args:
            headers: Headers of the request, by names in lower case.
            address: Address that it came from.
            scope: What it wants to do.

        Raises:
            DeniedError: If it may not.
        """
        if self.is_open:
            return Client(address, address, None, self._default_rate)
        kind, _, secret = headers.get("authorization", "").partition(" ")
        secret = secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not secret:
            words = "send an API key or a token as `Authorization: Bearer ...`"
            raise DeniedError(401, words, "no credentials", _CHALLENGE)
        client = next(filter(None, (check(secret) for check in self._checks)), None)
        if client is None:
            raise DeniedError(401, "the API key or token is not valid", "wrong credentials", _CHALLENGE)
        if client.scopes is not None and scope not in client.scopes:
            raise DeniedError(403, f"the API key or token does not have the scope {scope}", "scope", {})
        return client

    def charge(self, client: Client, n_records: int) -> None:
        """Count the records of a request against the rate of its client: a token bucket of one second.

        A request passes whole as soon as nothing is owed for those before it, whatever its size.

        Raises:
            DeniedError: If the client has sent too many.
        """
        if client.rate is None:
            return
        now = self._clock()
        balance, last = self._balances.pop(client.id, (client.rate, now))
        balance = min(max(client.rate, 1.0), balance + (now - last) * client.rate)
        allowed = balance > 0
        self._balances[client.id] = balance - n_records * allowed, now
        if len(self._balances) > _MOST_CLIENTS:
            self._balances.popitem(last=False)
        if not allowed:
            wait = max(1, math.ceil(-balance / client.rate))
            words = f"more than {client.rate:g} records a second; try again in {wait} s"
            raise DeniedError(429, words, "rate", {"retry-after": str(wait)})

    def _of_keys(self, ring: KeyRing) -> _Credentials:
        def check(secret: str) -> Client | None:
            key = ring.find(secret)
            if key is None:
                return None
            return Client(key.name, key.id, frozenset(key.scopes), key.rate or self._default_rate)

        return check

    def _of_tokens(self, tokens: TokenChecker) -> _Credentials:
        def check(secret: str) -> Client | None:
            found = tokens.check(secret)
            if found is None:
                return None
            subject, scopes = found
            return Client(subject, f"token {subject}", frozenset(scopes), self._default_rate)

        return check
