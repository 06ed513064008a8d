"""The records that arrive: taken in, checked again when what is asked of them changes, set aside, and brought back."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evertune.live.backlog import Backlog
from evertune.live.intake import Intake, IntakeReport
from evertune.live.records import Records
from evertune.live.setup import Setup, as_json
from evertune.registry.reasons import Reasons
from evertune.registry.version import Version
from evertune.sources.alike import alike, alike_words
from evertune.sources.base import Row

logger = logging.getLogger("evertune.live")


class Arrivals:
    """The records between the source and the updates.

    Args:
        setup: What all updates have in common.
        backlog: The records that are not learned yet.
        intake: Takes records from the source into the journal.
    """

    def __init__(self, setup: Setup, backlog: Backlog, intake: Intake) -> None:
        self._setup, self._backlog, self._intake = setup, backlog, intake
        self._journal, self._registry, self._task = setup.journal, setup.registry, setup.task

    def take_in(self) -> IntakeReport:
        """See :meth:`evertune.live.update.Updater.intake`."""
        production = self._registry.production
        self._backlog.withdraw_given_up()
        self.withdraw(self._backlog.refused_twice(production))
        self.check_pending_again(production)
        report = self._intake.run(
            limit=2 * self._setup.settings.max_records, start=production.manifest.offset if production else None
        )
        if report.words:
            facts = {"event": "set_aside", "read": report.read, "bad": report.bad}
            logger.log(logging.WARNING if report.bad else logging.INFO, "%s", report.words, extra=facts)
        self._warn_of_alike(report.labels, production)
        return report

    def read_on_from(self, offset: Mapping[str, Any]) -> None:
        """Continue to read the source from another offset."""
        last = self._journal.last
        clock = last.clock if last is not None else None
        self._journal.append([], [], self._journal.waiting(), dict(offset), clock=clock)

    def retry(self, references: Iterable[str] | None) -> tuple[list[str], dict[str, str]]:
        """See :meth:`evertune.live.update.Updater.retry`."""
        found = self._journal.references()
        if references is None:
            chosen = [reference for reference, row in found.items() if row["kind"] != "superseded"]
        else:
            chosen = list(references)
            if missing := [reference for reference in chosen if reference not in found]:
                raise ValueError(f"there is no {missing[0]} in quarantine")
        return self._intake.retry({reference: found[reference] for reference in chosen})

    def check_pending_again(self, production: Version | None) -> None:
        """If the schema or the task has changed, move the pending records that no longer fit into quarantine."""
        schema, task = self._setup.schema, self._task
        accepts = [schema.digest, type(task).__qualname__, {k: repr(v) for k, v in vars(task).items()}]
        digest = hashlib.sha256(as_json(accepts)).hexdigest()[:16]
        if self._journal.schema == digest:
            return
        bad = []
        for row in self._journal.records(self._backlog.pending(production), numbered=True):
            try:
                schema.check_again(row["record"])
            except ValueError as error:
                bad.append({**row, "kind": "refused", "reason": f"{error} (checked again under another schema)"})
        self.withdraw(bad)
        self._journal.schema = digest

    def unlearnable(self, records: Records, module: Any = None) -> list[Row]:
        """The records that would end an update, each with the reason.

        Args:
            records: The records of the update.
            module: The module that is to learn them, which then has to score every record; None only makes batches of
                them, which is much quicker.

        Raises:
            ValueError: If all of several records fail: the cause is then not a record.
        """
        from evertune.live.learnable import unlearnable

        setup, length, score = self._setup, self._setup.data.get("max_length"), module is not None
        return unlearnable(
            records.numbered, setup.task, module if score else setup.model, setup.schema, length, score=score
        )

    def withdraw(self, rows: Sequence[Row]) -> None:
        """Move pending records into quarantine, and say so."""
        self._journal.withdraw(rows)
        if rows:
            words = f"{len(rows)} pending records went to quarantine: {Reasons(rows).words()}"
            logger.warning("%s", words, extra={"event": "set_aside", "withdrawn": len(rows)})

    def _warn_of_alike(self, labels: Sequence[str], production: Version | None) -> None:
        """Warn of new classes that look like another one, if labels of this intake are among them."""
        known = production.manifest.classes if production else []
        if set(labels) <= set(known):
            return
        pending = self._journal.records(self._backlog.pending(production))
        names = [name for row in pending for name in self._task.label_names(row["record"].get(self._setup.label))]
        groups = [g for g in alike([*known, *names]) if not set(g) <= set(known) and set(g) & set(labels)]
        if groups:
            logger.warning("%s", alike_words(groups), extra={"event": "alike"})
