"""JSON web tokens of an identity provider (OIDC), as an alternative to API keys."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from evertune.serve.keys import SCOPES
from evertune.serve.settings import AccessSettings
from evertune.utils.extras import library

_ALGORITHMS = ["RS256", "PS256", "ES256", "Ed25519", "EdDSA"]
"""Signatures with a public key only: with HS256, a public key could be abused as a secret one."""
_REFRESH = 300.0  # seconds between two reads of the provider's keys
_TIMEOUT = 10.0
_MOST_BYTES = 1 << 20
_LEEWAY = 30  # seconds that clocks may differ

logger = logging.getLogger("evertune.serve")


class TokenChecker:
    """Checks tokens against the public keys of their issuer: signature, issuer, audience and times.

    The keys are read again every five minutes, in a thread; if that fails, those read before stay.

    Args:
        settings: ``jwks``, ``issuer``, ``audience`` and ``scope_claim`` are used.

    Raises:
        OSError: If the keys cannot be read.
        ValueError: If they are not a JSON web key set.
        ModuleNotFoundError: If ``joserfc`` is not installed.
    """

    def __init__(self, settings: AccessSettings) -> None:
        self._jwt, self._jwk = library("joserfc.jwt", "serve"), library("joserfc.jwk", "serve")
        self._error = library("joserfc.errors", "serve").JoseError
        assert settings.jwks is not None
        self._place, self._scope_claim = settings.jwks, settings.scope_claim
        self._claims = self._jwt.JWTClaimsRegistry(
            leeway=_LEEWAY,
            iss={"essential": True, "value": settings.issuer},
            aud={"essential": True, "value": settings.audience},
            exp={"essential": True},
            sub={"essential": True},
        )
        self._keys = self._read()
        threading.Thread(target=self._refresh, name="evertune-jwks", daemon=True).start()

    def check(self, token: str) -> tuple[str, set[str]] | None:
        """The subject and the scopes of a token; None if it is not valid."""
        try:
            claims = self._jwt.decode(token, self._keys, algorithms=_ALGORITHMS).claims
            self._claims.validate(claims)
        except (self._error, ValueError, TypeError, KeyError):
            return None
        given: Any = claims.get(self._scope_claim, "")
        scopes = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
        return str(claims["sub"])[:200], {scope for scope in scopes if scope in SCOPES}

    def _read(self) -> Any:
        if self._place.startswith("https://"):
            with urllib.request.urlopen(self._place, timeout=_TIMEOUT) as answer:
                content = answer.read(_MOST_BYTES)
        else:
            content = Path(self._place).read_bytes()
        try:
            keys = self._jwk.KeySet.import_key_set(json.loads(content))
        except (self._error, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._place} is not a JSON web key set: {error}") from None
        return keys

    def _refresh(self) -> None:
        while True:
            time.sleep(_REFRESH)
            try:
                self._keys = self._read()
            except (OSError, ValueError) as error:
                logger.warning("the keys of the tokens stay as they are: %s", error, extra={"event": "keys"})
