"""Trains a smaller version from what production says, judges it against production, and publishes it in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.teacher_distillation import TeacherDistillation
from evertune.gate.verdict import Check, Verdict
from evertune.lightning_modules.backbone import encoder_layers
from evertune.lightning_modules.causal_lm import CausalLMModule
from evertune.lightning_modules.pruning import prune
from evertune.lightning_modules.students import student_of
from evertune.live.judging import judge
from evertune.live.outcome import Outcome
from evertune.live.plan import Plan, clear
from evertune.live.planning import PlannedUpdate
from evertune.live.publishing import publish_if_passed
from evertune.live.records import Records, Split
from evertune.live.seconds import timed
from evertune.live.settings import StudentSettings
from evertune.live.setup import Setup
from evertune.live.slices import draw, sent_again
from evertune.live.staging import trained
from evertune.live.training import MODEL, train
from evertune.registry.version import Version
from evertune.sources.base import Row, Source
from evertune.tasks.predicting import batch_of

if TYPE_CHECKING:
    from evertune.registry.mlflow import MLflowMirror
    from evertune.training.trainer import ContinualTrainer

_STAGING = "student"
_TOP_K = 64  # words whose logits are stored for each token of a language model
_EXAMPLES, _BATCH = 256, 16  # by which the neurons and heads to remove are chosen


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
    teacher, seconds = teacher_of(setup), dict[str, float]()
    own = for_students(setup, student)
    update, verdict = taught(own, setup, teacher, student, trainer, seconds)
    what = f"the student of version {teacher.number}"
    return publish_if_passed(own, update, verdict, what, source, mirror, seconds, dry_run)


def teacher_of(setup: Setup) -> Version:
    """The version in production, which can teach now.

    Raises:
        ValueError: If there is none, or an update is not finished.
    """
    production = setup.registry.production
    if production is None:
        raise ValueError("there is no version in production that could teach a smaller one")
    if (interrupted := Plan.load(setup.staging)) is not None:
        raise ValueError(f"update {interrupted.version} is not finished: run `evertune update` first")
    return production


def for_students(setup: Setup, student: StudentSettings, **changes: Any) -> Setup:
    """What all students have in common, as what all updates have."""
    return replace(
        setup,
        staging=setup.staging / _STAGING,
        # No closed-form classifier is trained beside them: there are no new records that it would learn.
        settings=replace(setup.settings, untrained=False),
        gate=setup.gate.changed(student.gate),
        config={**setup.config, "student": student.recorded},
        **changes,
    )


def taught(
    own: Setup,
    setup: Setup,
    teacher: Version,
    student: StudentSettings,
    trainer: ContinualTrainer,
    seconds: dict[str, float],
    served: Version | None = None,
) -> tuple[PlannedUpdate, Verdict]:
    """A student in the staging folder, trained and judged; one that was interrupted goes on.

    Args:
        own: What all students have in common, from :func:`for_students`.
        setup: What all updates of the teacher have in common.
        teacher: The version that teaches.
        student: How small the student is.
        trainer: Trainer whose settings are used.
        seconds: Receives the seconds that each stage took.
        served: The student in production, where students have a registry of their own.

    Raises:
        ValueError: If the journal holds no record that the teacher has learned, or the teacher has no such student.
    """
    folder = setup.versions.folder(teacher)
    with timed(seconds, "plan"):
        segments = [one for one in setup.journal.segments() if one.number <= teacher.manifest.consumed]
        records = _Relearned(own, segments, teacher)
        if not records.split.train:
            raise ValueError(
                "the journal no longer holds a record that production has learned: distil before `evertune registry gc`"
            )
        module = setup.opened(folder / MODEL)
        smaller = _smaller(setup, module, student, records.split.train)
        update = PlannedUpdate(_plan(own, setup, teacher, served, _words(module, student)), own, records)
    with timed(seconds, "train"):
        if trained(own.staging, update.plan) is None:
            train(
                update.plan,
                records.split.train,
                own.staging,
                # Of records that the journal has deleted, those in the replay memory are learned.
                None if len(segments) == teacher.manifest.consumed else folder,
                smaller,
                _learner(trainer, module, student),
                own.schema,
                own.data,
                seed=own.settings.seed + update.plan.version,
                checkpoint_every_n_steps=own.settings.checkpoint_every_n_steps,
            )
    with timed(seconds, "evaluate"):
        return update, judge(own, update, served)


def _learner(trainer: ContinualTrainer, teacher: Any, student: StudentSettings) -> ContinualTrainer:
    """The trainer of a student: on one device, and of the methods with the replay memory only."""
    changes: dict[str, Any] = {} if student.epochs is None else {"max_epochs": student.epochs}
    if trainer.world_size > 1:
        changes |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    top_k = _TOP_K if isinstance(teacher, CausalLMModule) else None
    distillation = TeacherDistillation(teacher, student.strength, student.temperature, top_k)
    return trainer.copy_with([distillation], only=Replay, **changes)


def _smaller(setup: Setup, teacher: Any, student: StudentSettings, rows: Sequence[Row]) -> Any:
    """The student before it is trained."""
    if not (student.prune or student.prune_heads):
        return student_of(teacher, student.layers)
    # They are chosen while all layers are there: without some of them, the loss says little.
    whole = setup.placed(student_of(teacher))
    records: Any = [row["record"] for row in sorted(rows, key=draw)[:_EXAMPLES]]
    text = setup.schema.text
    columns: Any = {**setup.reading, "text": text if isinstance(text, str) else tuple(text), "id_column": None}
    examples: Any = whole.task.dataset(records, whole.tokenizer, **columns)
    places = [range(start, min(start + _BATCH, len(examples))) for start in range(0, len(examples), _BATCH)]
    batches = (batch_of(whole.task, whole, [examples[place] for place in some]) for some in places)
    prune(whole, batches, neurons=student.prune, heads=student.prune_heads)
    return whole if student.layers is None else student_of(whole, student.layers)


def _words(teacher: Any, student: StudentSettings) -> str:
    n_layers = len(encoder_layers(teacher.backbone)[1])
    removed = [("feed-forward neurons", student.prune), ("attention heads", student.prune_heads)]
    without = " and ".join(f"{share:.0%} of their {name}" for name, share in removed if share)
    return f"{student.layers or 'all'} of its {n_layers} layers{f', without {without}' if without else ''}"


def _plan(own: Setup, setup: Setup, teacher: Version, served: Version | None, words: str) -> Plan:
    """The plan of a student; that of one that was interrupted, if it is the same."""
    in_place = own.registry is setup.registry
    parent = teacher if in_place else served
    plan = Plan(
        version=own.registry.next_number(),
        parent=None if parent is None else parent.number,
        kind="distillation",
        after=0,
        consumed=teacher.manifest.consumed,
        offset=teacher.manifest.offset if in_place else None,
        reason=f"version {teacher.number} is distilled into {words}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=own.config_digest,
        teacher=None if in_place else teacher.number,
    )
    before = Plan.load(own.staging)
    if before is not None and replace(before, created=plan.created) == plan:
        return before
    clear(own.staging)
    plan.save(own.staging)
    return plan
