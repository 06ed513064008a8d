"""The records that wait for an update, as a trigger sees them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from evertune.live.backlog import Backlog
from evertune.live.seconds import TO_BE_PAID
from evertune.live.setup import Setup
from evertune.live.triggers import Situation
from evertune.registry.version import Version
from evertune.sources.base import Row

if TYPE_CHECKING:
    from evertune.gate.predictions import Predictions


def situation(setup: Setup, backlog: Backlog) -> Situation:
    """The pending records. What costs time to know is read when the trigger asks for it."""
    registry, journal, versions = setup.registry, setup.journal, setup.versions
    production = registry.production
    segments = backlog.pending(production)
    attempted = backlog.attempted(production)

    def held_out() -> list[Row]:
        return [row for rows in versions.held_out(production).values() for row in rows]

    def texts() -> list[str]:
        found = map(setup.text_of, held_out())
        return [text if isinstance(text, str) else " ".join(text) for text in found]

    return Situation(
        records=lambda: journal.records(segments),
        n_pending=journal.counts(segments).pending,
        n_new=journal.counts(segment for segment in segments if segment.number > attempted).pending,
        production=production,
        memory_texts=texts,
        last_update=backlog.last_attempt(),
        now=datetime.now(UTC),
        text=setup.schema.text,
        label=setup.label,
        memory_labels=lambda: [setup.label_of(row) for row in held_out()],
        waiting=lambda: _waiting(setup),
        held_out=lambda: versions.evaluation(production).slices,
        predict=None if production is None else lambda rows: _predictions(setup, production, rows),
        updates=lambda: [
            (version.created, sum(version.manifest.seconds.get(part, 0.0) for part in TO_BE_PAID))
            for version in registry.versions()
        ],
        label_names=setup.task.label_names,
    )


def _waiting(setup: Setup) -> list[Row]:
    """The texts that are waiting for their labels."""
    halves = (half for half in setup.journal.waiting() if half["has_text"])
    return [{"id": half["id"], "origin": half["origin"], "record": half["value"]} for half in halves]


def _predictions(setup: Setup, production: Version, rows: Sequence[Row]) -> Predictions:
    """The predictions of a version on records that may lack a label; the model is released afterwards."""
    import torch

    from evertune.live.evaluation import evaluate
    from evertune.live.training import MODEL

    numbered = [
        {"id": str(place), "record": {**({} if setup.label is None else {setup.label: ""}), **row["record"]}}
        for place, row in enumerate(rows)
    ]
    module = setup.opened(setup.versions.folder(production) / MODEL)
    said = evaluate(module, {"": numbered}, **setup.reading)[""]
    del module
    if torch.cuda.is_available():  # a watching process must not hold GPU memory that the update needs
        torch.cuda.empty_cache()
    return said
