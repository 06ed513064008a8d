"""The pages as an ASGI application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from evertune.registry.registry import Registry
from evertune.serve.access import Access
from evertune.serve.hosts import LOOPBACK
from evertune.serve.settings import AccessSettings
from evertune.ui.changes import Changes
from evertune.ui.explaining import Explaining
from evertune.ui.forms import Forms
from evertune.ui.guard import Guard
from evertune.ui.pages import Pages
from evertune.ui.progress import Live
from evertune.ui.records import RecordPages
from evertune.ui.rendering import Templates, script, stylesheet
from evertune.ui.review import Review
from evertune.ui.settings import UiSettings


def application(
    settings: UiSettings, access: Access | None = None, hosts: tuple[str, ...] | None = LOOPBACK
) -> Starlette:
    """The pages as an ASGI application, for ``evertune ui`` or a server of your own.

    Args:
        settings: What is shown, and whether it may be changed.
        access: Who may send requests: reading needs the scope ``view``, everything else ``change``. Default: anyone.
        hosts: Names that a request may give as its host; None for any. Default: those of this machine, so that a page
            in a browser cannot reach the server through a name of its own (DNS rebinding).

    Raises:
        ImportError: If jinja2 is not installed.

    Example::

        app = application(UiSettings(registry="registry"))  # then: uvicorn my_module:app
    """
    registry, access = Registry(settings.registry), access or Access(AccessSettings())
    templates = Templates(registry, settings)
    live = Live(registry, settings, templates)
    forms, pages = Forms(settings.allow_changes), Pages(registry, templates, live)
    routes = [
        Route("/", pages.versions),
        Route("/versions/{number:int}", pages.version),
        Route("/drift", pages.drift),
        Route("/explain", Explaining(registry, templates).page),
        Route("/update", live.page),
        Route("/events", live.events),
        Route("/style.css", _style),
        Route("/script.js", _script),
        *RecordPages(registry, settings, templates, forms).routes(),
        *Review(settings.queue, templates, forms).routes(),
        *Changes(registry, templates, forms, anonymous=access.is_open).routes(),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _raised})
    app.add_middleware(Guard, access=access, hosts=hosts, templates=templates)  # type: ignore[arg-type]
    return app


async def _style(request: Request) -> Response:
    return Response(stylesheet(), media_type="text/css")


async def _script(request: Request) -> Response:
    return Response(script(), media_type="text/javascript")


async def _raised(request: Request, error: Exception) -> Response:
    """Paths and methods that do not exist: the guard has a page for them."""
    raise error
