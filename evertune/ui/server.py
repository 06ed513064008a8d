"""Runs the pages in a process until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import socket

from evertune.serve.access import Access
from evertune.serve.hosts import own_names
from evertune.serve.listening import Server, announce, config_of, listen
from evertune.serve.settings import AccessSettings, ServerSettings
from evertune.ui.app import application
from evertune.ui.settings import UiSettings

_PATIENCE = 10.0  # seconds that a client has to send its headers

logger = logging.getLogger("evertune.ui")


def run(settings: UiSettings, server: ServerSettings, access: AccessSettings) -> None:
    """Show a registry until SIGTERM or SIGINT.

    Args:
        settings: What is shown, and whether it may be changed.
        server: Where to listen.
        access: Who may send requests.

    Raises:
        ImportError: If jinja2 is not installed.
        OSError: If the port is taken, or a file cannot be read.
        ValueError: If other machines can reach the server, and nothing is asked of them; or a file is damaged.
    """
    access.check_for(server)
    with listen(server) as listening:
        asyncio.run(_run(settings, server, Access(access), listening))


async def _run(settings: UiSettings, server: ServerSettings, access: Access, listening: socket.socket) -> None:
    app = application(settings, access, own_names(server))
    running = Server(config_of(app, server, _PATIENCE))
    app.state.is_ending = lambda: running.should_exit
    announce(listening, server, logger)
    await running.serve([listening])
