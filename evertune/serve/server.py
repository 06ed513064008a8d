"""Runs the application in a process: the socket, slow clients, and an end that drops no request."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

import uvicorn

from evertune.serve.access import Access
from evertune.serve.app import application
from evertune.serve.hosts import own_names
from evertune.serve.listening import Server, announce, config_of, listen
from evertune.serve.service import Service
from evertune.serve.settings import AccessSettings, ServerSettings

_LAST = 0.5
"""Seconds in which a connection that was accepted may still send its request when no more are accepted."""

logger = logging.getLogger("evertune.serve")


def run(
    service: Service,
    settings: ServerSettings,
    access: AccessSettings | None = None,
    *,
    listening: socket.socket | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT. A second signal ends the requests under way.

    Args:
        service: What answers.
        settings: Where to listen.
        access: Who may send requests. Default: anyone on this machine.
        listening: A socket that listens already, which several processes may share. Default: one as ``settings`` say.
        on_start: Called once requests are accepted.

    Raises:
        OSError: If the port is taken, or the file of a key or certificate cannot be read.
        RegistryError: If there is no version to serve.
        TypeError: If the module does not classify.
        ValueError: If other machines can reach the server, and nothing is asked of them; or a file is damaged.
    """
    access = access or AccessSettings()
    access.check_for(settings)
    with listening or listen(settings) as accepting:
        asyncio.run(_run(service, settings, Access(access), accepting, on_start))


async def _run(
    service: Service,
    settings: ServerSettings,
    access: Access,
    listening: socket.socket,
    on_start: Callable[[], None],
) -> None:
    config = config_of(application(service, access, own_names(settings)), settings, service.limits.read_timeout)
    try:
        # Not in the application's lifespan, where an error would end in a traceback.
        await service.start()
        announce(listening, settings, logger)
        on_start()
        await _Server(config, service, settings.drain).serve([listening])
    finally:
        await service.close()
    logger.info("the server has ended", extra={"event": "ended"})


class _Server(Server):
    """Ends in two steps: first it is not ready for more, and then it accepts no more."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self._service, self._drain = service, drain

    def signalled(self) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        logger.info("ending: requests under way are answered", extra={"event": "draining"})
        asyncio.get_running_loop().call_later(self._drain, self._stop_accepting)

    def _stop_accepting(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer those who were accepted last, and whose request is still on its way, before connections are closed."""
        for listener in self.servers:
            listener.close()
        end = time.monotonic() + _LAST
        # An answered connection is closed by its answer; those that say nothing are closed after this.
        while self.server_state.connections and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
