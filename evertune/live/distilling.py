"""A smaller version that the one in production teaches, judged against it and published in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.teacher_distillation import TeacherDistillation
from evertune.gate.verdict import Check
from evertune.lightning_modules.backbone import encoder_layers
from evertune.lightning_modules.pruning import prune_feed_forward
from evertune.lightning_modules.students import student_of
from evertune.live.judging import judge
from evertune.live.no_training import keep_sums
from evertune.live.outcome import Outcome, reasons_of
from evertune.live.plan import Plan, clear
from evertune.live.planning import PlannedUpdate
from evertune.live.publishing import finish, publish
from evertune.live.records import Records, Split
from evertune.live.seconds import timed
from evertune.live.settings import StudentSettings
from evertune.live.setup import Setup
from evertune.live.slices import draw, sent_again
from evertune.live.staging import VERSION, trained
from evertune.live.training import MODEL, train
from evertune.registry.segments import Segment
from evertune.registry.version import Version
from evertune.sources.base import Row, Source
from evertune.tasks.predicting import batch_of

if TYPE_CHECKING:
    from evertune.registry.mlflow import MLflowMirror
    from evertune.training.trainer import ContinualTrainer

_STAGING = "student"
_EXAMPLES, _BATCH = 256, 16  # by which the neurons to remove are chosen


class _Relearned(Records):
    """What production has learned, as far as the journal still holds it, without what is held out."""

    @cached_property
    def split(self) -> Split:
        """All of them are trained on."""
        new, _, _ = sent_again(self.rows, self.slices, self._setup.schema.id)
        return Split(new[-self._setup.settings.max_records :], [], [], 0)

    def checks(self) -> list[Check]:
        """None: they were checked when they arrived."""
        return []


def distil(
    setup: Setup,
    trainer: ContinualTrainer,
    student: StudentSettings,
    source: Source,
    mirror: MLflowMirror | None = None,
    dry_run: bool = False,
) -> Outcome:
    """Train a smaller version from production's answers, and put it into production if the gate lets it pass.

    See :meth:`evertune.live.update.Updater.distil`. Requires the registry's lease.
    """
    production = setup.registry.production
    if production is None:
        raise ValueError("there is no version in production that could teach a smaller one")
    if (interrupted := Plan.load(setup.staging)) is not None:
        raise ValueError(f"update {interrupted.version} is not finished: run `evertune update` first")
    if given_up := setup.registry.given_up:  # which a promotion would make pending again
        raise ValueError(
            f"the records of version {given_up[-1]}, which was rolled back, are given up until the next update: run "
            "`evertune update` first"
        )
    # No closed-form classifier is trained beside it: there are no new records that it would learn.
    setup = replace(setup, staging=setup.staging / _STAGING, settings=replace(setup.settings, untrained=False))
    folder = setup.versions.folder(production)
    seconds: dict[str, float] = {}
    with timed(seconds, "plan"):
        segments = _learned(setup, production)
        records = _Relearned(setup, segments, production)
        if not records.split.train:
            raise ValueError(
                "the journal no longer holds a record that production has learned: distil before `evertune registry gc`"
            )
        teacher = setup.opened(folder / MODEL)
        smaller = _smaller(setup, teacher, student, records.split.train)
        reason = f"version {production.number} is distilled into {_words(teacher, student)}"
        update = PlannedUpdate(_plan(setup, production, reason), setup, records)
    with timed(seconds, "train"):
        if trained(setup.staging, update.plan) is None:
            learner = trainer.copy_with(
                [TeacherDistillation(teacher, student.strength, student.temperature)], only=Replay
            )
            train(
                update.plan,
                records.split.train,
                setup.staging,
                # Of records that the journal has deleted, those in the replay memory are learned.
                None if len(segments) == production.manifest.consumed else folder,
                smaller,
                learner,
                setup.schema,
                setup.data,
                seed=setup.settings.seed + update.plan.version,
                checkpoint_every_n_steps=setup.settings.checkpoint_every_n_steps,
            )
    with timed(seconds, "evaluate"):
        verdict = judge(setup, update)
    if dry_run or not verdict.passed:
        clear(setup.staging)
        words = "would be promoted" if verdict.passed else "is refused, and not published"
        return Outcome(
            "promoted" if verdict.passed else "refused",
            f"the student of version {production.number} {words}: {reasons_of(verdict)}",
            None,
            verdict,
            seconds,
        )
    keep_sums(folder, setup.staging / VERSION)
    with timed(seconds, "publish"):
        version = publish(setup, update, verdict, seconds)
        return finish(setup, update.plan, version, source, mirror, seconds)


def _learned(setup: Setup, production: Version) -> list[Segment]:
    """The segments of the journal that production has learned, without those that a rollback has given up."""
    consumed = {version.number: version.manifest.consumed for version in setup.registry.versions()}
    last = production.manifest.consumed
    # Where a version is no longer there to tell, too much is left out rather than too little.
    given_up = [
        range(consumed.get(event["to"], 0) + 1, consumed.get(event["discard"], last) + 1)
        for event in setup.registry.events
        if "discard" in event
    ]
    segments = [one for one in setup.journal.segments() if one.number <= last]
    return [one for one in segments if not any(one.number in some for some in given_up)]


def _smaller(setup: Setup, teacher: Any, student: StudentSettings, rows: Sequence[Row]) -> Any:
    """The student before it is trained."""
    if not student.prune:
        return student_of(teacher, student.layers)
    # The neurons are chosen while all layers are there: without some of them, the loss says little.
    whole = setup.placed(student_of(teacher))
    records: Any = [row["record"] for row in sorted(rows, key=draw)[:_EXAMPLES]]
    text = setup.schema.text
    columns: Any = {**setup.reading, "text": text if isinstance(text, str) else tuple(text), "id_column": None}
    examples: Any = whole.task.dataset(records, whole.tokenizer, **columns)
    places = [range(start, min(start + _BATCH, len(examples))) for start in range(0, len(examples), _BATCH)]
    batches = (batch_of(whole.task, whole, [examples[place] for place in some]) for some in places)
    prune_feed_forward(whole, student.prune, batches)
    return whole if student.layers is None else student_of(whole, student.layers)


def _words(teacher: Any, student: StudentSettings) -> str:
    n_layers = len(encoder_layers(teacher.backbone)[1])
    layers = f"{student.layers or 'all'} of its {n_layers} layers"
    return f"{layers}, without {student.prune:.0%} of their feed-forward neurons" if student.prune else layers


def _plan(setup: Setup, production: Version, reason: str) -> Plan:
    """The plan of a student; that of one that was interrupted, if it is the same."""
    plan = Plan(
        version=setup.registry.next_number(),
        parent=production.number,
        kind="distillation",
        after=0,
        consumed=production.manifest.consumed,
        offset=production.manifest.offset,
        reason=reason,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=setup.config_digest,
    )
    before = Plan.load(setup.staging)
    if before is not None and replace(before, created=plan.created) == plan:
        return before
    clear(setup.staging)
    plan.save(setup.staging)
    return plan
