"""Fills the templates beside this file, and those of the reports."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from starlette.responses import HTMLResponse

from evertune.registry.registry import Registry
from evertune.reports.page import environment
from evertune.reports.versions import MOMENT, name_of
from evertune.ui.settings import UiSettings

NAVIGATION = (
    ("/", "Versions"),
    ("/update", "Update"),
    ("/drift", "Drift"),
    ("/explain", "Explain"),
    ("/quarantine", "Quarantine"),
    ("/pending", "Pending"),
    ("/review", "Review"),
)
_STYLES = (("reports", "style.css"), ("reports", "versions.css"), ("ui", "ui.css"))


class Templates:
    """Fills templates. All text is escaped.

    Args:
        registry: The registry that is shown.
        settings: What the pages may do.
    """

    def __init__(self, registry: Registry, settings: UiSettings) -> None:
        self._environment = environment("ui", "reports")
        self._environment.filters["when"] = when
        self._environment.globals |= {
            "version_of_evertune": version("evertune"),
            "name": name_of(registry),
            "root": registry.store.root,
            "navigation": NAVIGATION,
            "allow_changes": settings.allow_changes,
            "moment": MOMENT,
        }

    def fill(self, template: str, **values: Any) -> str:
        """A template with its values, as text."""
        return self._environment.get_template(template).render(**values)

    def page(self, template: str, here: str, title: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A whole page.

        Args:
            template: File name of the template.
            here: Path of the entry of the navigation that the page belongs to.
            title: Its heading.
            status: Status of the response.
            values: Values of the template's variables.
        """
        return HTMLResponse(self.fill(template, here=here, title=title, **values), status)

    def problem(self, status: int, title: str, words: str) -> HTMLResponse:
        """A page that says what went wrong."""
        return self.page("problem.html", "", title, status, words=words)


def when(moment: str) -> str:
    """A moment in ISO 8601 as pages show it, in UTC; another text as it is.

    Example:
        >>> when("2026-03-05T08:00:00+02:00"), when("an unknown time")
        ('2026-03-05 06:00', 'an unknown time')
    """
    try:
        return f"{datetime.fromisoformat(moment).astimezone(UTC):{MOMENT}}"
    except ValueError:
        return moment


def stylesheet() -> str:
    """The style of all pages: that of the reports, and what only these pages have."""
    parts = [files(f"evertune.{room}") / name for room, name in _STYLES]
    return "".join(part.read_text(encoding="utf-8") for part in parts)


def script() -> str:
    """The script of all pages: it keeps the progress of an update up to date."""
    return (files("evertune.ui") / "ui.js").read_text(encoding="utf-8")
