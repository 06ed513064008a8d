"""``evertune update``: make one update of the registry that a YAML file describes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from evertune.cli.init import asks_for_init, init
from evertune.cli.parsing import command_parser
from evertune.cli.presets import add_preset_argument, parse_with_preset
from evertune.cli.quiet import quiet, say_progress, unset_output
from evertune.gate.gate import Gate
from evertune.live.outcome import EXIT_CODES, Outcome
from evertune.live.settings import StudentSettings, UpdateSettings
from evertune.live.triggers import Trigger
from evertune.live.update import DATA_OF_UPDATES, Updater
from evertune.live.watch import STUDENT, WatchSettings
from evertune.registry.mlflow import MLflowMirror
from evertune.sources.base import Source
from evertune.sources.labels import LabelJoin
from evertune.sources.masking import Masker
from evertune.sources.schema import RecordSchema
from evertune.utils.plugins import load_classes
from evertune.utils.secrets import without_secrets
from evertune.utils.terminal import complain, console

if TYPE_CHECKING:
    from evertune._lightning import LightningArgumentParser

WATCH = ("evertune watch", "evertune check")
"""The programs that use the section ``watch``; others check it, and ignore it."""

DISTIL = "evertune distil"
"""The program that needs the section ``student``."""

_DESCRIPTION = {
    "evertune update": "Learn what has arrived, and promote the new version if it is no worse.",
    "evertune watch": "Keep a registry up to date as records arrive.",
    "evertune distil": "Make a smaller version of the one in production, and promote it if it is no worse.",
    "evertune check": "Try everything that a configuration of update or watch names, without training: read some "
    "records, the registry, the weights of the model and the alerts. Nothing is written or sent.",
}
_EPILOG = {
    "evertune update": "Example: evertune update --config live.yaml --gate.max_forgetting 0.05. Exit codes: 0 "
    "promoted, 3 nothing to do, 4 refused by the gate (the version or its student), 5 stopped for bad data (see "
    "`evertune quarantine list`), 1 an error, 2 a wrong setting.",
    "evertune watch": "Example: evertune watch --config live.yaml --watch.poll 5. Exit codes: 0 after SIGTERM or "
    "SIGINT, 1 if it cannot start or has lost the registry to another process, 2 a wrong setting. `evertune check` "
    "with the same arguments says beforehand what does not work.",
    "evertune distil": "Example: evertune distil --config live.yaml --student.layers 3 --trainer.max_epochs 10. Exit "
    "codes: 0 promoted, 4 refused by the gate (and not published), 1 an error, 2 a wrong setting.",
    "evertune check": "Example: evertune check --config live.yaml. Exit codes: 0 everything works, 1 something does "
    "not, 2 the configuration cannot be read.",
}

logger = logging.getLogger("evertune.live")


def updater_from(arguments: Sequence[str], program: str = "evertune update") -> tuple[Updater, argparse.Namespace]:
    """The updater that a configuration describes, and all settings of the command line.

    Sections: ``registry`` (a folder or URL), ``source``, ``trigger``, ``masker`` (by ``class_path``), ``schema``,
    ``label_join``, ``gate``, ``update`` (:class:`~evertune.live.settings.UpdateSettings`), ``student``
    (:class:`~evertune.live.settings.StudentSettings`), ``mirror``, ``work_dir``,
    ``watch`` (:class:`~evertune.live.watch.WatchSettings`; made for the programs in :data:`WATCH` only) and, as in
    ``evertune fit``, ``model``, ``trainer`` and ``data``.

    Args:
        arguments: Arguments of the command, without its name.
        program: Name of the command, for messages.
    """
    from evertune.training.trainer import ContinualTrainer

    parser = _parser(program)
    config = parse_with_preset(parser, arguments)
    recorded = _recorded(parser, config)  # goes into the manifest of each version
    if program not in WATCH:
        del config["watch"]  # an update does not need its secrets
    made = parser.instantiate(config)
    updater = Updater(
        made["registry"],
        made["source"],
        made["model"],
        ContinualTrainer(**{**made["trainer"].as_dict(), **unset_output(made["trainer"].as_dict())}),
        schema=made["schema"],
        data=config["data"].as_dict(),
        masker=made["masker"],
        label_join=made["label_join"],
        trigger=made["trigger"],
        gate=made["gate"],
        settings=made["update"],
        student=None if program == DISTIL else made["student"],
        mirror=made["mirror"],
        work_dir=made["work_dir"],
        config=recorded,
    )
    return updater, made


def _parser(program: str) -> LightningArgumentParser:
    from evertune._lightning import ActionConfigFile, LightningModule  # type: ignore[attr-defined]
    from evertune.streams.datamodule import ExperienceDataModule
    from evertune.training.trainer import ContinualTrainer

    load_classes()  # so that a configuration can name the classes of plug-ins
    parser = command_parser(
        prog=program,
        description=_DESCRIPTION.get(program, ""),
        epilog=_EPILOG.get(program, ""),
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with the settings below")
    if program in WATCH:
        parser.add_class_arguments(WatchSettings, "watch")  # first, so that its help begins with its own settings
    if program == DISTIL:
        parser.add_class_arguments(StudentSettings, "student")
    else:
        follows = "a smaller version of each that goes into production, in a registry of its own"
        parser.add_argument("--student", type=StudentSettings | None, default=None, help=follows)
    parser.add_argument("--registry", type=str, required=True, help="the folder, or its URL, with the versions")
    parser.add_argument("--work_dir", type=str | None, default=None, help="where an update is staged")
    parser.add_argument("--source", type=Source, required=True, help="where records come from")
    parser.add_class_arguments(RecordSchema, "schema")
    parser.add_argument("--masker", type=Masker | None, default=None, help="takes personal data out")
    parser.add_argument("--label_join", type=LabelJoin | None, default=None, help="joins labels that come later")
    parser.add_argument("--trigger", type=Trigger | None, default=None, help="when to update: 200 new records")
    parser.add_class_arguments(Gate, "gate")
    parser.add_class_arguments(UpdateSettings, "update")
    parser.add_argument("--mirror", type=MLflowMirror | None, default=None, help="another registry to keep informed")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    # Not instantiated: each update makes its own datamodule, and sets what the configuration must not.
    parser.add_class_arguments(ExperienceDataModule, "data", skip=set(DATA_OF_UPDATES), instantiate=False)
    if program not in WATCH:
        parser.add_class_arguments(WatchSettings, "watch")
    parser.add_lightning_class_args(ContinualTrainer, "trainer")  # last: it has the most options
    parser.add_argument("--launch", type=dict[str, Any], default={}, help="settings of `evertune launch`")
    add_preset_argument(parser)
    parser.add_argument("--read_on_from", type=dict[str, Any] | None, default=None, help="an offset of the source")
    parser.add_argument("--dry_run", action="store_true", help="train and judge, but publish nothing")
    return parser


def _recorded(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """The settings that determine a version, not those of where it is kept, and no secrets."""
    values = json.loads(parser.dump(config, format="json", skip_none=False))
    for name in ("config", "registry", "work_dir", "dry_run", "read_on_from", "mirror", "watch", "launch", "student"):
        values.pop(name, None)
    for name in ("devices", "num_nodes"):  # an interrupted update may resume elsewhere
        values["trainer"].pop(name, None)
    return without_secrets(values)


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """SIGTERM ends the command at once, with the exit code of a process that it has ended. The next call resumes."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def update(arguments: Sequence[str]) -> int:
    """Make one update.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 if a version was promoted, 3 if there was nothing to do, 4 if the gate refused the version, 5
        if the data were bad, 1 after an error.
    """
    from evertune.registry.registry import RegistryError
    from evertune.sources.base import SourceError
    from evertune.utils.processes import end_with_supervisor

    if asks_for_init(arguments):
        return init("update", arguments)
    end_with_supervisor()
    watched = "EVERTUNE_LEASE" in os.environ  # of the watch that runs this process and reads its output
    with _ends_at_once(), quiet(), say_progress(as_json=watched):
        try:
            updater, options = updater_from(arguments)
            if options.read_on_from is not None:
                updater.read_on_from(options.read_on_from)
            outcome = updater.run(dry_run=options.dry_run)
        except (SourceError, RegistryError, OSError, ValueError) as error:
            complain("evertune update", error)
            return 1
        if watched:
            _log(outcome, "verdict" if outcome.verdict else "outcome")
            if outcome.student is not None:
                _log(outcome.student, STUDENT)
            return EXIT_CODES[outcome.status]  # the watch reads of the student
    _show(outcome)
    if outcome.student is not None:
        _show(outcome.student)
    return outcome.code


def _log(outcome: Outcome, event: str) -> None:
    """An outcome as the line that a watch reads."""
    facts = {} if outcome.verdict is None else outcome.verdict.to_dict()
    about = {"event": event, "status": outcome.status, "version": outcome.version}
    about |= {"untrained": outcome.untrained} if outcome.untrained else {}
    logger.info("%s", outcome.words, extra={**about, **facts})


def _show(outcome: Outcome) -> None:
    """An outcome for people."""
    screen = console()
    if outcome.verdict is not None:
        screen.print(outcome.verdict.table())
    if outcome.status != "trained":  # the words of the other ranks
        screen.print(outcome.words, soft_wrap=True)
    if outcome.untrained:
        screen.print(outcome.untrained, soft_wrap=True)
    if "training" in outcome.seconds:
        from evertune.reports.summary import spent

        screen.print(f"time: {spent(outcome.seconds)}", soft_wrap=True, style="dim")
