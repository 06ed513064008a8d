"""Runs the application in a process: the socket, slow clients, and an end that drops no request."""

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
from uvicorn.protocols.http.h11_impl import H11Protocol

from evertune.serve.access import Access
from evertune.serve.app import application
from evertune.serve.service import Service
from evertune.serve.settings import AccessSettings, ServerSettings

_KEEP_ALIVE = 75
"""Seconds that a connection without requests stays open: longer than load balancers and clients keep theirs, so that
the server is not the first to close it, just when a request arrives."""
_MOST_HEADERS = 1 << 14  # bytes

logger = logging.getLogger("evertune.serve")


def run(service: Service, settings: ServerSettings, access: AccessSettings | None = None) -> None:
    """Serve until SIGTERM or SIGINT. A second signal ends the requests under way.

    Args:
        service: What answers.
        settings: Where to listen.
        access: Who may send requests. Default: anyone on this machine.

    Raises:
        OSError: If the port is taken, or the file of a key or certificate cannot be read.
        RegistryError: If there is no version to serve.
        TypeError: If the module does not classify.
        ValueError: If other machines can reach the server, and nothing is asked of them; or a file is damaged.
    """
    access = access or AccessSettings()
    access.check_for(settings)
    with _listen(settings) as listening:
        asyncio.run(_run(service, settings, Access(access), listening))


async def _run(service: Service, settings: ServerSettings, access: Access, listening: socket.socket) -> None:
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # below, it logs what any client can cause
    config = uvicorn.Config(
        application(service, access, (*_own_names(settings),) if settings.is_local else None),
        http=_protocol(service.limits.read_timeout),
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
    try:
        # Not in the application's lifespan, where an error would end in a traceback.
        await service.start()
        address = "{}:{}".format(*listening.getsockname()[:2])
        scheme = "https" if settings.certificate else "http"
        logger.info("listening on %s", f"{scheme}://{address}", extra={"event": "listening", "address": address})
        await _Server(config, service, settings.drain).serve([listening])
    finally:
        await service.close()
    logger.info("the server has ended", extra={"event": "ended"})


class _Server(uvicorn.Server):
    """Ends in two steps: first it is not ready for more, and then it accepts no more."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self._service, self._drain = service, drain

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        logger.info("ending: requests under way are answered", extra={"event": "draining"})
        asyncio.get_running_loop().call_later(self._drain, self._stop_accepting)

    def _stop_accepting(self) -> None:
        self.should_exit = True


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


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2_048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise OSError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from error


def _own_names(settings: ServerSettings) -> set[str]:
    return {"localhost", "127.0.0.1", "[::1]", settings.host}
