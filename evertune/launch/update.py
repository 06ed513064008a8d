"""``evertune update``: one update of a registry, as a YAML file describes it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from evertune.live.triggers import Trigger
from evertune.live.update import Updater, UpdateSettings
from evertune.registry.gate import Gate
from evertune.registry.mlflow import MLflowMirror
from evertune.streams.labels import LabelJoin
from evertune.streams.masking import Masker
from evertune.streams.schema import RecordSchema
from evertune.streams.source import Source


def updater_from(arguments: Sequence[str], program: str = "evertune update") -> tuple[Updater, argparse.Namespace]:
    """The updater that a configuration describes, and the other settings of the command line.

    Sections: ``registry`` (a folder or URL), ``source``, ``trigger``, ``masker`` (by ``class_path``), ``schema``,
    ``label_join``, ``gate``, ``update`` (:class:`~evertune.live.update.UpdateSettings`), ``mirror``, ``work_dir``, and,
    as in ``evertune fit``, ``model``, ``trainer`` and ``data``.
    """
    from pytorch_lightning import LightningModule
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

    from evertune.streams.datamodule import ExperienceDataModule
    from evertune.trainer import ContinualTrainer

    class UpdateCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.prog = program
            parser.add_argument("--registry", type=str, required=True, help="the folder, or its URL, of the versions")
            parser.add_argument("--work_dir", type=str | None, default=None, help="where an update is staged")
            parser.add_subclass_arguments(Source, "source", required=True)
            parser.add_class_arguments(RecordSchema, "schema")
            parser.add_subclass_arguments(Masker, "masker", required=False)
            parser.add_argument("--label_join", type=LabelJoin | None, default=None)
            parser.add_subclass_arguments(Trigger, "trigger", required=False)
            parser.add_class_arguments(Gate, "gate")
            parser.add_class_arguments(UpdateSettings, "update")
            parser.add_argument("--mirror", type=MLflowMirror | None, default=None)
            parser.add_class_arguments(
                ExperienceDataModule,
                "data",
                skip={"experience", "tokenizer", "text", "label", "collate_fn", "id_column", "seed"},
                instantiate=False,
            )
            parser.add_argument("--watch", type=dict[str, Any], default={}, help="settings of `evertune watch`")
            parser.add_argument("--dry_run", action="store_true", help="train and judge, but publish nothing")

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_args(list(arguments))

    cli = UpdateCLI(
        LightningModule,
        trainer_class=ContinualTrainer,
        subclass_mode_model=True,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        parser_kwargs={"description": "Update a registry once: 0 promoted, 3 nothing to do, 4 refused, 5 bad data."},
    )
    assert isinstance(cli.trainer, ContinualTrainer)
    made = cli.config_init
    return (
        Updater(
            made["registry"],
            made["source"],
            cli.model,
            cli.trainer,
            schema=made["schema"],
            data=dict(cli.config["data"].as_dict()),
            masker=made.get("masker"),
            label_join=made["label_join"],
            trigger=made.get("trigger"),
            gate=made["gate"],
            settings=made["update"],
            mirror=made["mirror"],
            work_dir=made["work_dir"],
            config=_recorded(cli.config),
        ),
        made,
    )


def _recorded(config: Any) -> dict[str, Any]:
    """What of the configuration decides about a version: not where it is kept, nor what the run is called."""
    values = dict(config.as_dict())
    for name in ("config", "registry", "work_dir", "dry_run", "mirror", "watch", "seed_everything"):
        values.pop(name, None)
    return values


def update(arguments: Sequence[str]) -> int:
    """Make one update; returns the exit code."""
    from rich.console import Console

    from evertune.live.watch import end_with_supervisor
    from evertune.registry.registry import RegistryError
    from evertune.streams.source import SourceError

    end_with_supervisor()
    try:
        updater, options = updater_from(arguments)
        outcome = updater.run(dry_run=options.dry_run)
    except (SourceError, RegistryError, OSError, ValueError) as error:
        print(f"evertune update: {error}", file=sys.stderr)
        return 1
    console = Console()
    if outcome.verdict is not None:
        console.print(outcome.verdict.table())
    console.print(outcome.words)
    return outcome.code
