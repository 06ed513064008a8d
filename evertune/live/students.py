"""Students in a registry of their own: each version that goes into production is followed by a smaller one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evertune.gate.verdict import Verdict
from evertune.live.outcome import Outcome, Status, reasons_of
from evertune.live.plan import clear
from evertune.live.seconds import timed
from evertune.live.settings import StudentSettings
from evertune.live.setup import Setup
from evertune.live.versions import VERDICT
from evertune.registry.registry import Registry
from evertune.registry.version import Version

if TYPE_CHECKING:
    from evertune.training.trainer import ContinualTrainer

logger = logging.getLogger("evertune.live")


class Students:
    """The students of a registry, in a registry of their own, which is the one to serve.

    A student is made of each version in production, and judged twice on everything that is held out: against its
    teacher, and against the student in production. If it passes both, it goes into production, otherwise the student
    that is there stays. Both are published, so that a student that was refused is not made again.

    A version that only names new classes (``imprint_after``) has no student: that of the next update learns them.

    Nothing is half done: the version in production either has its student or has none yet, in which case :meth:`due`
    says so, and :meth:`catch_up` makes it or finishes it. If the teachers' registry goes back to a version whose
    student is there, that student goes back into production. An alias that somebody changes in the students' registry
    stands until the teacher changes.

    Args:
        setup: What all updates of the teacher have in common.
        trainer: Trainer whose settings are used.
        student: How small the students are, and their registry.

    Raises:
        ValueError: If the registry is that of the teacher, or a limit of the gate is unknown or out of range.
    """

    def __init__(self, setup: Setup, trainer: ContinualTrainer, student: StudentSettings) -> None:
        from evertune.live.distilling import for_students

        assert student.registry is not None
        self.registry = Registry(student.registry)
        if self.registry.store.root == setup.registry.store.root:
            raise ValueError(
                f"student.registry is {student.registry}, the registry of the teacher: students need one of their own"
            )
        self.settings = student
        self._setup, self._trainer = setup, trainer
        self._own = for_students(setup, student, registry=self.registry)

    def due(self) -> str | None:
        """Why there is something to do, as a message; None if the version in production has its student."""
        teacher = self._setup.registry.production
        if teacher is None or teacher.manifest.kind == "imprinting":
            return None
        student = self._newest_of(teacher)
        if student is None:
            return f"version {teacher.number} has no student yet"
        if self._is_open(student):
            return f"version {student.number} of {self.registry.store.root}, its student, is not in production yet"
        return None

    def catch_up(self) -> Outcome | None:
        """Do what is due. Requires the lease of the teachers' registry, and takes that of the students'.

        Raises:
            LeaseHeld: If another process is writing to the students' registry.
            ValueError: If the version in production cannot be distilled so.
        """
        reason = self.due()
        if reason is None:
            return None
        logger.info("%s", reason, extra={"event": "distilling"})
        return self.make()

    def make(self) -> Outcome:
        """Make a student of the version in production, whether it has one or not; one that is not settled is settled.

        Raises:
            LeaseHeld: If another process is writing to the students' registry.
            ValueError: If the version in production cannot be distilled so.
        """
        from evertune.live.distilling import taught, teacher_of
        from evertune.live.publishing import publish

        setup, own, seconds = self._setup, self._own, dict[str, float]()
        teacher = teacher_of(setup)
        own.versions.begin()
        with self.registry.lease("evertune update", inherit=False):
            served, student = self.registry.production, self._newest_of(teacher)
            if student is None or not self._is_open(student):
                update, verdict = taught(own, setup, teacher, self.settings, self._trainer, seconds, served)
                with timed(seconds, "publish"):
                    self._copy_slices(teacher)
                    student = publish(own, update, verdict, seconds)
            return self._settle(student, teacher, served, seconds)

    def _settle(
        self, student: Version, teacher: Version, served: Version | None, seconds: Mapping[str, float]
    ) -> Outcome:
        """Change the aliases by the verdict on a student that is published."""
        from evertune.live.judging import parsed

        clear(self._own.staging)
        now, number, words = self._setup.registry.production, student.number, f"student of version {teacher.number}"
        if now is None or now.number != teacher.number:
            return Outcome("nothing", f"{words}: another version is in production by now")
        status: Status = "promoted" if student.passed else "refused"
        if student.passed:
            expected = None if served is None else served.number
            self.registry.promote(number, reason=student.manifest.reason, expected=expected)
        else:
            self.registry.set_refused(number)
        name = f"version {number} of {self.registry.store.root}"
        decision = "is in production" if student.passed else "is refused"
        verdict = parsed(student.read(VERDICT), f"{VERDICT} of {name}", Verdict.from_dict)
        return Outcome(status, f"{words}: {name} {decision}: {reasons_of(verdict)}", number, verdict, seconds)

    def _newest_of(self, teacher: Version) -> Version | None:
        """The newest student of a version; None if there is none of these settings."""
        of_teacher = [one for one in self.registry.versions() if one.manifest.teacher == teacher.number]
        if not of_teacher or of_teacher[-1].manifest.config.get("student") != self.settings.recorded:
            return None
        return of_teacher[-1]

    def _is_open(self, student: Version) -> bool:
        """Whether a student that has passed waits to go into production, as the teacher has changed last."""
        production = self.registry.production
        if not student.passed or (production is not None and production.number == student.number):
            return False
        return _last_change(self._setup.registry) >= _last_change(self.registry)

    def _copy_slices(self, teacher: Version) -> None:
        """The held-out records of a teacher, by which its student can be looked at and compared like any version."""
        for entry in teacher.slices():
            if not self.registry.store.exists(entry.file):
                self.registry.store.write(entry.file, teacher.store.read(entry.file))


def _last_change(registry: Registry) -> str:
    """When the version in production changed last (ISO 8601, UTC); empty if it never has."""
    return max((str(one["time"]) for one in registry.events if one["action"] in ("promote", "rollback")), default="")
