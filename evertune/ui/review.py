"""The page of the records that wait for a label."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from evertune.live.review import fill_in, is_labelled, name_of, read_queue, without_suggestion
from evertune.ui.forms import Forms
from evertune.ui.paging import Page
from evertune.ui.rendering import Templates

_PER_PAGE = 20
_LABEL = "label"


class Review:
    """Shows the queue of ``evertune review``, the least sure record first, and fills in its labels.

    Args:
        queue: File of the queue; None if none is named.
        templates: The pages.
        forms: Checks what is sent.
    """

    def __init__(self, queue: str | None, templates: Templates, forms: Forms) -> None:
        self._queue, self._templates, self._forms = None if queue is None else Path(queue), templates, forms

    def routes(self) -> list[Route]:
        """The addresses of the page."""
        return [
            Route("/review", self._page, methods=["GET"]),
            Route("/review", self._forms.changing(self._fill_in), methods=["POST"]),
        ]

    def _page(self, request: Request) -> Response:
        lines = [] if self._queue is None else read_queue(self._queue)
        found = [(name_of(line, _LABEL), _record(line), line, kind_of(line.get("suggested"))) for line in lines]
        return self._templates.page(
            "review.html",
            "/review",
            "Review",
            queue=self._queue,
            n_labelled=sum(is_labelled(line, _LABEL) for line in lines),
            lines=Page.of(found, request, _PER_PAGE),
            classes=sorted({name for line in lines for name in _names(line.get("suggested"))}),
            label=_LABEL,
            token=self._forms.token(request),
        )

    def _fill_in(self, request: Request, fields: Mapping[str, str]) -> Response:
        if self._queue is None:
            raise ValueError("there is no queue: start evertune ui with --queue FILE")
        name, page = fields.get("name", ""), fields.get("page", "")
        fill_in(self._queue, name, lambda suggested: _label(fields, suggested), _LABEL)
        return RedirectResponse(f"/review?page={page if page.isdecimal() else 1}#r-{name}", 303)


def kind_of(suggested: Any) -> str:
    """How the label of a record is written: as a ``name``, as ``names`` with commas, or not on a page (``other``).

    Example:
        >>> kind_of("sport"), kind_of(["sport", "law"]), kind_of([{"start": 0, "end": 3}])
        ('name', 'names', 'other')
    """
    if isinstance(suggested, str):
        return "name"
    if isinstance(suggested, list) and all(isinstance(one, str) for one in suggested):
        return "names"
    return "other"


def _label(fields: Mapping[str, str], suggested: Any) -> Any:
    """The label of a form: that which is suggested, or what was written; None for an empty one."""
    if fields.get("as_suggested"):
        return suggested
    text = fields.get(_LABEL, "").strip()
    match kind_of(suggested):
        case "name":
            return text or None
        case "names":
            return [part.strip() for part in text.split(",") if part.strip()] or None
    raise ValueError("such a label can be accepted as it is suggested here, and otherwise be written into the file")


def _record(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in without_suggestion(line).items() if name != _LABEL}


def _names(suggested: Any) -> list[str]:
    match kind_of(suggested):
        case "name":
            return [suggested]
        case "names":
            return list(suggested)
    return []
