"""``evertune check``: try everything that a configuration of ``update`` or ``watch`` names, without training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from evertune.utils.terminal import complain, console

if TYPE_CHECKING:
    from evertune.live.update import Updater

CHECK = "evertune check"
_SAMPLE = 500  # records that are read


def check(arguments: Sequence[str]) -> int:
    """Read the configuration, some records, the registry, the model and the alerts; nothing is written or sent.

    Args:
        arguments: Those of ``evertune watch``, without its name.

    Returns:
        The exit code: 0 if everything works, 1 if something does not, 2 if the configuration cannot be read.
    """
    from evertune.cli.quiet import quiet
    from evertune.cli.update import updater_from

    screen = console()
    works = True
    with quiet():
        try:
            updater, made = updater_from(arguments, CHECK)
        except Exception as error:
            complain(CHECK, error)
            return 2
        screen.print("configuration  ok", soft_wrap=True)
        parts: dict[str, Callable[[], str]] = {
            "source": lambda: _records(updater, made),
            "registry": lambda: _registry(updater),
            "model": lambda: _model(updater),
            "student": lambda: _student(updater),
            "alerts": lambda: ", ".join(map(_named, made.watch.alerts)) or "none are set",
        }
        for name, part in parts.items():
            try:
                words = f"ok: {part()}"
            except Exception as error:  # whatever is wrong with one part, the others are worth a look
                works, words = False, f"FAILED: {error or type(error).__name__}"
            screen.print(f"{name:<13}  {words}", soft_wrap=True)
    return 0 if works else 1


def _records(updater: Updater, made: Any) -> str:
    """Read the first records into a journal that is thrown away.

    Raises:
        ValueError: If more are bad than the gate allows.
    """
    from evertune.live.intake import Intake
    from evertune.registry.journal import Journal
    from evertune.registry.registry import Registry

    with tempfile.TemporaryDirectory(prefix="evertune-check-") as folder:
        journal = Journal(Registry(folder).store)
        intake = Intake(updater.source, updater.schema, journal, masker=made.masker, label_join=made.label_join)
        report = intake.run(limit=_SAMPLE)
    if not report.read:
        return "it can be read, and holds no record yet"
    bad = f"{report.read} records read, {report.bad} of them bad"
    if report.reasons:
        first = report.reasons[0]
        bad += f", as {first.origin}: {first.words}"
    limit = updater.gate.max_bad_share
    if limit is not None and report.bad > limit * report.read:
        raise ValueError(f"{bad}; an update stops above {limit:.0%} (gate.max_bad_share)")
    return bad


def _registry(updater: Updater) -> str:
    production = updater.registry.production
    stands = "no version yet" if production is None else f"version {production.number} in production"
    reason = updater.due()
    return f"{stands}; {f'an update is due: {reason}' if reason else 'no update is due'}"


def _model(updater: Updater) -> str:
    model = updater.model
    if getattr(model, "classes", None) == []:  # the first update finds them; here any will do
        model.add_classes(["one", "other"])
    model.configure_model()  # reads the weights
    n = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}, {n / 1e6:,.1f} million parameters"


def _student(updater: Updater) -> str:
    """Make a student of the model, which :func:`_model` has read, and look into the registry of the students.

    Raises:
        ValueError: If the model has no such student.
    """
    students = updater.students
    if students is None:
        return "none follows"
    from evertune.lightning_modules.pruning import prune
    from evertune.lightning_modules.students import student_of

    settings, student = students.settings, student_of(updater.model, students.settings.layers)
    prune(student, [], neurons=settings.prune, heads=settings.prune_heads)  # without records, any: as many as later
    n = sum(parameter.numel() for parameter in student.parameters())
    production = students.registry.production
    stands = "no version yet" if production is None else f"version {production.number} in production"
    return f"{n / 1e6:,.1f} million parameters; {students.registry.store.root}: {stands}"


def _named(alert: Any) -> str:
    host = getattr(alert, "host", "")
    return f"{type(alert).__name__}{f' to {host}' if host else ''} (nothing was sent)"
