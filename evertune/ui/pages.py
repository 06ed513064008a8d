"""The pages about versions: the list, one version with its answers, and drift over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from evertune.registry.registry import Registry, RegistryError
from evertune.registry.version import Version
from evertune.reports.answers import MAX_CLASSES, Answers, Wrong, answers_of
from evertune.reports.registry import MARKS, MAX_OPEN_ENTRIES, confusion_bars, floor_of, overview_chart
from evertune.reports.versions import (
    COLORS,
    MAX_SHOWN,
    Survey,
    VersionView,
    details_of,
    facts,
    headline,
    held_slices,
    line_to,
    origins_of,
    slices_of,
    timeline,
    verdict_of,
    version_views,
)
from evertune.ui.drift import arrivals, loss_chart, shares_of_labels
from evertune.ui.guard import RefusedError
from evertune.ui.paging import Page
from evertune.ui.progress import Live
from evertune.ui.rendering import Templates

MAX_ROWS = 50  # versions listed without ?all=1
_WRONG_PER_PAGE = 25
_MAX_TEXT = 1_000  # characters of a record's text


class Pages:
    """The pages about versions.

    Args:
        registry: The registry that is shown.
        templates: The pages.
        live: The update in progress.
    """

    def __init__(self, registry: Registry, templates: Templates, live: Live) -> None:
        self._registry, self._templates, self._live = registry, templates, live

    def versions(self, request: Request) -> Response:
        survey = Survey.of(self._registry)
        views = version_views(survey)
        line, shown = [view for view in views if view.served], views[-MAX_SHOWN:]
        low = floor_of([value for view in shown for value in [*view.accuracy.values(), view.average]])
        rows = views if request.query_params.get("all") else _newest(views)
        return self._templates.page(
            "versions_list.html",
            "/",
            "Versions",
            headline=_headline(survey, line),
            facts=facts(self._registry, views, line) if views else [],
            survey=survey,
            views=views,
            rows=rows[::-1],
            kinds=[(status, COLORS[status]) for status in MARKS if any(view.status == status for view in shown)],
            overview=overview_chart(shown, low),
            timeline=timeline(views, survey.events)[:MAX_OPEN_ENTRIES],
            state=self._live.state(),
        )

    def version(self, request: Request) -> Response:
        survey, number = Survey.of(self._registry), request.path_params["number"]
        if number in survey.damaged:
            raise RefusedError(500, f"Version {number} cannot be read", survey.damaged[number])
        views = {view.number: view for view in version_views(survey)}
        if number not in views:
            raise RefusedError(404, f"There is no version {number}", "It may have been deleted: see the list.")
        view = views[number]
        line = [views[one.number] for one in line_to(survey.versions, view.version)]
        verdict, no_verdict = _read(lambda: verdict_of(view.version))
        answers, no_answers = _read(lambda: answers_of(self._registry, view.version))
        held, no_slices = _read(lambda: _held(line, survey.versions))
        chosen = _chosen(answers, request.query_params)
        return self._templates.page(
            "version.html",
            "/",
            f"Version {number}",
            view=view,
            survey=survey,
            details=details_of(view),
            held=held or [],
            verdict=verdict,
            answers=answers,
            problems=[words for words in (no_slices, no_verdict, no_answers) if words],
            confusions=confusion_bars(answers) if answers else [],
            pairs=answers.confusions if answers else [],
            max_classes=MAX_CLASSES,
            max_text=_MAX_TEXT,
            chosen=Page.of(chosen, request, _WRONG_PER_PAGE),
            filters=request.query_params,
            happened=_happened,
            events=[event for event in survey.events if number in (event.get("from"), event.get("to"))],
        )

    def drift(self, request: Request) -> Response:
        survey = Survey.of(self._registry)
        views = version_views(survey)[-MAX_SHOWN:]
        found = arrivals(views, version_views(survey))
        return self._templates.page(
            "over_time.html",
            "/drift",
            "Drift over time",
            arrivals=found[::-1],
            chart_of_loss=loss_chart(found, views),
            shares=shares_of_labels(views),
            watch=self._live.watch(),
        )


def _headline(survey: Survey, line: Sequence[VersionView]) -> str:
    number = survey.aliases.get("production")
    if survey.problem:
        return "Which version is in production cannot be read."
    if survey.production is None and number is not None:
        return f"Version {number} is in production, and cannot be read."
    return headline(line)


def _newest(views: Sequence[VersionView]) -> Sequence[VersionView]:
    """The newest versions, and older ones with an alias: production may be one of them."""
    old, new = views[:-MAX_ROWS], views[-MAX_ROWS:]
    return [*(view for view in old if view.aliases or view.status == "in production"), *new]


def _held(line: Sequence[VersionView], versions: Sequence[Version]) -> Sequence[Any]:
    return held_slices(line, origins_of(slices_of([view.version for view in line]), versions))


def _chosen(answers: Answers | None, asked: Mapping[str, str]) -> list[Wrong]:
    """The wrong answers that the query asks for."""
    wanted = [(name, asked[name]) for name in ("label", "predicted", "slice") if asked.get(name)]
    return [
        one
        for one in (answers.wrong if answers else [])
        if all(getattr(one, name) == value for name, value in wanted) and (one.suspect or not asked.get("suspect"))
    ]


def _happened(event: Mapping[str, Any], number: int) -> str:
    """What a change of an alias was for a version.

    Example:
        >>> change = {"action": "promote", "from": 2, "to": 4}
        >>> _happened(change, 4), _happened(change, 2)
        ('Put into production, in place of version 2', 'Left production for version 4')
    """
    old, new = event.get("from"), event.get("to")
    if event.get("action") == "refused":
        return "Refused" if new == number else f"No longer the last that was refused: that is version {new}"
    if new != number:
        return f"Left production for version {new}"
    back = " back" if event.get("action") == "rollback" else ""
    return f"Put{back} into production" + (f", in place of version {old}" if old else "")


def _read(read: Any) -> tuple[Any, str]:
    """What a function reads, or why it cannot be read: the rest of the page stays."""
    try:
        return read(), ""
    except (RegistryError, OSError, ValueError) as error:
        return None, str(error)
