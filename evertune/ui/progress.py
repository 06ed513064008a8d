"""The update in progress, from the files of the registry and, where a watch is named, from its health endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from evertune.live.progress import STAGES, Progress, progress_of
from evertune.registry.lease import Holder, holder
from evertune.registry.registry import Registry, RegistryError
from evertune.ui.rendering import Templates
from evertune.ui.settings import UiSettings

_PAUSE = 1.0  # seconds between two looks
_QUIET = 15  # looks without a change after which a line is sent, so that a client that has gone is noticed
_MOST_BYTES = 1 << 16  # of the watch's answer
_TIMEOUT = 2.0  # seconds that the watch may take to answer


@dataclass(frozen=True)
class Watched:
    """What a watch says of itself.

    Args:
        address: Its address.
        health: Its answer: ``healthy``, ``why``, ``source``, ``updating`` and ``readings``; empty without one.
        problem: Why there is none.
    """

    address: str
    health: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class State:
    """What happens to a registry now.

    Args:
        aliases: The number of the version behind each alias.
        writer: Who writes to the registry; None for nobody.
        progress: The update in progress; None for none. Without a writer, it was interrupted.
        is_visible: Whether the folder of the update can be seen from here.
        problem: What of all this cannot be read.
    """

    aliases: dict[str, int]
    writer: Holder | None
    progress: Progress | None
    is_visible: bool
    problem: str = ""


class Live:
    """The page of the update in progress, and its changes as server-sent events.

    Args:
        registry: The registry that is shown.
        settings: Where the update and the watch are.
        templates: The pages.
    """

    def __init__(self, registry: Registry, settings: UiSettings, templates: Templates) -> None:
        self._registry, self._settings, self._templates = registry, settings, templates

    def page(self, request: Request) -> Response:
        return self._templates.page("update.html", "/update", "Update", **self._values())

    async def events(self, request: Request) -> Response:
        is_ending: Callable[[], bool] = getattr(request.app.state, "is_ending", lambda: False)
        return StreamingResponse(self.changes(is_ending), media_type="text/event-stream")

    async def changes(self, is_ending: Callable[[], bool] = lambda: False) -> AsyncIterator[str]:
        """The part of the page that changes, as events: at once, and whenever it has changed.

        Args:
            is_ending: Whether the server ends, and the events with it.
        """
        last, quiet = "", 0
        while not is_ending():
            now = await run_in_threadpool(self._fragment)
            quiet = 0 if now != last else quiet + 1
            if now != last:
                last = now
                yield "".join(f"data: {line}\n" for line in now.splitlines()) + "\n"
            elif quiet % _QUIET == 0:
                yield ":\n\n"
            await asyncio.sleep(_PAUSE)

    def state(self) -> State:
        """What happens now. What cannot be read is named, and the rest stays."""
        staging = self._settings.staging(self._registry)
        try:
            aliases, writer = self._registry.aliases, holder(self._registry.store)
            progress = None if staging is None else progress_of(staging)
            return State(aliases, writer, progress, staging is not None)
        except (RegistryError, OSError, ValueError) as error:
            return State({}, None, None, staging is not None, str(error))

    def watch(self) -> Watched | None:
        """What the watch says of itself; None if none is named."""
        address = self._settings.watch
        if address is None:
            return None
        try:
            with urlopen(f"{address.rstrip('/')}/healthz", timeout=_TIMEOUT) as answer:
                content = answer.read(_MOST_BYTES)
        except HTTPError as error:
            if error.code != 503:  # which comes with the reasons
                return Watched(address, {}, f"it does not answer: {error}")
            content = error.read(_MOST_BYTES)
        except OSError as error:
            return Watched(address, {}, f"it does not answer: {error}")
        try:
            return Watched(address, {**json.loads(content)})
        except (ValueError, TypeError):
            return Watched(address, {}, "its answer is not that of evertune watch")

    def _fragment(self) -> str:
        return self._templates.fill("progress.html", **self._values())

    def _values(self) -> dict[str, Any]:
        return {"state": self.state(), "watch": self.watch(), "stages": STAGES}
