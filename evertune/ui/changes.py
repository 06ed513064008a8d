"""The pages that change which version is in production, each after a confirmation."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from evertune.registry.registry import Registry, RegistryError
from evertune.registry.version import Version
from evertune.ui.forms import Forms
from evertune.ui.guard import RefusedError
from evertune.ui.rendering import Templates


class Changes:
    """Promote and roll back, as ``evertune registry`` does: neither needs the lease, and a watch may go on.

    Args:
        registry: The registry.
        templates: The pages.
        forms: Checks what is sent.
        anonymous: Whether nobody is asked who they are: events then name the user of this process.
    """

    def __init__(self, registry: Registry, templates: Templates, forms: Forms, anonymous: bool) -> None:
        self._registry, self._templates, self._forms, self._anonymous = registry, templates, forms, anonymous

    def routes(self) -> list[Route]:
        """The addresses of these pages."""
        asking, changing = self._forms.asking, self._forms.changing
        return [
            Route("/versions/{number:int}/promote", asking(self._promote_page), methods=["GET"]),
            Route("/versions/{number:int}/promote", changing(self._promote), methods=["POST"]),
            Route("/rollback", asking(self._rollback_page), methods=["GET"]),
            Route("/rollback", changing(self._rollback), methods=["POST"]),
        ]

    def _promote_page(self, request: Request) -> Response:
        version = self._found(request.path_params["number"])
        now = self._registry.aliases.get("production")
        if now == version.number:
            raise RefusedError(409, "Nothing to do", f"Version {now} is in production already.")
        return self._templates.page(
            "promote.html",
            "/",
            f"Put version {version.number} into production?",
            version=version,
            now=now,
            token=self._forms.token(request),
        )

    def _promote(self, request: Request, fields: Mapping[str, str]) -> Response:
        version = self._found(request.path_params["number"])
        self._registry.promote(
            version.number,
            fields.get("reason", ""),
            _number(fields.get("expected")),
            force=bool(fields.get("force")),
            by=self._by(request),
        )
        return RedirectResponse(f"/versions/{version.number}", 303)

    def _rollback_page(self, request: Request) -> Response:
        aliases = self._registry.aliases
        now, back = aliases.get("production"), aliases.get("previous")
        if now is None or back is None:
            raise RefusedError(409, "Nothing to go back to", "There is no previous version: promote one by its number.")
        version = self._registry.version(back)
        return self._templates.page(
            "rollback.html",
            "/",
            f"Put version {back} back into production?",
            version=version,
            now=now,
            records=self._registry.unlearned(version, now),
            token=self._forms.token(request),
        )

    def _rollback(self, request: Request, fields: Mapping[str, str]) -> Response:
        expected = _number(fields.get("expected"))
        if expected is None:
            raise ValueError("the form does not say which version it is about: open the page again")
        discard = bool(fields.get("discard"))
        self._registry.rollback(fields.get("reason", ""), expected, discard=discard, by=self._by(request))
        return RedirectResponse("/", 303)

    def _found(self, number: int) -> Version:
        try:
            return self._registry.version(number)
        except RegistryError as error:
            raise RefusedError(404, f"There is no version {number} to promote", str(error)) from None

    def _by(self, request: Request) -> str | None:
        return None if self._anonymous else str(request.state.client.name)


def _number(text: str | None) -> int | None:
    return int(text) if text else None
