"""An update as a transaction: take in new records, decide, train, evaluate, judge, publish, commit."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from evertune.gate.comparison import FEW
from evertune.gate.gate import Gate
from evertune.gate.verdict import Check, Verdict
from evertune.live import erasure
from evertune.live.backlog import Backlog
from evertune.live.intake import Intake, IntakeReport
from evertune.live.plan import Plan
from evertune.live.slices import draw, hold_out, load_slice, save_slice, sent_again, thin
from evertune.live.triggers import Situation, Trigger, Volume
from evertune.registry.journal import Journal, Segment, latest
from evertune.registry.manifest import Manifest, Metrics, VerdictSummary
from evertune.registry.reasons import Reasons
from evertune.registry.registry import Registry, RegistryError, Version
from evertune.sources.alike import alike, alike_words
from evertune.sources.base import Row, Source, SourceError
from evertune.sources.labels import LabelJoin
from evertune.sources.masking import Masker
from evertune.sources.schema import RecordSchema
from evertune.utils.clock import PARTS
from evertune.utils.files import empty, write_atomically
from evertune.utils.ranks import is_leader, started_together, tell_all
from evertune.utils.typed_json import decode, foreign, to_json

if TYPE_CHECKING:
    from evertune.gate.best import Best
    from evertune.gate.predictions import Predictions
    from evertune.registry.mlflow import MLflowMirror
    from evertune.tasks.base import Task
    from evertune.training.trainer import ContinualTrainer

T = TypeVar("T")

logger = logging.getLogger("evertune.live")

Status = Literal["promoted", "nothing", "refused", "stopped", "trained"]
EXIT_CODES: Mapping[Status, int] = {"promoted": 0, "nothing": 3, "refused": 4, "stopped": 5, "trained": 0}
"""The exit codes of ``evertune update``; "trained" is the status of the ranks that only take part in training."""

DATA_OF_UPDATES = frozenset({"experience", "tokenizer", "text", "label", "collate_fn", "id_column", "seed", "task"})
"""The arguments of :class:`~evertune.streams.ExperienceDataModule` that an update sets itself; a user sets the rest."""

_EVALUATION = "evaluation.json"
_VERDICT = "verdict.json"
_SHOWN = "trained on"
_TO_BE_PAID = ("train", "evaluate")
"""The stages of an update whose seconds count as its cost."""
_STAGES = ("plan", "train", "evaluate")
"""The stages whose seconds a version records."""
_NEEDED = {
    "tokenizer": "tokenizer (a tokenizer of transformers)",
    "hparams": "hparams (call save_hyperparameters() in its constructor)",
    "save_pretrained": "save_pretrained(folder), which writes the weights and whatever rebuilds the module",
    "from_pretrained": "from_pretrained(folder, lazy=False, **settings), a class method that reads them back",
}
"""The attributes that a module needs to be updated, with the words by which an error message names them."""
_ENOUGH = 500
"""Number of records in which wrong labels are looked for: the held-out ones, and as many trained-on ones as needed."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of an update.

    Args:
        status: ``"promoted"``; ``"nothing"`` to do; ``"refused"`` by the gate after training; or ``"stopped"`` by the
            checks of the data before training.
        words: The reason, as a message for people.
        version: Number of the version that was made, whether promoted or refused; None if none was.
        verdict: Verdict of the gate with every check; None if nothing was judged.
        seconds: Seconds that each stage took, by its name; and the same time by what it was spent on, see
            :attr:`~evertune.registry.Manifest.seconds`.
    """

    status: Status
    words: str
    version: int | None = None
    verdict: Verdict | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """The exit code of ``evertune update``: 0 promoted, 3 nothing to do, 4 refused, 5 stopped before training."""
        return EXIT_CODES[self.status]


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """How an update treats its records.

    Args:
        holdout: Share of the new records that is held out of training, to judge this and every later version. Default:
            0.2.
        max_holdout: Maximum number of records held out of one update. Default: 500.
        max_records: Maximum number of records in one update; the rest wait for the next. Default: 50,000.
        max_evaluation: Maximum number of records of all slices on which a version is judged; the longest slices are
            shortened first. Default: 5,000.
        rebuild_after: Number of refusals in a row after which a new model is trained from the pretrained one, on the
            replay memory and the pending records. Default: 3; None never rebuilds.
        checkpoint_every_n_steps: Optimizer steps between two checkpoints: the most that a crash loses. Default: 200.
        seed: Seed of everything random; the number of the version is added to it.

    Raises:
        ValueError: If a number is out of range.
    """

    holdout: float = 0.2
    max_holdout: int = 500
    max_records: int = 50_000
    max_evaluation: int = 5_000
    rebuild_after: int | None = 3
    checkpoint_every_n_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}")
        for name in ("max_holdout", "max_records", "max_evaluation", "checkpoint_every_n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rebuild_after is not None and self.rebuild_after < 1:
            raise ValueError(f"rebuild_after must be positive or None, got {self.rebuild_after}")


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
        mirror: A second registry that receives each version. Its failures are logged and have no other effect.
        work_dir: Folder of the update in progress, on a disk of this machine (for several nodes, on one that all of
            them see). Default: inside a local registry; required for a remote one.
        config: The whole configuration, which is recorded with each version.

    Raises:
        TypeError: If the model lacks an attribute that updates need; the message names all that are missing.
        ValueError: If the registry is remote and there is no ``work_dir``, or ``data`` sets an argument that the update
            sets itself.

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
        mirror: MLflowMirror | None = None,
        work_dir: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.registry = registry if isinstance(registry, Registry) else Registry(registry)
        self.source = source
        self.model = model
        self.trainer = trainer
        self.task = _task_for_updates(model)
        self.schema = (schema or RecordSchema()).for_labels(self.task.check_label, self.task.label_names)
        self.data = dict(data or {})
        if given := sorted(self.data.keys() & DATA_OF_UPDATES):
            raise ValueError(
                f"data must not set {', '.join(given)}: an update takes them from its schema, its settings and the "
                "module"
            )
        limit, length = getattr(model, "max_tokens", None), self.data.get("max_length")
        if limit is not None and length is not None and length > limit:
            logger.warning(
                "data.max_length is %d, but the model takes at most %d tokens: texts are truncated to %d",
                length,
                limit,
                limit,
            )
            self.data["max_length"] = limit
        self.trigger = trigger or Volume()
        self.gate = gate or Gate()
        self.settings = settings or UpdateSettings()
        self.mirror = mirror
        self.config = dict(config or {})
        self.journal = Journal(self.registry.store, self.registry.check_lease)
        self._intake = Intake(source, self.schema, self.journal, masker=masker, label_join=label_join)
        if self.schema.label is None:
            raise ValueError("an update is judged by labels: the schema needs the field that holds them")
        self._label: str = self.schema.label
        if work_dir is None and not self.registry.store.is_local:
            raise ValueError(
                f"the registry {self.registry.store.root} is not on this machine: pass work_dir, a local folder"
            )
        self.staging = Path(work_dir) if work_dir is not None else self.registry.store.local("staging")
        self._backlog = Backlog(self.registry, self.journal, self.staging, self._config_digest())
        self._verified: dict[int, Path] = {}

    # --- pending work

    def intake(self) -> IntakeReport:
        """Take the records that have arrived from the source into the journal. Requires the registry's lease.

        It stops after twice ``max_records``; the next call takes in the rest. Records that go to quarantine are logged.

        Raises:
            SourceError: If the source cannot be read further.
        """
        production = self.registry.production
        self._backlog.quarantine_given_up(production)
        self._withdraw(self._backlog.refused_twice(production))
        self._check_pending_again(production)
        report = self._intake.run(
            limit=2 * self.settings.max_records, start=production.manifest.offset if production else None
        )
        if report.words:
            facts = {"event": "set_aside", "read": report.read, "bad": report.bad}
            logger.log(logging.WARNING if report.bad else logging.INFO, "%s", report.words, extra=facts)
        self._warn_of_alike(report.labels, production)
        return report

    def _warn_of_alike(self, labels: Sequence[str], production: Version | None) -> None:
        """Warn of new classes that look like another one, if labels of this intake are among them."""
        known = production.manifest.classes if production else []
        if set(labels) <= set(known):
            return
        pending = self.journal.records(self._backlog.pending(production))
        names = [name for row in pending for name in self.task.label_names(row["record"].get(self._label))]
        groups = [g for g in alike([*known, *names]) if not set(g) <= set(known) and set(g) & set(labels)]
        if groups:
            logger.warning("%s", alike_words(groups), extra={"event": "alike"})

    def read_on_from(self, offset: Mapping[str, Any]) -> None:
        """Continue to read the source from another offset, after a :class:`SourceError` has reported lost records.

        Args:
            offset: The offset that the message of the error gives.
        """
        with self.registry.lease():
            last = self.journal.last
            waiting = self.journal.waiting()
            self.journal.append([], [], waiting, dict(offset), clock=last.clock if last is not None else None)

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
            found = self.journal.references()
            if references is None:
                chosen = [reference for reference, row in found.items() if row["kind"] != "superseded"]
            else:
                chosen = list(references)
                if missing := [reference for reference in chosen if reference not in found]:
                    raise ValueError(f"there is no {missing[0]} in quarantine")
            return self._intake.retry({reference: found[reference] for reference in chosen})

    def situation(self) -> Situation:
        """The pending records, as a trigger sees them."""
        production = self.registry.production
        segments = self._backlog.pending(production)
        attempted = self._backlog.attempted(production)
        return Situation(
            records=lambda: self._rows(segments),
            n_pending=self.journal.counts(segments).pending,
            n_new=self.journal.counts(segment for segment in segments if segment.number > attempted).pending,
            production=production,
            memory_texts=lambda: self._known_texts(production),
            last_update=self._backlog.last_attempt(),
            now=datetime.now(UTC),
            text=self.schema.text,
            label=self._label,
            memory_labels=lambda: [row["record"][self._label] for row in self._held_out(production)],
            waiting=self._waiting,
            held_out=lambda: self._evaluation(production),
            predict=None if production is None else lambda rows: self._predictions(production, rows),
            updates=lambda: [
                (version.created, sum(version.manifest.seconds.get(part, 0.0) for part in _TO_BE_PAID))
                for version in self.registry.versions()
            ],
            label_names=self.task.label_names,
        )

    def due(self) -> str | None:
        """Why an update is due now, as a message; None if there is nothing to do."""
        self._verified.clear()
        plan = self._interrupted()
        if plan is not None:
            return f"update {plan.version} was interrupted"
        situation = self.situation()
        return self.trigger.reason(situation) if situation.n_new else None

    # --- the transaction

    def run(self, dry_run: bool = False) -> Outcome:
        """Make one update, or finish an interrupted one. With several processes, call it on all of them.

        Args:
            dry_run: Train and judge, but neither publish nor commit; the next call resumes from there.

        Raises:
            LeaseHeld: If another updater is at work on this registry.
            SourceError: If the source cannot be read; records taken in before are kept.
            RegistryError: If a file of the version in production is missing or was changed.
        """
        self._verified.clear()
        if not is_leader():
            return self._follow()
        with self.registry.lease():
            erasure.finish(self.registry.store)
            seconds: dict[str, float] = {}
            decision: Plan | Outcome | None = None
            try:
                with _timed(seconds, "plan"):
                    decision = self._resumable() or self._plan()
            finally:
                # In a finally clause: the other ranks wait for this message, and would hang if planning failed here.
                if started_together():
                    tell_all(b"train" if isinstance(decision, Plan) and self._to_be_trained(decision) else b"")
            return self._conclude(decision, seconds, dry_run)

    def _conclude(self, decision: Plan | Outcome, seconds: dict[str, float], dry_run: bool) -> Outcome:
        """Carry out a plan, if there is one; without the records that fail in it, if it fails because of them."""
        set_aside = self._set_aside(decision)
        if isinstance(decision, Outcome):
            return replace(decision, words=f"{decision.words}{set_aside}")
        try:
            outcome = self._carry_out(decision, seconds, dry_run)
        except Exception as error:
            if not self._withdraw_cause(decision, error) or started_together():  # other ranks cannot plan again here
                raise
            self._clear_staging()
            return self._conclude(self._plan(), seconds, dry_run)
        return replace(outcome, words=f"{outcome.words}{set_aside}")

    def _set_aside(self, decision: Plan | Outcome) -> str:
        """What became of the records since the last update that are not learned, as the end of a message."""
        if isinstance(decision, Plan):
            segments = self._segments(decision)
        else:
            segments = self._backlog.pending(self.registry.production)
        reasons = Reasons(self.journal.quarantined(segments))
        words = reasons.report(sum(segment.read for segment in segments), self.registry.store.root)
        return f". {words}" if words else ""

    def _follow(self) -> Outcome:
        """The part of the other ranks: they take part in training, if there is any."""
        plan = None if started_together() and not tell_all(None) else Plan.load(self.staging)
        if plan is not None:
            self._train(plan)
        return Outcome("trained", "this rank has trained along with the others")

    def _to_be_trained(self, plan: Plan) -> bool:
        from evertune.live.training import trained

        return not self._is_published(plan) and trained(self.staging, plan) is None

    def _is_published(self, plan: Plan) -> bool:
        return plan.version < self.registry.next_number()

    def _carry_out(self, plan: Plan, seconds: dict[str, float], dry_run: bool) -> Outcome:
        logger.info("update %d: %s", plan.version, plan.reason, extra={"event": "training", "version": plan.version})
        if self._is_published(plan):  # killed after publishing, before the aliases changed
            return self._finish(plan, self.registry.version(plan.version), seconds)
        with _timed(seconds, "train"):
            self._train(plan)
        with _timed(seconds, "evaluate"):
            verdict = self._judge(plan)
        if dry_run:
            status: Status = "promoted" if verdict.passed else "refused"
            words = f"dry run: version {plan.version} would be {status}: {_reasons(verdict)}"
            return Outcome(
                status, words, plan.version, verdict, _with_breakdown({**seconds, **self._trained(plan)["seconds"]})
            )
        with _timed(seconds, "publish"):
            version = self._publish(plan, verdict, seconds)
            return self._finish(plan, version, seconds)

    def _train(self, plan: Plan) -> None:
        from evertune.live.training import train, trained

        if trained(self.staging, plan):
            return
        train(
            plan,
            self._split(plan).train,
            self.staging,
            None if plan.parent is None else self._folder(self.registry.version(plan.parent)),
            self.model,
            self.trainer,
            self.schema,
            self.data,
            seed=self.settings.seed + plan.version,
            checkpoint_every_n_steps=self.settings.checkpoint_every_n_steps,
        )

    def _trained(self, plan: Plan) -> dict[str, Any]:
        from evertune.live.training import trained

        results = trained(self.staging, plan)
        assert results is not None
        return results

    def _judge(self, plan: Plan) -> Verdict:
        """Evaluate the new version and the one in production side by side, and let the gate compare them."""
        from evertune.gate.best import Best, still_best
        from evertune.live.evaluation import evaluate, measure
        from evertune.live.training import MODEL, VERSION

        folder = self.staging / VERSION
        if (folder / _VERDICT).is_file():
            return _parsed((folder / _VERDICT).read_bytes(), folder / _VERDICT, Verdict.from_dict)
        rows, held_out, *_ = self._split(plan)
        production = self.registry.version(plan.parent) if plan.parent is not None else None
        new = plan.experience
        slices = self._slices(plan) | {new: held_out}
        # ``thin`` and ``draw`` depend on the ids alone, so that a resumed update is judged on the same records.
        slices = thin(slices, self.settings.max_evaluation)
        shown = {_SHOWN: sorted(rows, key=draw)[: max(_ENOUGH - len(slices[new]), 0)]}
        settings = self._reading
        challenger = self._opened(folder / MODEL)
        said = evaluate(challenger, slices, **settings)
        champion: dict[str, Predictions] | None = None
        costs, shown_to_both, remembered = None, {}, None
        best: dict[str, Best] = {}
        if production is not None:
            module = self._opened(self._folder(production) / MODEL)
            # The champion's answers were stored when it was judged itself: only slices that it has not seen are
            # predicted.
            stored, best = self._stored(production)
            champion = {name: stored[name] for name in slices if name in stored}
            unseen = {name: chosen for name, chosen in slices.items() if name not in stored}
            champion |= evaluate(module, unseen | shown, **settings)
            shown_to_both = evaluate(challenger, shown, **settings)
            remembered = self._on_memory(production, module, challenger, [*said.values()])
            texts = [self._text(row) for row in (held_out or rows)[:8]]
            costs = measure(module, challenger, texts, max_length=settings["max_length"])
        verdict = self.gate.judge(
            champion,
            said | shown_to_both,
            new,
            costs,
            data_checks=self._check_data(plan),
            trained=_SHOWN if shown_to_both else None,
            groups=self.gate.groups(row for chosen in slices.values() for row in chosen),
            best=best,
            remembered=remembered,
            untrained=self._without_training(champion, slices, new, rows),
        )
        evaluation = {"slices": {name: said[name].to_dict() for name in sorted(said)}}
        if champion is not None and plan.parent is not None:
            before = {name: Best(plan.parent, champion[name]) for name in champion if name not in (new, _SHOWN)}
            standing = still_best(before | self.gate.standing(best), said, self.gate.alpha)
            # Kept with the new version, as the version that made them may be deleted.
            evaluation["best"] = {name: standing[name].to_dict() for name in sorted(standing) if name in slices}
        # The verdict is written last: a resumed update takes it as proof that the evaluation is complete.
        write_atomically(folder / _EVALUATION, _json(evaluation))
        write_atomically(folder / _VERDICT, _json(to_json(verdict.to_dict())))
        return verdict

    def _opened(self, folder: Path) -> Any:
        """The module in a folder, on the GPU if there is one."""
        return self._placed(type(self.model).from_pretrained(folder))

    def _placed(self, module: Any) -> Any:
        import torch

        if hasattr(module, "configure_model"):
            module.configure_model()
        return module.cuda() if torch.cuda.is_available() else module

    def _publish(self, plan: Plan, verdict: Verdict, seconds: Mapping[str, float]) -> Version:
        """Publish the staged folder as a version of the registry, with its complete manifest."""
        from evertune.gate.predictions import Predictions
        from evertune.live.training import VERSION

        folder = self.staging / VERSION
        rows, held_out, put_aside, n_again = self._split(plan)
        production = self.registry.version(plan.parent) if plan.parent is not None else None
        slices = list(production.manifest.slices) if production else []
        if held_out:
            # Written before the manifest that names it; if the process dies in between, the same file is written again.
            slices.append(save_slice(self.registry.store, plan.experience, held_out))
        if put_aside and verdict.passed:
            self.journal.quarantine("put aside", put_aside, f"superseded-{plan.version}")
        said = _parsed((folder / _EVALUATION).read_bytes(), folder / _EVALUATION, Predictions.by_slice)
        accuracy = {name: one.accuracy for name, one in said.items()}
        training = self._trained(plan)
        segments = self._segments(plan)
        manifest = Manifest(
            version=plan.version,
            parent=plan.parent,
            created=datetime.fromisoformat(plan.created),
            kind=plan.kind,
            experience=plan.experience,
            reason=plan.reason,
            consumed=plan.consumed,
            offset=plan.offset,
            module=type(self.model).__name__,
            classes=training["classes"],
            records={
                "train": len(rows),
                "held_out": len(held_out),
                "quarantined": sum(segment.quarantined for segment in segments) + len(put_aside),
                **({"sent_again": n_again} if n_again else {}),
            },
            slices=slices,
            verdict=VerdictSummary(verdict.passed, _reasons(verdict)),
            metrics=Metrics(dict(accuracy), sum(accuracy.values()) / len(accuracy) if accuracy else None),
            seconds=_with_breakdown({**seconds, **training["seconds"]}),
            config=self.config,
            config_digest=plan.config,
            code=f"evertune {metadata.version('evertune')}",
        )
        return self.registry.publish(folder, manifest)

    def _finish(self, plan: Plan, version: Version, seconds: Mapping[str, float]) -> Outcome:
        """Change the aliases, which commits the records; notify the source; clear the staging folder. Idempotent."""
        verdict = _parsed(version.read(_VERDICT), f"{_VERDICT} of version {version.number}", Verdict.from_dict)
        production = self.registry.production
        if not verdict.passed:
            self.registry.set_refused(version.number)
        elif production is None or production.number != version.number:
            # ``expected`` protects the decision of somebody who has promoted or rolled back meanwhile.
            self.registry.promote(version.number, reason=plan.reason, expected=plan.parent)
        if verdict.passed and plan.offset is not None:
            try:
                self.source.commit(plan.offset)
            except SourceError as error:
                logger.warning("the source was not notified of version %d: %s", version.number, error)
        if self.mirror is not None:
            try:
                self.mirror.mirror(version, production=verdict.passed)
            except Exception as error:
                logger.warning("version %d is not mirrored: %s", version.number, error)
        self._clear_staging()
        status: Status = "promoted" if verdict.passed else "refused"
        words = f"version {version.number} is {'in production' if verdict.passed else 'refused'}: {_reasons(verdict)}"
        if n_again := version.manifest.records.get("sent_again"):
            words += f"; {n_again} records that were held out before were sent again, and stay held out"
        return Outcome(status, words, version.number, verdict, {**version.manifest.seconds, **seconds})

    # --- planning and its inputs

    def _plan(self) -> Plan | Outcome:
        arrived = self.intake().read
        logger.info(
            "%s", f"{arrived:,} record{'s' * (arrived != 1)} arrived", extra={"event": "intake", "read": arrived}
        )
        production = self.registry.production
        situation = self.situation()
        reason = self.trigger.reason(situation) if situation.n_new else None
        if reason is None:
            return self._too_many_bad(production) or Outcome(
                "nothing",
                f"{situation.n_pending} records are pending: {self.trigger.explanation}"
                if situation.n_new
                else situation.nothing_new,
            )
        segments = self._backlog.pending(production, at_most=self.settings.max_records)
        self._withdraw_unlearnable(segments)
        plan = Plan(
            version=self.registry.next_number(),
            parent=production.number if production else None,
            kind=self._kind(production),
            after=segments[0].number - 1,
            consumed=segments[-1].number,
            offset=segments[-1].offset,
            reason=reason,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            config=self._config_digest(),
            records=self.journal.counts(segments).pending,
        )
        self._clear_staging()
        verdict = Verdict.of(self._check_data(plan))
        if not verdict.passed:
            self._backlog.stop(plan.parent, plan.consumed, plan.created)
            return Outcome("stopped", f"stopped before training: {_reasons(verdict)}", verdict=verdict)
        split = self._split(plan)
        if not split.train:
            self._backlog.stop(plan.parent, plan.consumed, plan.created)
            return Outcome(
                "nothing", f"{split.n_again} records are pending: all were held out before, and stay held out"
            )
        plan.save(self.staging)
        return plan

    def _too_many_bad(self, production: Version | None) -> Outcome | None:
        """Stop, although no update is due, if too many records were bad since the last update. Said once."""
        segments = self._backlog.pending(production)
        if not segments or segments[-1].number <= self._backlog.reported(production):
            return None
        counts = self.journal.counts(segments)
        checks = self.gate.judge_data([], n_bad=counts.bad, n_read=counts.read)
        verdict = Verdict.of(check for check in checks if check.name == "bad records")
        if verdict.passed:
            return None
        parent, now = production.number if production else None, datetime.now(UTC).isoformat(timespec="seconds")
        self._backlog.stop(parent, segments[-1].number, now, tried=False)
        return Outcome("stopped", f"stopped, and no update is due: {_reasons(verdict)}", verdict=verdict)

    def _interrupted(self) -> Plan | None:
        """The plan of an unfinished update, if it is still valid."""
        plan = Plan.load(self.staging)
        if plan is None:
            return None
        production = self.registry.production
        # Once promoted, a plan is done, even if production is the parent again after a rollback.
        flipped = any(event["action"] == "promote" and event["to"] == plan.version for event in self.registry.events)
        parent_stands = (production.number if production else None) == plan.parent
        same = plan.config == self._config_digest() and self._is_whole(plan)
        if not flipped and parent_stands and same:
            return plan
        logger.info("update %d is dropped: it had other settings, records or another parent", plan.version)
        self._clear_staging()
        return None

    def _is_whole(self, plan: Plan) -> bool:
        """Whether no record of an update was withdrawn since it was planned; once published, that does not matter."""
        if plan.records is None or self._is_published(plan):
            return True
        return self.journal.counts(self._segments(plan)).pending == plan.records

    def _resumable(self) -> Plan | None:
        """The plan of an unfinished update, unless a record in it would end it again."""
        self._check_pending_again(self.registry.production)
        plan = self._interrupted()
        if plan is None or not self._to_be_trained(plan) or not self._withdraw_unlearnable(self._segments(plan)):
            return plan
        self._clear_staging()
        return None

    def _withdraw_unlearnable(self, segments: Sequence[Segment]) -> bool:
        """Move the records that would end the training into quarantine; returns whether there are any."""
        from evertune.live.learnable import unlearnable

        rows, _ = latest(self.journal.records(segments, numbered=True))
        found = unlearnable(rows, self.task, self.model, self.schema, self.data.get("max_length"))
        self._withdraw(found)
        return bool(found)

    def _withdraw_cause(self, plan: Plan, error: Exception) -> bool:
        """After an error in an update, move the records that fail alone into quarantine; false if there are none."""
        import torch

        from evertune.live.learnable import unlearnable
        from evertune.live.training import Interrupted, untrained
        from evertune.utils.evaluation import evaluation_mode

        not_of_a_record = (Interrupted, OSError, RegistryError, SourceError, MemoryError, torch.OutOfMemoryError)
        if self._is_published(plan) or isinstance(error, not_of_a_record):
            return False
        rows, _ = latest(self.journal.records(self._segments(plan), numbered=True))
        try:
            parent = None if plan.parent is None else self._folder(self.registry.version(plan.parent))
            module = untrained(plan, rows, parent, self.model, self.schema, self.data)
            with evaluation_mode(module):
                found = unlearnable(rows, self.task, module, self.schema, self.data.get("max_length"), score=True)
        except Exception as trouble:  # the first error is what has to be reported
            logger.info("no record was found to be the cause: %s", trouble)
            return False
        self._withdraw(found)
        return bool(found)

    def _check_pending_again(self, production: Version | None) -> None:
        """If the schema or the task has changed, move the pending records that no longer fit into quarantine."""
        accepts = [self.schema.digest, type(self.task).__qualname__, {k: repr(v) for k, v in vars(self.task).items()}]
        digest = hashlib.sha256(_json(accepts)).hexdigest()[:16]
        if self.journal.schema == digest:
            return
        bad = []
        for row in self.journal.records(self._backlog.pending(production), numbered=True):
            try:
                self.schema.check_again(row["record"])
            except ValueError as error:
                bad.append({**row, "kind": "refused", "reason": f"{error} (checked again under another schema)"})
        self._withdraw(bad)
        self.journal.schema = digest

    def _withdraw(self, rows: Sequence[Row]) -> None:
        self.journal.withdraw(rows)
        if rows:
            words = f"{len(rows)} pending records went to quarantine: {Reasons(rows).words()}"
            logger.warning("%s", words, extra={"event": "set_aside", "withdrawn": len(rows)})

    def _kind(self, production: Version | None) -> Literal["first", "update", "rebuild"]:
        if production is None:
            return "first"
        from evertune.live.training import remembered

        refusals, limit = self._backlog.refusals(production), self.settings.rebuild_after
        if limit is None or refusals < limit:
            return "update"
        if remembered(self._folder(production)) is None:
            logger.warning("no rebuild after %d refusals: production has no replay memory", refusals)
            return "update"
        return "rebuild"

    def _segments(self, plan: Plan) -> list[Segment]:
        return [s for s in self.journal.segments(after=plan.after) if s.number <= plan.consumed]

    def _rows(self, segments: Sequence[Segment]) -> list[Row]:
        return self.journal.records(segments)

    def _split(self, plan: Plan) -> _Split:
        """Decide what each record of an update is for, in the same way in every attempt.

        A record that was held out of an earlier update stays held out when it is sent again, changed or not: production
        is judged on it.
        """
        rows, put_aside = latest(self._rows(self._segments(plan)))
        rows, changed, same = sent_again(rows, self._slices(plan), self.schema.id)
        train, held_out = hold_out(
            rows, self._label, self.settings.holdout, self.settings.max_holdout, self._classes_of
        )
        return _Split(train, held_out + changed, put_aside + same, len(changed) + len(same))

    def _slices(self, plan: Plan) -> dict[str, list[Row]]:
        """The records held out of all updates before this one, by the name of their slice."""
        production = self.registry.version(plan.parent) if plan.parent is not None else None
        entries = production.manifest.slices if production else []
        return {entry.name: load_slice(self.registry.store, entry) for entry in entries}

    def _classes_of(self, label: Any) -> Any:
        """The classes by which a label is held out: the label itself, or none for a task without classes."""
        return label if isinstance(label, str | list) else self.task.label_names(label)

    def _check_data(self, plan: Plan) -> list[Check]:
        segments = self._segments(plan)
        rows, _ = latest(self._rows(segments))
        counts = self.journal.counts(segments)
        production = self.registry.version(plan.parent) if plan.parent is not None else None
        return self.gate.judge_data(
            rows,
            text=self.schema.text,
            label=self._label,
            known_classes=production.manifest.classes if production else [],
            n_bad=counts.bad,
            n_read=counts.read,
            names=self.task.label_names,
        )

    def _held_out(self, production: Version | None) -> list[Row]:
        """The held-out records of every experience that production has learned."""
        entries = production.manifest.slices if production else []
        return [row for entry in entries for row in load_slice(self.registry.store, entry)]

    def _known_texts(self, production: Version | None) -> list[str]:
        texts = (self._text(row) for row in self._held_out(production))
        return [text if isinstance(text, str) else " ".join(text) for text in texts]

    def _evaluation(self, production: Version | None) -> dict[str, Predictions]:
        """The predictions of a version on the records held out of each update, from when the gate judged it."""
        return {} if production is None else self._stored(production)[0]

    def _stored(self, version: Version) -> tuple[dict[str, Predictions], dict[str, Best]]:
        """The predictions of a version by slice, and those of earlier versions where they were better."""
        from evertune.gate.best import Best
        from evertune.gate.predictions import Predictions

        def parse(stored: Any) -> tuple[dict[str, Predictions], dict[str, Best]]:
            best = {name: Best.from_dict(values) for name, values in stored.get("best", {}).items()}
            return Predictions.by_slice(stored), best

        return _parsed(version.read(_EVALUATION), f"{_EVALUATION} of version {version.number}", parse)

    def _without_training(
        self, champion: Mapping[str, Predictions] | None, slices: Mapping[str, list[Row]], new: str, rows: list[Row]
    ) -> dict[str, Predictions] | None:
        """The answers of the pretrained encoder without training, where the gate needs a second opinion: on a first
        version, and on classes that production has not learned."""
        from evertune.gate.label_noise import learned_classes
        from evertune.live.evaluation import without_training
        from evertune.live.training import starting_module

        if not callable(getattr(self.model, "features", None)):
            return None
        if champion is not None:
            past = [said for name, said in champion.items() if name not in (new, _SHOWN)]
            known, labels = learned_classes(champion.values(), past), (row["record"][self._label] for row in rows)
            if all(known.issuperset(self.task.label_names(label)) for label in labels):
                return None
        some = thin({name: chosen for name, chosen in slices.items() if name != new}, _ENOUGH)
        shown = sorted(rows, key=draw)[: max(_ENOUGH - len(slices[new]), 0)]
        module = starting_module(self.model, None)
        if not getattr(module, "classes", True) and hasattr(module, "add_classes"):
            module.add_classes(["any"])  # a head has to have a row; the features do not depend on it
        return without_training(self._placed(module), some | {new: slices[new], _SHOWN: shown}, **self._reading)

    def _on_memory(
        self, production: Version, champion: Any, challenger: Any, said: Sequence[Predictions]
    ) -> tuple[Predictions, Predictions] | None:
        """The predictions of both versions on remembered records of the classes of which few are held out."""
        from evertune.live.evaluation import evaluate_examples
        from evertune.live.training import remembered

        memory = remembered(self._folder(production))
        if memory is None or not all(one.has_classes for one in said):
            return None
        held_out = Counter(name for one in said for label in one.labels for name in self.task.label_names(label))
        missing = {name: FEW - held_out[name] for name in production.manifest.classes}
        slots = []
        for slot, name in enumerate(memory.labels):
            if name is not None and missing.get(name, 0) > 0:
                missing[name] -= 1
                slots.append(slot)
        if not slots:
            return None
        labels = [str(memory.labels[slot]) for slot in slots]
        examples = [memory[slot] for slot in slots]
        return evaluate_examples(champion, examples, labels), evaluate_examples(challenger, examples, labels)

    def _waiting(self) -> list[Row]:
        """The texts that are waiting for their labels."""
        halves = (half for half in self.journal.waiting() if half["has_text"])
        return [{"id": half["id"], "origin": half["origin"], "record": half["value"]} for half in halves]

    def _predictions(self, production: Version, rows: Sequence[Row]) -> Predictions:
        """The predictions of a version on records that may lack a label; the model is released afterwards."""
        import torch

        from evertune.live.evaluation import evaluate
        from evertune.live.training import MODEL

        numbered = [{"id": str(place), "record": {self._label: "", **row["record"]}} for place, row in enumerate(rows)]
        module = self._opened(self._folder(production) / MODEL)
        said = evaluate(module, {"": numbered}, **self._reading)[""]
        del module
        if torch.cuda.is_available():  # a watching process must not hold GPU memory that the update needs
            torch.cuda.empty_cache()
        return said

    @property
    def _reading(self) -> dict[str, Any]:
        """The settings by which a module reads records."""
        from evertune.tasks.texts import truncation_length

        length = truncation_length(self.data.get("max_length"), self.model.tokenizer, self.model)
        return {"text": self.schema.text, "label": self._label, "max_length": length}

    def _text(self, row: Row) -> Any:
        field = self.schema.text
        return row["record"][field] if isinstance(field, str) else [row["record"][one] for one in field]

    def _folder(self, version: Version) -> Path:
        """The files of a version, verified once in an update: its weights, memory and learning state are read here."""
        if version.number not in self._verified:
            self._verified[version.number] = version.verified_folder()
        return self._verified[version.number]

    def _config_digest(self) -> str:
        return hashlib.sha256(_json(self.config)).hexdigest()[:16]

    def _clear_staging(self) -> None:
        (self.staging / "plan.json").unlink(missing_ok=True)  # first, so that leftovers of a crash belong to no update
        empty(self.staging)


class _Split(NamedTuple):
    """The records of an update to train on, those held out, and those put aside with their ``reason``: a newer one has
    superseded them, or they are held out already. ``n_again`` had been held out before."""

    train: list[Row]
    held_out: list[Row]
    put_aside: list[Row]
    n_again: int


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


def _reasons(verdict: Verdict) -> str:
    """The message of a verdict without the decision itself."""
    return verdict.words().partition(": ")[2]


def _parsed(content: bytes, name: str | Path, parse: Callable[[Any], T]) -> T:
    """A file of a version, parsed by a function that has not seen who wrote it."""
    with foreign(name):
        return parse(decode(content))


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()


def _with_breakdown(seconds: Mapping[str, float]) -> dict[str, float]:
    """The seconds of an update's stages, and the same time by what it was spent on.

    Args:
        seconds: The seconds of each stage, and those of the fit by what they were spent on.
    """
    spent = {part: seconds.get(part, 0.0) for part in PARTS}
    spent["evaluation"] += seconds.get("evaluate", 0.0)
    spent["other"] = max(0.0, sum(seconds.get(stage, 0.0) for stage in _STAGES) - sum(spent.values()))
    return {**seconds, **spent}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - start
