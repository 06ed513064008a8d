"""Decides whether there is an update, and of which records; an interrupted one is resumed as it was planned."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Literal

from evertune.gate.verdict import Verdict
from evertune.live.arrivals import Arrivals
from evertune.live.backlog import Backlog
from evertune.live.new_classes import reason_to_imprint
from evertune.live.outcome import Outcome, reasons_of
from evertune.live.plan import Plan, clear
from evertune.live.records import Records
from evertune.live.setup import Setup
from evertune.live.situations import situation
from evertune.live.triggers import Trigger
from evertune.registry.registry import RegistryError
from evertune.registry.version import Version
from evertune.sources.base import SourceError

logger = logging.getLogger("evertune.live")


class PlannedUpdate:
    """An update that is to be made: its plan, and its records.

    Args:
        plan: Plan of the update.
        setup: What all updates have in common.
        records: Its records; by default they are read when they are first asked for.
    """

    def __init__(self, plan: Plan, setup: Setup, records: Records | None = None) -> None:
        self.plan = plan
        self._setup, self._records = setup, records

    @property
    def records(self) -> Records:
        """The records of the update, which are read once."""
        if self._records is None:
            parent = self._setup.versions.numbered(self.plan.parent)
            self._records = Records(self._setup, self._setup.segments(self.plan), parent)
        return self._records


class Planner:
    """Decides whether there is an update.

    Args:
        setup: What all updates have in common.
        backlog: The records that are not learned yet.
        arrivals: The records between the source and the updates.
        trigger: Decides when to update.
    """

    def __init__(self, setup: Setup, backlog: Backlog, arrivals: Arrivals, trigger: Trigger) -> None:
        self._setup, self._backlog, self._arrivals, self._trigger = setup, backlog, arrivals, trigger
        self._registry, self._journal = setup.registry, setup.journal

    def due(self) -> str | None:
        """Why an update is due now, as a message; None if there is nothing to do."""
        plan = self._interrupted()
        if plan is not None:
            return f"update {plan.version} was interrupted"
        found = situation(self._setup, self._backlog)
        reason = self._trigger.reason(found) if found.n_new else None
        return reason or reason_to_imprint(self._setup, self._backlog)

    def plan(self) -> PlannedUpdate | Outcome:
        """Take in what has arrived, and plan an update of it if the trigger fires and the records pass the gate."""
        arrived = self._arrivals.take_in().read
        logger.info(
            "%s", f"{arrived:,} record{'s' * (arrived != 1)} arrived", extra={"event": "intake", "read": arrived}
        )
        production = self._registry.production
        found = situation(self._setup, self._backlog)
        reason = self._trigger.reason(found) if found.n_new else None
        if reason is None:
            return self._too_many_bad(production) or Outcome(
                "nothing",
                f"{found.n_pending} records are pending: {self._trigger.explanation}"
                if found.n_new
                else found.nothing_new,
            )
        segments = self._backlog.pending(production, at_most=self._setup.settings.max_records)
        records = self._without_unlearnable(Records(self._setup, segments, production))
        plan = Plan(
            version=self._registry.next_number(),
            parent=production.number if production else None,
            kind=self._kind(production),
            after=segments[0].number - 1,
            consumed=segments[-1].number,
            offset=self._journal.offset(segments[-1]),
            reason=reason,
            created=_now(),
            config=self._setup.config_digest,
            records=self._journal.counts(segments).pending,
        )
        clear(self._setup.staging)
        verdict = Verdict.of(records.checks())
        if not verdict.passed:
            self._backlog.stop(plan.parent, plan.consumed, plan.created)
            return Outcome("stopped", f"stopped before training: {reasons_of(verdict)}", verdict=verdict)
        if not records.split.train:
            self._backlog.stop(plan.parent, plan.consumed, plan.created)
            return Outcome(
                "nothing", f"{records.split.n_again} records are pending: all were held out before, and stay held out"
            )
        plan.save(self._setup.staging)
        return PlannedUpdate(plan, self._setup, records)

    def resumable(self) -> PlannedUpdate | None:
        """The update that was interrupted, unless a record in it would end it again."""
        self._arrivals.check_pending_again(self._registry.production)
        plan = self._interrupted()
        if plan is None:
            return None
        update = PlannedUpdate(plan, self._setup)
        if not self.to_be_trained(plan) or self._without_unlearnable(update.records) is update.records:
            return update
        clear(self._setup.staging)
        return None

    def planned_before(self) -> PlannedUpdate | None:
        """The update that another rank has planned in the same staging folder; None if it has not."""
        plan = Plan.load(self._setup.staging)
        return None if plan is None else PlannedUpdate(plan, self._setup)

    def to_be_trained(self, plan: Plan) -> bool:
        """Whether the training of an update is not finished."""
        from evertune.live.staging import trained

        return not self._setup.is_published(plan) and trained(self._setup.staging, plan) is None

    def withdraw_cause(self, update: PlannedUpdate, error: Exception) -> bool:
        """After an error in an update, move the records that fail alone into quarantine; false if there are none."""
        import torch

        from evertune.live.training import Interrupted, untrained
        from evertune.utils.evaluation import evaluation_mode

        not_of_a_record = (Interrupted, OSError, RegistryError, SourceError, MemoryError, torch.OutOfMemoryError)
        if self._setup.is_published(update.plan) or isinstance(error, not_of_a_record):
            return False
        setup, records = self._setup, update.records
        try:
            parent = None if records.parent is None else setup.versions.folder(records.parent)
            module = untrained(update.plan, records.numbered, parent, setup.model, setup.schema, setup.data)
            with evaluation_mode(module):
                found = self._arrivals.unlearnable(records, module)
        except Exception as trouble:  # the first error is what has to be reported
            logger.info("no record was found to be the cause: %s", trouble)
            return False
        self._arrivals.withdraw(found)
        return bool(found)

    def _without_unlearnable(self, records: Records) -> Records:
        """The same records, if all can become batches; the others go to quarantine."""
        found = self._arrivals.unlearnable(records)
        self._arrivals.withdraw(found)
        return records.without(found) if found else records

    def _too_many_bad(self, production: Version | None) -> Outcome | None:
        """Stop, although no update is due, if too many records were bad since the last update. Said once."""
        segments = self._backlog.pending(production)
        if not segments or segments[-1].number <= self._backlog.reported(production):
            return None
        counts = self._journal.counts(segments)
        checks = self._setup.gate.judge_data([], n_bad=counts.bad, n_read=counts.read)
        verdict = Verdict.of(check for check in checks if check.name == "bad records")
        if verdict.passed:
            return None
        self._backlog.stop(production.number if production else None, segments[-1].number, _now(), tried=False)
        return Outcome("stopped", f"stopped, and no update is due: {reasons_of(verdict)}", verdict=verdict)

    def _interrupted(self) -> Plan | None:
        """The plan of an unfinished update, if it is still valid."""
        plan = Plan.load(self._setup.staging)
        if plan is None:
            return None
        production = self._registry.production
        # Once promoted, a plan is done, even if production is the parent again after a rollback.
        flipped = any(event["action"] == "promote" and event["to"] == plan.version for event in self._registry.events)
        parent_stands = (production.number if production else None) == plan.parent
        same = plan.config == self._setup.config_digest and self._is_whole(plan)
        if not flipped and parent_stands and same:
            return plan
        logger.info("update %d is dropped: it had other settings, records or another parent", plan.version)
        clear(self._setup.staging)
        return None

    def _is_whole(self, plan: Plan) -> bool:
        """Whether no record of an update was withdrawn since it was planned; once published, that does not matter."""
        if plan.records is None or self._setup.is_published(plan):
            return True
        return self._journal.counts(self._setup.segments(plan)).pending == plan.records

    def _kind(self, production: Version | None) -> Literal["first", "update", "rebuild"]:
        if production is None:
            return "first"
        from evertune.live.training import remembered

        refusals, limit = self._backlog.refusals(production), self._setup.settings.rebuild_after
        if limit is None or refusals < limit:
            return "update"
        if remembered(self._setup.versions.folder(production)) is None:
            logger.warning("no rebuild after %d refusals: production has no replay memory of whole examples", refusals)
            return "update"
        return "rebuild"


def _now() -> str:
    # More than seconds: whether records were withdrawn before or after an update was planned decides if it was tried.
    return datetime.now(UTC).isoformat(timespec="microseconds")
