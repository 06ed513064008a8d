"""The pages about records: quarantine with the reasons, and what waits for the next update."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from evertune.live.backlog import by_origin, pending_segments
from evertune.registry.journal import Journal
from evertune.registry.reasons import Reasons, reason_of
from evertune.registry.registry import Registry
from evertune.sources.base import Row
from evertune.ui.forms import Forms
from evertune.ui.guard import RefusedError
from evertune.ui.paging import Page
from evertune.ui.rendering import Templates
from evertune.ui.settings import UiSettings
from evertune.utils.secrets import without_secrets

_MOST_SHOWN = 20  # records of a reason
_PER_PAGE = 50


@dataclass(frozen=True)
class Group:
    """The records in quarantine that share a reason.

    Args:
        name: Name of the group: a hash of what the reasons have in common.
        kind: Kind of the records.
        words: The reason of the first of them.
        records: The records by their references.
    """

    name: str
    kind: str
    words: str
    records: Mapping[str, Row]

    @property
    def shown(self) -> Sequence[tuple[str, Row]]:
        """The first records."""
        return list(self.records.items())[:_MOST_SHOWN]


def quarantined(journal: Journal) -> list[Group]:
    """The records in quarantine by their reasons, the commonest first.

    Raises:
        ValueError: If a file is damaged.
    """
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for reference, row in journal.references().items():
        found.setdefault(reason_of(row), {})[reference] = row
    groups = []
    for key, records in found.items():
        first = next(iter(records.values()))
        name = hashlib.sha256(repr(key).encode(errors="backslashreplace")).hexdigest()[:12]
        groups.append(Group(name, first["kind"], first["reason"], records))
    return sorted(groups, key=lambda group: -len(group.records))


class RecordPages:
    """The pages about records.

    Args:
        registry: The registry that is shown.
        settings: By what records are checked again.
        templates: The pages.
        forms: Checks what is sent.
    """

    def __init__(self, registry: Registry, settings: UiSettings, templates: Templates, forms: Forms) -> None:
        self._registry, self._settings, self._templates, self._forms = registry, settings, templates, forms

    def routes(self) -> list[Route]:
        """The addresses of these pages."""
        return [
            Route("/quarantine", self._quarantine),
            Route("/quarantine/{group}/retry", self._forms.asking(self._retry_page), methods=["GET"]),
            Route("/quarantine/{group}/retry", self._forms.changing(self._retry), methods=["POST"]),
            Route("/pending", self._pending),
        ]

    def _quarantine(self, request: Request) -> Response:
        groups = quarantined(Journal(self._registry.store))
        return self._templates.page(
            "quarantine.html",
            "/quarantine",
            "Quarantine",
            groups=groups,
            total=sum(len(group.records) for group in groups),
            live=self._settings.live,
        )

    def _retry_page(self, request: Request) -> Response:
        group = self._group(request)
        return self._templates.page(
            "retry.html",
            "/quarantine",
            "Check these records again?",
            group=group,
            live=self._settings.live,
            token=self._forms.token(request),
        )

    def _retry(self, request: Request, fields: Mapping[str, str]) -> Response:
        group = self._group(request)
        place = ["--config", str(self._settings.live), "--registry", self._registry.store.root]
        words = [sys.executable, "-m", "evertune", "quarantine", "retry", "--json", *place, *group.records]
        # The command itself, so that it takes the lease as it always does, and its memory is released afterwards.
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode not in (0, 3):
            raise ValueError(without_secrets(done.stderr.strip() or f"it ended with exit code {done.returncode}"))
        found = json.loads(done.stdout)
        left = [{**group.records[reference], "reason": why} for reference, why in found["still_in_quarantine"].items()]
        return self._templates.page(
            "retried.html",
            "/quarantine",
            f"{len(found['pending']):,} of {len(group.records):,} records are pending again",
            reasons=Reasons(left).all,
        )

    def _group(self, request: Request) -> Group:
        if self._settings.live is None:
            words = "Start `evertune ui` with --live FILE, the YAML file of `evertune update` that has the schema."
            raise RefusedError(409, "Records cannot be checked again here", words)
        groups = {group.name: group for group in quarantined(Journal(self._registry.store))}
        if request.path_params["group"] not in groups:
            raise RefusedError(404, "There are no such records in quarantine", "They may have left it meanwhile.")
        return groups[request.path_params["group"]]

    def _pending(self, request: Request) -> Response:
        journal = Journal(self._registry.store)
        rows = journal.records(pending_segments(self._registry), numbered=True)
        return self._templates.page(
            "pending.html",
            "/pending",
            "Pending",
            total=len(rows),
            origins=by_origin(rows),
            rows=Page.of(rows, request, _PER_PAGE),
            waiting=len(journal.waiting()),
        )
