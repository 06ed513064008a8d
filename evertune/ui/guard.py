"""Around every request: who may send it, the headers of every answer, and a page for every error."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evertune.registry.store import RegistryError
from evertune.serve.access import Access, DeniedError
from evertune.serve.hosts import is_for
from evertune.ui.rendering import Templates
from evertune.utils.traces import trace

HEADERS = {
    # Nothing from elsewhere, and no script or style sheet in the page itself. Attributes `style` place the marks of
    # charts: their values are numbers and colours of ours.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "style-src-attr 'unsafe-inline'; connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_READING = ("GET", "HEAD")
_CHALLENGE = {"www-authenticate": 'Basic realm="evertune", charset="UTF-8"'}

logger = logging.getLogger("evertune.ui")


class RefusedError(Exception):
    """A request that is answered with a page that says why not.

    Args:
        status: HTTP status.
        title: What is wrong, in few words.
        words: What is wrong, and what to do.
    """

    def __init__(self, status: int, title: str, words: str) -> None:
        super().__init__(words)
        self.status, self.title, self.words = status, title, words


class Guard:
    """Checks the host and the key of every request, and turns every error into a page.

    Args:
        app: The application behind it.
        access: Who may send requests. A browser sends an API key as the password that it asks for.
        hosts: Names that a request may give as its host; None for any.
        templates: The pages.
    """

    def __init__(self, app: ASGIApp, access: Access, hosts: tuple[str, ...] | None, templates: Templates) -> None:
        self._app, self._access, self._hosts, self._templates = app, access, hosts, templates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, receive, send_on)
        except ClientDisconnect:
            pass  # nobody reads the answer
        except Exception as error:
            if begun:
                logger.error("an answer broke off: %s", trace(error), extra={"event": "error"})
            else:
                await self._answer_to(error)(scope, receive, send_on)

    def _admit(self, scope: Scope) -> None:
        if not is_for(self._hosts, scope["headers"]):
            raise RefusedError(421, "Another host", "This server does not answer for the host of the request.")
        address = (scope.get("client") or ("",))[0]
        asked = "view" if scope["method"] in _READING else "change"
        client = self._access.admit(with_key(Headers(scope=scope)), address, asked)
        scope.setdefault("state", {})["client"] = client

    def _answer_to(self, error: Exception) -> Response:
        problem = self._templates.problem
        match error:
            case RefusedError():
                return problem(error.status, error.title, error.words)
            case DeniedError():
                page = problem(error.status, "Not allowed", f"{error}: an API key is the password, with any name.")
                if error.status == 401:
                    page.headers.update(_CHALLENGE)
                return page
            case HTTPException():
                return problem(error.status_code, error.detail, "There is no such page.")
            case RegistryError() | OSError() | ValueError():
                return problem(500, "This cannot be shown", str(error))
        logger.error("a request failed: %s", trace(error), extra={"event": "error"})
        return problem(500, "Something went wrong", "The log of evertune ui says where.")


def with_key(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Headers in which a password, as browsers send it, is an API key.

    Example:
        >>> with_key({"authorization": "Basic bWU6ZXZ0X2tleQ=="})
        {'x-api-key': 'evt_key'}
    """
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return headers
    try:
        return {"x-api-key": base64.b64decode(given, validate=True).decode().partition(":")[2]}
    except ValueError:  # not base64, or not text
        return {}
