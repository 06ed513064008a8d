"""An update as a transaction: take in new records, decide, train, evaluate, judge, publish, commit."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.gate.gate import Gate
from evertune.live import erasure
from evertune.live.arrivals import Arrivals
from evertune.live.backlog import Backlog
from evertune.live.intake import Intake, IntakeReport
from evertune.live.outcome import Outcome, Status, reasons_of
from evertune.live.plan import clear
from evertune.live.planning import PlannedUpdate, Planner
from evertune.live.seconds import timed, with_breakdown
from evertune.live.settings import StudentSettings, UpdateSettings
from evertune.live.setup import Setup
from evertune.live.situations import situation
from evertune.live.students import Students
from evertune.live.triggers import Situation, Trigger, Volume
from evertune.registry.journal import Journal
from evertune.registry.reasons import Reasons
from evertune.registry.registry import Registry
from evertune.sources.base import Source
from evertune.sources.labels import LabelJoin
from evertune.sources.masking import Masker
from evertune.sources.schema import RecordSchema
from evertune.utils.ranks import is_leader, rank_and_world_size, started_together, tell_all

if TYPE_CHECKING:
    from evertune.registry.mlflow import MLflowMirror
    from evertune.tasks.base import Task
    from evertune.training.trainer import ContinualTrainer

logger = logging.getLogger("evertune.live")

DATA_OF_UPDATES = frozenset({"experience", "tokenizer", "text", "label", "collate_fn", "id_column", "seed", "task"})
"""The arguments of :class:`~evertune.streams.ExperienceDataModule` that an update sets itself; a user sets the rest."""

_NEEDED = {
    "tokenizer": "tokenizer (a tokenizer of transformers)",
    "hparams": "hparams (call save_hyperparameters() in its constructor)",
    "save_pretrained": "save_pretrained(folder), which writes the weights and whatever rebuilds the module",
    "from_pretrained": "from_pretrained(folder, lazy=False, **settings), a class method that reads them back",
}
"""The attributes that a module needs to be updated, with the words by which an error message names them."""


class Updater:
    """Keeps the version in production up to date with a source, one transaction at a time.

    An update takes in the records that have arrived. If a trigger fires, it trains from the version in production,
    evaluates on the slices of every experience so far, and lets the gate compare the two versions. A version that
    passes is published; it goes into production and its records become learned in the same instant, by replacing one
    file. A version that is refused leaves production unchanged and its records pending.

    An update can be killed at any moment: production still loads and verifies, and :meth:`run` resumes with a
    bit-identical result.

    Args:
        registry: Registry of the versions, or its folder or URL; it is created if it does not exist.
        source: Source of the records.
        model: Module that the first version starts from: a LightningModule with ``tokenizer``, ``hparams``,
            ``save_pretrained(folder)`` and ``from_pretrained(folder, lazy=False, **settings)``, such as
            :class:`~evertune.lightning_modules.SequenceClassificationModule`. Its ``task``, a
            :class:`~evertune.tasks.Task`, defines which labels are valid and how answers are scored. Its
            hyperparameters, such as the learning rate, apply to all updates.
        trainer: Trainer whose settings are used; its callbacks (Replay, EWC) are the methods. It is copied for each
            update.
        schema: What the records must look like. Default: :class:`~evertune.sources.RecordSchema` with its defaults.
        data: Settings of :class:`~evertune.streams.ExperienceDataModule`, such as ``batch_size``.
        masker: Removes personal data from every record before anything is stored; None masks nothing.
        label_join: Joins labels that arrive after their text; None expects text and label together.
        trigger: Decides when to update. Default: once there are 200 new records.
        gate: Decides whether a new version may replace the one in production. Default: :class:`~evertune.gate.Gate`
            with its defaults.
        settings: How records are held out and limited; see :class:`UpdateSettings`.
        student: How a smaller version follows each one that goes into production, in a registry of its own
            (:class:`~evertune.live.students.Students`). Default: None, none does.
        mirror: A second registry that receives each version. Its failures are logged and have no other effect.
        work_dir: Folder of the update in progress, on a disk of this machine (for several nodes, on one that all of
            them see). Default: inside a local registry; required for a remote one.
        config: The whole configuration, which is recorded with each version.

    Raises:
        TypeError: If the model lacks an attribute that updates need; the message names all that are missing.
        ValueError: If the registry is remote and there is no ``work_dir``, ``data`` sets an argument that the update
            sets itself, or students cannot follow: they have no registry of their own, the model cannot be distilled,
            or several processes run.

    Example::

        updater = Updater("registry", FolderSource("inbox"), SequenceClassificationModule("bert-base-uncased"),
                          ContinualTrainer(max_epochs=3, callbacks=[Replay(memory_size=2_000)]))
        outcome = updater.run()
        print(outcome.words)
    """

    def __init__(
        self,
        registry: str | Path | Registry,
        source: Source,
        model: Any,
        trainer: ContinualTrainer,
        *,
        schema: RecordSchema | None = None,
        data: Mapping[str, Any] | None = None,
        masker: Masker | None = None,
        label_join: LabelJoin | None = None,
        trigger: Trigger | None = None,
        gate: Gate | None = None,
        settings: UpdateSettings | None = None,
        student: StudentSettings | None = None,
        mirror: MLflowMirror | None = None,
        work_dir: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.registry = registry if isinstance(registry, Registry) else Registry(registry)
        self.source, self.model, self.trainer, self.mirror = source, model, trainer, mirror
        self.task = _task_for_updates(model)
        self.schema = (schema or RecordSchema()).for_task(self.task)
        self.data = _data_for_updates(data or {}, model)
        self.trigger = trigger or Volume()
        self.gate = gate or Gate()
        self.settings = settings or UpdateSettings()
        self.config = dict(config or {})
        self.journal = Journal(self.registry.store, self.registry.check_lease)
        intake = Intake(source, self.schema, self.journal, masker=masker, label_join=label_join)
        if work_dir is None and not self.registry.store.is_local:
            raise ValueError(
                f"the registry {self.registry.store.root} is not on this machine: pass work_dir, a local folder"
            )
        self._setup = Setup(
            registry=self.registry,
            journal=self.journal,
            staging=Path(work_dir) if work_dir is not None else self.registry.store.local("staging"),
            schema=self.schema,
            task=self.task,
            model=model,
            data=self.data,
            gate=self.gate,
            settings=self.settings,
            config=self.config,
        )
        if self.settings.imprint_after is not None and getattr(model, "head_kind", None) != "cosine":
            raise ValueError(
                f"imprint_after={self.settings.imprint_after} sets rows of a cosine head, which {type(model).__name__} "
                "does not have here: pass head='cosine' to a SequenceClassificationModule, or leave imprint_after out"
            )
        if self.settings.imprint_after is not None and getattr(model, "multi_label", False):
            raise ValueError(
                f"imprint_after={self.settings.imprint_after} names the class with the nearest mean; with multi_label, "
                "each class is asked by itself whether it applies, which no mean tells: leave imprint_after out"
            )
        self.students = None if student is None else self._students(student)
        _ = self._setup.base  # refused here, if it cannot be used, and not after hours of training
        self._backlog = Backlog(self.registry, self.journal, self._setup.staging, self._setup.config_digest)
        self._arrivals = Arrivals(self._setup, self._backlog, intake)
        self._planner = Planner(self._setup, self._backlog, self._arrivals, self.trigger)

    # --- pending work

    def intake(self) -> IntakeReport:
        """Take the records that have arrived from the source into the journal. Requires the registry's lease.

        It stops after twice ``max_records``; the next call takes in the rest. Records that go to quarantine are logged.

        Raises:
            SourceError: If the source cannot be read further.
        """
        return self._arrivals.take_in()

    def read_on_from(self, offset: Mapping[str, Any]) -> None:
        """Continue to read the source from another offset, after a :class:`SourceError` has reported lost records.

        Args:
            offset: The offset that the message of the error gives.
        """
        with self.registry.lease():
            self._arrivals.read_on_from(offset)

    def retry(self, references: Iterable[str] | None = None) -> tuple[list[str], dict[str, str]]:
        """Check records in quarantine again, under the schema as it is now.

        Those that are good are pending again, and no longer count as bad.

        Args:
            references: References of the records, as ``evertune quarantine list`` gives them; None for all but those
                that a newer record with the same id has superseded.

        Returns:
            The references of the records that are pending again, and the reasons of the others by reference.

        Raises:
            LeaseHeld: If another updater is at work on this registry.
            ValueError: If there is no such reference.
        """
        with self.registry.lease("evertune quarantine retry"):
            return self._arrivals.retry(references)

    def situation(self) -> Situation:
        """The pending records, as a trigger sees them."""
        return situation(self._setup, self._backlog)

    def due(self) -> str | None:
        """Why an update is due now, as a message; None if there is nothing to do."""
        self._setup.versions.begin()
        return self._planner.due() or (None if self.students is None else self.students.due())

    # --- the transaction

    def run(self, dry_run: bool = False) -> Outcome:
        """Make one update, or finish an interrupted one. With several processes, call it on all of them.

        If students follow (``student``), the student of the version in production is made afterwards, if it has none.

        Args:
            dry_run: Train and judge, but neither publish nor commit; the next call resumes from there.

        Raises:
            LeaseHeld: If another updater is at work on this registry.
            SourceError: If the source cannot be read; records taken in before are kept.
            RegistryError: If a file of the version in production is missing or was changed.
        """
        self._setup.versions.begin()
        if not is_leader():
            return self._follow()
        with self.registry.lease():
            erasure.finish(self.registry)
            self._backlog.withdraw_given_up()
            seconds: dict[str, float] = {}
            decision: PlannedUpdate | Outcome | None = None
            try:
                with timed(seconds, "plan"):
                    decision = self._planner.resumable() or self._planner.plan()
            finally:
                # In a finally clause: the other ranks wait for this message, and would hang if planning failed here.
                if started_together():
                    trains = isinstance(decision, PlannedUpdate) and self._planner.to_be_trained(decision.plan)
                    tell_all(b"train" if trains else b"")
            outcome = self._conclude(decision, seconds, dry_run)
            return outcome if dry_run else replace(outcome, student=self._catch_up())

    def distil(self, student: StudentSettings, dry_run: bool = False) -> Outcome:
        """Make a smaller version, which production teaches, and put it into production if the gate lets it pass.

        The student starts from some of production's layers, and learns production's logits and the labels of the
        records that production has learned, as far as the journal or the replay memory still has them. It is judged
        against production on everything that is held out. Of the trainer's callbacks, only a
        :class:`~evertune.callbacks.Replay` takes part; the state of the others starts again with the next update, which
        starts from the student. Interrupted, it resumes. A student that is refused is not published.

        With a ``registry`` of its own, the student is made there (:meth:`~evertune.live.students.Students.make`).

        Args:
            student: How small it is.
            dry_run: Train and judge only.

        Raises:
            LeaseHeld: If another updater is at work on this registry.
            RegistryError: If a file of the version in production is missing or was changed.
            ValueError: If nothing is in production, an update is not finished, the journal is empty, the model cannot
                be distilled or has no more layers, or several processes run.
        """
        from evertune.live.distilling import distil

        _refuse_several_processes()
        students = None if student.registry is None else self._students(student)
        if students is not None and dry_run:
            raise ValueError("dry_run is for a student that would take production's place: leave student.registry out")
        self._setup.versions.begin()
        with self.registry.lease("evertune distil"):
            erasure.finish(self.registry)
            self._backlog.withdraw_given_up()
            if students is not None:
                return students.make()
            return distil(self._setup, self.trainer, student, self.source, self.mirror, dry_run)

    def _students(self, student: StudentSettings) -> Students:
        """The students that follow, if they can."""
        from evertune.lightning_modules.students import check_teacher

        if student.registry is None:
            raise ValueError(
                "student.registry is not set: students that follow each update need a registry of their own. "
                "`evertune distil` makes one student that takes production's place"
            )
        _refuse_several_processes()
        check_teacher(self.model)
        return Students(self._setup, self.trainer, student)

    def _catch_up(self) -> Outcome | None:
        """Make the student of the version in production, if it has none yet and this process trains alone."""
        if self.students is None:
            return None
        if rank_and_world_size()[1] > 1:
            logger.info("a student is made by one process: the next call makes it")
            return None
        return self.students.catch_up()

    def _conclude(self, decision: PlannedUpdate | Outcome, seconds: dict[str, float], dry_run: bool) -> Outcome:
        """Carry out a plan, if there is one; without the records that fail in it, if it fails because of them."""
        set_aside = self._set_aside(decision)
        if isinstance(decision, Outcome):
            outcome = (self._imprint(seconds, dry_run) if decision.status == "nothing" else None) or decision
            return replace(outcome, words=f"{outcome.words}{set_aside}")
        try:
            outcome = self._carry_out(decision, seconds, dry_run)
        except Exception as error:
            # Other ranks cannot plan again here.
            if not self._planner.withdraw_cause(decision, error) or started_together():
                raise
            clear(self._setup.staging)
            return self._conclude(self._planner.plan(), seconds, dry_run)
        return replace(outcome, words=f"{outcome.words}{set_aside}")

    def _imprint(self, seconds: dict[str, float], dry_run: bool) -> Outcome | None:
        """Teach production the classes for which this is due, if there are any."""
        if self.settings.imprint_after is None:
            return None
        from evertune.live.imprinting import imprint

        return imprint(self._setup, self._backlog, self.source, self.mirror, seconds, dry_run)

    def _set_aside(self, decision: PlannedUpdate | Outcome) -> str:
        """What became of the records since the last update that are not learned, as the end of a message."""
        if isinstance(decision, PlannedUpdate):
            segments = self._setup.segments(decision.plan)
        else:
            segments = self._backlog.pending(self.registry.production)
        reasons = Reasons(self.journal.quarantined(segments))
        words = reasons.report(sum(segment.read for segment in segments), self.registry.store.root)
        return f". {words}" if words else ""

    def _follow(self) -> Outcome:
        """The part of the other ranks: they take part in training, if there is any."""
        update = None if started_together() and not tell_all(None) else self._planner.planned_before()
        if update is not None:
            self._train(update)
        return Outcome("trained", "this rank has trained along with the others")

    def _carry_out(self, update: PlannedUpdate, seconds: dict[str, float], dry_run: bool) -> Outcome:
        from evertune.live.judging import judge, parsed
        from evertune.live.no_training import UNTRAINED, words_of
        from evertune.live.publishing import finish, publish
        from evertune.live.staging import VERSION, results

        plan, setup = update.plan, self._setup
        logger.info("update %d: %s", plan.version, plan.reason, extra={"event": "training", "version": plan.version})
        if setup.is_published(plan):  # killed after publishing, before the aliases changed
            version = self.registry.version(plan.version)
            return finish(setup, plan, version, self.source, self.mirror, seconds)
        with timed(seconds, "train"):
            self._train(update)
        with timed(seconds, "evaluate"):
            verdict = judge(setup, update)
        if dry_run:
            status: Status = "promoted" if verdict.passed else "refused"
            words = f"dry run: version {plan.version} would be {status}: {reasons_of(verdict)}"
            spent = with_breakdown({**seconds, **results(setup.staging, plan)["seconds"]})
            path = setup.staging / VERSION / UNTRAINED
            untrained = parsed(path.read_bytes(), path, words_of) if path.is_file() else ""
            return Outcome(status, words, plan.version, verdict, spent, untrained)
        with timed(seconds, "publish"):
            version = publish(setup, update, verdict, seconds)
            return finish(setup, plan, version, self.source, self.mirror, seconds)

    def _train(self, update: PlannedUpdate) -> None:
        from evertune.live.staging import trained
        from evertune.live.training import train

        plan, setup, parent = update.plan, self._setup, update.records.parent
        if trained(setup.staging, plan):
            return
        train(
            plan,
            update.records.split.train,
            setup.staging,
            None if parent is None else setup.versions.folder(parent),
            self.model,
            self.trainer,
            self.schema,
            self.data,
            seed=self.settings.seed + plan.version,
            checkpoint_every_n_steps=self.settings.checkpoint_every_n_steps,
        )


def _refuse_several_processes() -> None:
    if started_together():
        raise ValueError("a student is trained by one process: start the command without a launcher, or leave it out")


def _task_for_updates(model: Any) -> Task:
    """The task of a module that can be updated.

    Raises:
        TypeError: If the module lacks an attribute that updates need; the message names all that are missing.
    """
    from evertune.tasks.base import task_of

    missing = [words for name, words in _NEEDED.items() if not _has(model, name)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} cannot be updated: it has no {'; no '.join(missing)}. "
            "See docs/live.md, Your own module"
        )
    return task_of(model)


def _has(model: Any, name: str) -> bool:
    """Whether a module has an attribute. Properties are not evaluated, as that of a tokenizer may load files."""
    return name in vars(model) or hasattr(type(model), name)


def _data_for_updates(data: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The settings of the data of an update, which truncate texts to what the model takes.

    Raises:
        ValueError: If they set an argument that an update sets itself.
    """
    if given := sorted(data.keys() & DATA_OF_UPDATES):
        raise ValueError(
            f"data must not set {', '.join(given)}: an update takes them from its schema, its settings and the module"
        )
    limit, length = getattr(model, "max_tokens", None), data.get("max_length")
    if limit is None or length is None or length <= limit:
        return dict(data)
    logger.warning(
        "data.max_length is %d, but the model takes at most %d tokens: texts are truncated to %d", length, limit, limit
    )
    return {**data, "max_length": limit}
