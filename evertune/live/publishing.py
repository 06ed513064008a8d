"""Publishes a judged version with its manifest, and puts it into production, which commits its records."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from typing import TYPE_CHECKING

from evertune.gate.checks.base import figures
from evertune.gate.evaluation import Evaluation
from evertune.gate.verdict import Verdict
from evertune.live.judging import parsed
from evertune.live.no_training import UNTRAINED, keep_sums, words_of
from evertune.live.outcome import Outcome, Status, reasons_of
from evertune.live.plan import Plan, clear
from evertune.live.planning import PlannedUpdate
from evertune.live.seconds import timed, with_breakdown
from evertune.live.setup import Setup
from evertune.live.slices import save_slice
from evertune.live.staging import VERSION, results
from evertune.live.versions import EVALUATION, VERDICT
from evertune.registry.manifest import Manifest, Metrics, VerdictSummary
from evertune.registry.version import Version
from evertune.sources.base import Source, SourceError

if TYPE_CHECKING:
    from evertune.registry.mlflow import MLflowMirror

logger = logging.getLogger("evertune.live")


def publish(setup: Setup, update: PlannedUpdate, verdict: Verdict, seconds: Mapping[str, float]) -> Version:
    """Publish the staged folder as a version of the registry, with its complete manifest."""
    plan, folder = update.plan, setup.staging / VERSION
    rows, held_out, put_aside, n_again = update.records.split
    slices = [] if update.records.parent is None else update.records.parent.slices()
    if held_out:
        # Written before the manifest that names it; if the process dies in between, the same file is written again.
        slices.append(save_slice(setup.registry.store, plan.experience, held_out))
    if put_aside and verdict.passed:
        setup.journal.quarantine("put aside", put_aside, f"superseded-{plan.version}")
    said = parsed((folder / EVALUATION).read_bytes(), folder / EVALUATION, Evaluation.from_dict)
    # Without records there is no accuracy: of a student, or where all new records are trained on.
    accuracy: dict[str, float | None] = {name: one.accuracy for name, one in said.slices.items() if len(one)}
    average = sum(one.accuracy for one in said.slices.values() if len(one)) / len(accuracy) if accuracy else None
    training = results(setup.staging, plan)
    manifest = Manifest(
        version=plan.version,
        parent=plan.parent,
        created=datetime.fromisoformat(plan.created),
        kind=plan.kind,
        experience=plan.experience,
        reason=plan.reason,
        consumed=plan.consumed,
        offset=plan.offset,
        module=type(setup.model).__name__,
        classes=training["classes"],
        records={
            "train": len(rows),
            "held_out": len(held_out),
            "quarantined": sum(segment.quarantined for segment in update.records.segments) + len(put_aside),
            **({"sent_again": n_again} if n_again else {}),
        },
        verdict=VerdictSummary(verdict.passed, reasons_of(verdict)),
        metrics=Metrics(accuracy, average, {**figures(said.base)}),
        seconds=with_breakdown({**seconds, **training["seconds"]}),
        config=dict(setup.config),
        config_digest=plan.config,
        teacher=plan.teacher,
        code=f"evertune {metadata.version('evertune')}",
    )
    return setup.registry.publish(folder, manifest, slices)


def publish_if_passed(
    setup: Setup,
    update: PlannedUpdate,
    verdict: Verdict,
    what: str,
    source: Source,
    mirror: MLflowMirror | None,
    seconds: dict[str, float],
    dry_run: bool,
) -> Outcome:
    """Publish and promote a version that has learned no new records; one that is refused leaves nothing behind.

    Args:
        setup: What all such versions have in common.
        update: The update that made it.
        verdict: The verdict on it.
        what: What it is, as the beginning of a message.
        source: Source that is notified of the version.
        mirror: Second registry that receives it.
        seconds: What the time was spent on; added to.
        dry_run: Whether it is not published in any case.
    """
    if dry_run or not verdict.passed:
        clear(setup.staging)
        status: Status = "promoted" if verdict.passed else "refused"
        words = "would be promoted" if verdict.passed else "is refused, and not published"
        return Outcome(status, f"{what} {words}: {reasons_of(verdict)}", None, verdict, seconds)
    if update.records.parent is not None:
        keep_sums(setup.versions.folder(update.records.parent), setup.staging / VERSION)
    with timed(seconds, "publish"):
        version = publish(setup, update, verdict, seconds)
        return finish(setup, update.plan, version, source, mirror, seconds)


def finish(
    setup: Setup,
    plan: Plan,
    version: Version,
    source: Source,
    mirror: MLflowMirror | None,
    seconds: Mapping[str, float],
) -> Outcome:
    """Change the aliases, which commits the records; notify the source; clear the staging folder. Idempotent."""
    verdict = parsed(version.read(VERDICT), f"{VERDICT} of version {version.number}", Verdict.from_dict)
    production = setup.registry.production
    if not verdict.passed:
        setup.registry.set_refused(version.number)
    elif production is None or production.number != version.number:
        # ``expected`` protects the decision of somebody who has promoted or rolled back meanwhile.
        setup.registry.promote(version.number, reason=plan.reason, expected=plan.parent)
    if verdict.passed and plan.offset is not None:
        try:
            source.commit(plan.offset)
        except SourceError as error:
            logger.warning("the source was not notified of version %d: %s", version.number, error)
    if mirror is not None:
        try:
            mirror.mirror(version, production=verdict.passed)
        except Exception as error:
            logger.warning("version %d is not mirrored: %s", version.number, error)
    clear(setup.staging)
    status: Status = "promoted" if verdict.passed else "refused"
    words = f"version {version.number} is {'in production' if verdict.passed else 'refused'}: {reasons_of(verdict)}"
    if n_again := version.manifest.records.get("sent_again"):
        words += f"; {n_again} records that were held out before were sent again, and stay held out"
    spent, name = {**version.manifest.seconds, **seconds}, UNTRAINED
    untrained = ""
    if name in version.manifest.files:
        untrained = parsed(version.read(name), f"{name} of version {version.number}", words_of)
    return Outcome(status, words, version.number, verdict, spent, untrained)
