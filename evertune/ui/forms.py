"""Forms that change something: whether they are allowed, and proof that one of our own pages has sent them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from evertune.registry.store import RegistryError
from evertune.ui.guard import RefusedError

TOKEN = "token"
"""Name of the field with the proof."""

_Change = Callable[[Request, Mapping[str, str]], Response]

_MOST_BYTES = 1 << 16
_PATIENCE = 10.0  # seconds that a form may take to arrive


class Forms:
    """Lets forms change something, unless the pages only show it.

    Each form has a token, so that no page of another site can send one unasked (CSRF). It holds for one client and one
    address, as long as this process lives.

    Args:
        allowed: Whether anything may be changed.
    """

    def __init__(self, allowed: bool) -> None:
        self._allowed, self._secret = allowed, secrets.token_bytes(32)

    def asking(self, page: Callable[[Request], Response]) -> Callable[[Request], Response]:
        """The endpoint of a page that asks for confirmation."""

        def endpoint(request: Request) -> Response:
            self._check_allowed()
            return page(request)

        return endpoint

    def changing(self, change: _Change) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint that a form is sent to.

        Args:
            change: Called in a thread with the request and the fields of the form. Its errors say that nothing has
                changed.
        """

        async def endpoint(request: Request) -> Response:
            self._check_allowed()
            fields = await self._read(request)
            try:
                return await run_in_threadpool(change, request, fields)
            except (RegistryError, OSError, ValueError) as error:
                raise RefusedError(409, "Nothing was changed", str(error)) from error

        return endpoint

    def _check_allowed(self) -> None:
        if not self._allowed:
            words = "These pages only show the registry. Start `evertune ui` with --allow_changes to change it here."
            raise RefusedError(403, "Read-only", words)

    def token(self, request: Request) -> str:
        """The token of a form that is sent to the address of this request, by its client."""
        said = f"{request.state.client.id} {request.url.path}".encode(errors="surrogatepass")
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()

    async def _read(self, request: Request) -> Mapping[str, str]:
        """The fields of a form, with the right token."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/x-www-form-urlencoded":
            raise RefusedError(415, "Not a form", "Send it from the page itself.")
        content = bytearray()
        try:
            async with asyncio.timeout(_PATIENCE):
                async for part in request.stream():
                    content += part
                    if len(content) > _MOST_BYTES:
                        raise RefusedError(413, "The form is too large", f"It has more than {_MOST_BYTES:,} bytes.")
        except TimeoutError:
            raise RefusedError(408, "The form did not arrive", f"It took longer than {_PATIENCE:g} seconds.") from None
        try:
            fields = dict(parse_qsl(content.decode(), keep_blank_values=True, max_num_fields=50, errors="strict"))
        except ValueError:
            raise RefusedError(400, "Not a form", "Its fields cannot be read.") from None
        if not hmac.compare_digest(fields.get(TOKEN, "").encode(), self.token(request).encode()):
            raise RefusedError(
                403, "Nothing was changed", "The page was opened before evertune ui was started again: open it again."
            )
        return fields
