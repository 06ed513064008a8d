"""A server on a socket: its limits, slow clients, and an end by a signal with exit code 0."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from evertune.serve.settings import ServerSettings

_KEEP_ALIVE = 75
"""Seconds that a connection without requests stays open: longer than load balancers and clients keep theirs, so that
the server is not the first to close it, just when a request arrives."""
_MOST_HEADERS = 1 << 14  # bytes


class Server(uvicorn.Server):
    """A server that SIGTERM and SIGINT end: it answers the requests under way, unless a second signal comes."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.signalled)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def signalled(self) -> None:
        """A signal has arrived."""
        self.force_exit = self.should_exit
        self.should_exit = True


def config_of(app: ASGIApp, settings: ServerSettings, patience: float) -> uvicorn.Config:
    """How an application is served.

    Args:
        app: The application.
        settings: Where and how to listen.
        patience: Seconds that a client has to send its headers.

    Raises:
        OSError: If a certificate or a key cannot be read.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # below, it logs what any client can cause
    config = uvicorn.Config(
        app,
        http=_protocol(patience),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        h11_max_incomplete_event_size=_MOST_HEADERS,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
        ssl_ca_certs=settings.client_authority,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.client_authority else ssl.CERT_NONE,
    )
    config.load()  # a certificate that cannot be read is an error before anything is loaded
    return config


def listen(settings: ServerSettings) -> socket.socket:
    """The socket to serve on.

    Raises:
        OSError: If the port is taken.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2_048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise OSError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from error


def announce(listening: socket.socket, settings: ServerSettings, logger: logging.Logger) -> None:
    """Log the address."""
    address = "{}:{}".format(*listening.getsockname()[:2])
    scheme = "https" if settings.certificate else "http"
    logger.info("listening on %s", f"{scheme}://{address}", extra={"event": "listening", "address": address})


def _protocol(patience: float) -> type[H11Protocol]:
    """The protocol of a connection that is closed if headers take longer than ``patience`` seconds.

    uvicorn waits for the first request of a connection for ever, and for each later one as soon as a byte has arrived.
    """

    class PatientProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _watch(self) -> None:
            answering: Any = self.cycle
            if answering is not None and not answering.response_complete:
                self._forget()
            elif self._timer is None:
                self._timer = self.loop.call_later(patience, self._give_up)

        def _forget(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            answering: Any = self.cycle
            if (answering is None or answering.response_complete) and not self.transport.is_closing():
                self.transport.close()

    return PatientProtocol
