"""The service over HTTP: endpoints, limits, and a status for every error."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evertune.serve.access import Access, Client, DeniedError
from evertune.serve.batching import OverloadedError
from evertune.serve.deployment import NotReadyError
from evertune.serve.explaining import cost_of
from evertune.serve.hosts import LOOPBACK, is_for
from evertune.serve.messages import (
    EXPLAIN,
    FEEDBACK,
    PREDICT,
    Accepted,
    Answers,
    Error,
    Explained,
    Feedback,
    Many,
    One,
    Problem,
)
from evertune.serve.openapi import page, specification
from evertune.serve.service import Service
from evertune.serve.settings import AccessSettings
from evertune.utils.traces import trace

T = TypeVar("T")
_Endpoint = Callable[[Request], Awaitable[Response]]

_MOST_PROBLEMS = 20
_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
_UNREAD = {"connection": "close"}  # what is left of the body would be taken for the next request
_PAGE = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}

logger = logging.getLogger("evertune.serve")


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        error: Why, as a message to the client.
        problems: What is wrong with its body.
        headers: Headers of the answer.
        reason: The reason in one word, for the metrics.
    """

    def __init__(
        self,
        status: int,
        error: str,
        *,
        reason: str,
        problems: list[Problem] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.status, self.error, self.reason = status, error, reason
        self.problems, self.headers = problems or [], dict(headers or {})


@dataclass(frozen=True)
class _Endpoints:
    """The endpoints of a service."""

    service: Service
    access: Access

    async def predict(self, request: Request) -> Response:
        client = self._admit(request, "predict")
        body = await self._read(request, PREDICT)
        self._check_size(body)
        self.access.charge(client, 1 if isinstance(body, One) else len(body.records))
        answers = await self.service.predict(body)
        return _json(answers[0] if isinstance(body, One) else Answers.model_construct(answers=answers))

    async def explain(self, request: Request) -> Response:
        client = self._admit(request, "explain")
        asked = await self._read(request, EXPLAIN)
        self._check_length(len(asked.text), "text")
        self.access.charge(client, cost_of(asked))
        try:
            found = await self.service.explain(asked)
        except (TypeError, ValueError) as error:
            raise RefusedError(422, str(error), reason="invalid") from None
        return _json(Explained.model_validate(found.as_json()))

    async def feedback(self, request: Request) -> Response:
        self._admit(request, "feedback")
        body = await self._read(request, FEEDBACK)
        labels = [body] if isinstance(body, Feedback) else body.feedback
        if len(labels) > self.service.limits.max_records:
            words = f"{len(labels)} labels, more than {self.service.limits.max_records} in a request"
            raise RefusedError(422, words, reason="invalid")
        if self.service.log is None:
            raise RefusedError(404, "this server keeps no log of requests, so it takes no labels", reason="no log")
        try:
            taken = self.service.feedback(labels)
        except ValueError as error:
            raise RefusedError(422, str(error), reason="invalid") from None
        return _json(Accepted(accepted=taken, ignored=len(labels) - taken), 202)

    async def health(self, request: Request) -> Response:
        why = self.service.why_unhealthy
        return JSONResponse({"status": why or "ok"}, 503 if why else 200)

    async def ready(self, request: Request) -> Response:
        ready = self.service.is_ready
        status = "ready" if ready else "draining" if self.service.draining else "waiting for a version"
        return JSONResponse({"status": status, **self.service.status}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        self._admit(request, "metrics")
        content, kind = self.service.metrics.page(request.headers.get("accept", ""))
        return Response(content, media_type=kind)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(specification())

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(page(), headers=_PAGE)

    def _admit(self, request: Request, scope: str) -> Client:
        address = request.client.host if request.client else ""
        return self.access.admit(request.headers, address, scope)

    # --- bodies

    async def _read(self, request: Request, kind: TypeAdapter[T]) -> T:
        """The body as a checked message."""
        # A page in a browser can send a form to this machine unasked, but JSON only with our consent (CORS).
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise RefusedError(415, "the body must be JSON: set Content-Type: application/json", reason="media type")
        content = await self._content(request)
        try:
            return kind.validate_json(content)
        except ValidationError as error:
            raise _invalid(error) from None

    async def _content(self, request: Request) -> bytes:
        limits = self.service.limits
        words = f"the body has more than {limits.max_body:,} bytes"
        too_large = RefusedError(413, words, reason="too large", headers=_UNREAD)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limits.max_body:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(limits.read_timeout):
                async for part in request.stream():
                    content += part
                    if len(content) > limits.max_body:
                        raise too_large
        except TimeoutError:
            words = f"the body did not arrive within {limits.read_timeout:g} s"
            raise RefusedError(408, words, reason="slow", headers=_UNREAD) from None
        return bytes(content)

    def _check_size(self, body: One | Many) -> None:
        limits = self.service.limits
        records = [body] if isinstance(body, One) else body.records
        if len(records) > limits.max_records:
            words = f"{len(records)} records, more than {limits.max_records} in a request"
            raise RefusedError(422, words, reason="invalid")
        for number, record in enumerate(records):
            self._check_length(record.characters, "text" if isinstance(body, One) else f"records.{number}.text")

    def _check_length(self, n_characters: int, at: str) -> None:
        most = self.service.limits.max_characters
        if n_characters > most:
            words = f"it has {n_characters:,} characters, more than {most:,}"
            raise RefusedError(422, "a text is too long", problems=[Problem(at=at, problem=words)], reason="invalid")


def application(service: Service, access: Access | None = None, hosts: tuple[str, ...] | None = LOOPBACK) -> Starlette:
    """The service as an ASGI application, for ``evertune serve`` or a server of your own.

    ``POST /predict``, ``/explain`` and ``/feedback``, ``GET /health``, ``/ready``, ``/metrics``, ``/openapi.json`` and
    ``/docs``. The service starts and ends with the application's lifespan.

    Args:
        service: What answers.
        access: Who may send requests. Default: anyone.
        hosts: Names that a request may give as its host; None for any. Default: those of this machine, so that a page
            in a browser cannot reach the server through a name of its own (DNS rebinding).

    Example::

        app = application(Service("registry"))  # then: uvicorn my_module:app
    """
    endpoints = _Endpoints(service, access or Access(AccessSettings()))
    routes = [
        Route("/predict", endpoints.predict, methods=["POST"]),
        Route("/explain", endpoints.explain, methods=["POST"]),
        Route("/feedback", endpoints.feedback, methods=["POST"]),
        Route("/health", endpoints.health),
        Route("/ready", endpoints.ready),
        Route("/metrics", endpoints.metrics),
        Route("/openapi.json", endpoints.openapi),
        Route("/docs", endpoints.docs),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})
    app.add_middleware(_Guard, service=service, hosts=hosts)  # type: ignore[arg-type]
    return app


class _Guard:
    """Around every request: a status for every error, the headers of every answer, and the counts.

    Nothing of a request is logged: not its path, which may hold anything, and not the message of an error, which may
    quote a text.
    """

    def __init__(self, app: ASGIApp, service: Service, hosts: tuple[str, ...] | None) -> None:
        self._app, self._service, self._hosts = app, service, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._headers()]
            await send(message)

        try:
            if not is_for(self._hosts, scope["headers"]):
                raise RefusedError(421, "this server does not answer for the host of the request", reason="host")
            await self._app(scope, receive, send_on)
        except ClientDisconnect:
            status = 499  # as nginx counts it; nobody reads it
        except Exception as error:
            if status:  # the answer had begun
                logger.error("an answer broke off: %s", trace(error), extra={"event": "error"})
            else:
                await self._answer_to(error)(scope, receive, send_on)
        finally:
            seconds = time.perf_counter() - start
            self._service.metrics.request(_endpoint(scope), status, seconds)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = {**_HEADERS, "connection": "close"} if self._service.draining else _HEADERS
        return [(name.encode(), value.encode()) for name, value in headers.items()]

    def _answer_to(self, error: Exception) -> Response:
        refused = _as_refused(error)
        self._service.metrics.refused(refused.reason)
        if refused.status == 500:
            logger.error("a request failed: %s", trace(error), extra={"event": "error"})
        body = Error.model_construct(error=refused.error, problems=refused.problems)
        return _json(body, refused.status, refused.headers)


def _as_refused(error: Exception) -> RefusedError:
    """The error as the client may see it."""
    match error:
        case RefusedError():
            return error
        case DeniedError():
            status, words, reason, headers = error.status, error.error, error.reason, error.headers
        case OverloadedError():
            status, words, reason, headers = 429, str(error), "overloaded", {"retry-after": str(error.retry_after)}
        case NotReadyError():
            status, words, reason, headers = 503, str(error), "not ready", {"retry-after": "5"}
        case TimeoutError():
            status, words, reason, headers = 503, "there was no answer in time", "timeout", {"retry-after": "1"}
        case ValueError() | TypeError() if _is_of_texts(error):
            status, words, reason, headers = 422, str(error), "invalid", {}
        case _:
            status, words, reason, headers = 500, "internal server error", "error", {}
    return RefusedError(status, words, reason=reason, headers=headers)


def _is_of_texts(error: Exception) -> bool:
    """Whether a module has refused a text, as :meth:`SequenceClassificationModule.predict` words it."""
    return str(error).startswith("texts[")


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that do not exist."""
    assert isinstance(error, HTTPException)
    return _json(Error(error=error.detail), error.status_code, error.headers)


def _invalid(error: ValidationError) -> RefusedError:
    """What is wrong with a body. What it holds is not repeated."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    if details[0]["type"] == "json_invalid":
        return RefusedError(400, f"the body is not JSON ({details[0]['msg']})", reason="invalid")
    problems = [
        Problem(at=".".join(str(part) for part in detail["loc"] if part not in ("one", "many")), problem=detail["msg"])
        for detail in details[:_MOST_PROBLEMS]
    ]
    return RefusedError(422, "the body does not fit; see problems, and /docs", problems=problems, reason="invalid")


def _json(body: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    content = body.__pydantic_serializer__.to_json(body)
    return Response(content, status, headers, media_type="application/json")


def _endpoint(scope: Mapping[str, Any]) -> str:
    """The path of the route, never that of the request: anyone could fill the metrics with paths."""
    route = scope.get("endpoint")
    return "/" + getattr(route, "__name__", "other").replace("openapi", "openapi.json")
