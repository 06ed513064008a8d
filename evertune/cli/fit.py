"""``evertune fit``: learn the stream that a YAML file describes. A killed run resumes when it is started again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import yaml

from evertune.cli.init import asks_for_init, init
from evertune.cli.parsing import command_parser
from evertune.cli.presets import add_preset_argument, parse_with_preset
from evertune.cli.quiet import quiet, unset_output
from evertune.utils.files import write_atomically
from evertune.utils.plugins import load_classes
from evertune.utils.ranks import is_leader, is_writer
from evertune.utils.terminal import complain

if TYPE_CHECKING:
    from evertune._lightning import LightningCLI, Trainer

_MAY_CHANGE_ON_RESUME = ("config", "launch", "out", "checkpoint_every_n_steps")
"""Settings that may differ when a run is resumed."""


def fit(arguments: Sequence[str]) -> int:
    """Learn a stream as a ``LightningCLI`` configuration describes it.

    Sections: ``trainer`` (every argument of ``Trainer``; the methods are among its callbacks), ``model`` (any
    LightningModule, by ``class_path``), ``data`` (arguments of :class:`~evertune.streams.StreamDataModule`) and
    ``out``, the folder for ``history.json``, ``report.html``, the ``model`` and the complete ``config.yaml``. Until
    these are written, the subfolder ``run`` holds the state from which an interrupted run resumes.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 when the run is complete, also if it was before; 2 if the data or the folder cannot be used.
    """
    if asks_for_init(arguments):
        return init("fit", arguments)
    with quiet():
        return _fit(arguments)


def _fit(arguments: Sequence[str]) -> int:
    from evertune.metrics.history import save_history
    from evertune.training.trainer import ContinualTrainer

    cli = read_fit(arguments)
    assert isinstance(cli.trainer, ContinualTrainer)
    out = Path(cli.config["out"])
    settings = _settings(cli)
    run_dir = out / "run"
    if not run_dir.exists() and (out / "history.json").is_file() and _same(out / "config.yaml", settings):
        print(f"this run is complete: see {out / 'report.html'}; to learn it again, delete {out} or pass another --out")
        return 0
    try:
        cli.datamodule.stream_for(
            cli.model
        )  # read now, so that a bad file is reported in one line before any process is started
        _begin(run_dir, settings)
    except (OSError, ValueError) as error:
        complain("evertune fit", error)
        return 2
    history = cli.trainer.fit_stream(
        cli.model,
        cli.datamodule,
        run_dir=run_dir,
        checkpoint_every_n_steps=cli.config["checkpoint_every_n_steps"],
        untrained=cli.config["untrained"],
    )
    if not is_leader() and not dist.is_initialized():
        return 0  # an earlier start has learned everything; one process is enough to write the results
    if hasattr(cli.model, "save_pretrained"):
        cli.model.save_pretrained(out / "model")  # on every rank, as sharded weights are gathered for it
    if is_writer():
        from evertune.reports.write import make_report

        cli.parser.save(cli.config, out / "config.yaml", skip_none=False, overwrite=True, multifile=False)
        save_history(out / "history.json", {"run": history})
        make_report(out / "history.json", out / "report.html", None)
        shutil.rmtree(run_dir)  # last: killed before this line, the run resumes and writes its results again
    return 0


def read_fit(arguments: Sequence[str]) -> LightningCLI:
    """The model, data and trainer that the arguments of ``evertune fit`` describe.

    Raises:
        SystemExit: If a setting is wrong, with code 2; the reason has been printed.
    """
    from evertune._lightning import ActionConfigFile, LightningArgumentParser, LightningCLI, LightningModule
    from evertune.streams import StreamDataModule
    from evertune.training.trainer import ContinualTrainer

    load_classes()  # so that a configuration can name the classes of plug-ins

    class FitCLI(LightningCLI):
        def init_parser(self, **settings: Any) -> LightningArgumentParser:
            parser = command_parser(**settings)
            parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with the settings below")
            return parser

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.prog = "evertune fit"
            parser.add_argument(
                "--out", default="evertune-run", help="folder for the model, history.json, report.html and config.yaml"
            )
            parser.add_argument(
                "--checkpoint_every_n_steps",
                type=int,
                default=500,
                help="optimizer steps between two checkpoints inside an experience: what a kill costs at most",
            )
            parser.add_argument(
                "--untrained",
                type=bool,
                default=True,
                help="measure what no training would give: one forward pass over the data",
            )
            parser.add_argument("--launch", type=dict[str, Any], default={}, help="settings of `evertune launch`")
            add_preset_argument(parser)

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parse_with_preset(parser, arguments)  # LightningCLI would read sys.argv, `fit` included

        def instantiate_trainer(self, **settings: Any) -> Trainer:
            return super().instantiate_trainer(**unset_output(self.config_init["trainer"]), **settings)

    return FitCLI(
        LightningModule,
        StreamDataModule,
        trainer_class=ContinualTrainer,
        subclass_mode_model=True,
        run=False,
        save_config_callback=None,
        parser_kwargs={
            "description": "Learn a stream of experiences, one update after the other. A killed run resumes when it is "
            "started again.",
            "epilog": "Example: evertune fit --config stream.yaml --trainer.max_epochs 1. Exit codes: 0 complete, 2 a "
            "wrong setting, or data or a folder that cannot be used, 75 stopped by a signal: start it again.",
        },
    )


def _settings(cli: LightningCLI) -> dict[str, Any]:
    """The settings that determine the result, without those that only say where and how it is computed."""
    return _decisive(json.loads(cli.parser.dump(cli.config, format="json", skip_none=False)))


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in _MAY_CHANGE_ON_RESUME}
    # A run may resume on another number of processes.
    kept["trainer"] = {name: v for name, v in kept["trainer"].items() if name not in ("devices", "num_nodes")}
    return kept


def _same(path: Path, settings: dict[str, Any]) -> bool:
    return path.is_file() and _decisive(yaml.safe_load(path.read_text())) == settings


def _begin(run_dir: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a new run, or compare them with those of the run that the folder holds.

    Raises:
        ValueError: If the folder holds an interrupted run with other settings.
    """
    path = run_dir / "settings.json"
    if path.is_file() and json.loads(path.read_bytes()) != settings:
        raise ValueError(
            f"{run_dir} holds an interrupted run with other settings ({path.name}): resume with those, pass another "
            "--out, or delete it to start over"
        )
    if is_leader():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=1).encode())
