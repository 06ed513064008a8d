"""The command line: ``fit`` a stream, ``update`` and ``watch`` a registry, and look at what became of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evertune.launch.registry import add_registry_commands, run_registry
from evertune.registry.store import RegistryError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="evertune", description="Keep a fine-tuned transformer up to date.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, what) in _CONFIGURED.items():
        commands.add_parser(name, help=f"{what}: --config FILE, --print_config, --help", add_help=False)
    report = commands.add_parser("report", help="make the HTML page of a history.json, or of a registry")
    report.add_argument("history", type=Path, help="the history.json that a run has written, or a registry's folder")
    report.add_argument("--out", type=Path, help="the page to write (default: report.html beside the history)")
    report.add_argument("--plots", type=Path, metavar="FOLDER", help="also write PNG plots to this folder")
    add_registry_commands(commands)
    if arguments[:1] and arguments[0] in _CONFIGURED:
        sys.exit(_CONFIGURED[arguments[0]][0](arguments[1:]))
    known = parser.parse_args(arguments)
    if known.command == "registry":
        sys.exit(run_registry(known))
    try:
        _report(known.history, known.out, known.plots)
    except (OSError, ValueError, RegistryError) as error:
        sys.exit(f"evertune report: {error}")


def fit(arguments: Sequence[str]) -> None:
    """Learn a stream as a ``LightningCLI`` configuration describes it.

    Sections: ``trainer`` (every argument of ``Trainer``; the callbacks are the methods), ``model`` (any LightningModule
    by ``class_path``), ``data`` (of :class:`~evertune.streams.StreamDataModule`) and ``out``, the folder for
    ``history.json``, ``report.html``, the ``model`` and the whole ``config.yaml``.
    """
    from pytorch_lightning import LightningModule
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
    from pytorch_lightning.utilities import rank_zero_only

    from evertune.metrics.history import save_history
    from evertune.streams import StreamDataModule
    from evertune.trainer import ContinualTrainer

    class FitCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.prog = "evertune fit"
            parser.add_argument(
                "--out", default="evertune-run", help="folder for the model, history.json, report.html and config.yaml"
            )

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_args(list(arguments))

    cli = FitCLI(
        LightningModule,
        StreamDataModule,
        trainer_class=ContinualTrainer,
        subclass_mode_model=True,
        run=False,
        save_config_callback=None,
        parser_kwargs={"description": "Learn a stream of experiences, one update after the other."},
    )
    assert isinstance(cli.trainer, ContinualTrainer)
    try:
        _ = cli.datamodule.stream  # read now: a bad file is told in one line, before any process is started
    except (OSError, ValueError) as error:
        sys.exit(f"evertune fit: {error}")
    history = cli.trainer.fit_stream(cli.model, cli.datamodule)
    out = Path(cli.config["out"])
    if hasattr(cli.model, "save_pretrained"):
        cli.model.save_pretrained(out / "model")
    if getattr(rank_zero_only, "rank", 0) == 0:
        save_history(out / "history.json", {"run": history})
        cli.parser.save(cli.config, out / "config.yaml", skip_none=False, overwrite=True, multifile=False)
        _report(out / "history.json", out / "report.html", None)


def _update(arguments: Sequence[str]) -> int:
    from evertune.launch.update import update

    return update(arguments)


def _watch(arguments: Sequence[str]) -> int:
    from evertune.launch.watch import watch

    return watch(arguments)


_CONFIGURED: dict[str, tuple[Callable[[Sequence[str]], int | None], str]] = {
    "fit": (fit, "learn a stream of experiences"),
    "update": (_update, "learn what has arrived, and promote it if it is no worse"),
    "watch": (_watch, "keep on updating as records arrive"),
}


def _report(history: Path, page: Path | None, plots: Path | None) -> None:
    from rich.console import Console

    from evertune.reports import save_plots, summary_table, write_report

    console = Console()
    if history.is_dir():
        from evertune.reports.versions import versions_table, write_versions_report

        if plots is not None:
            raise ValueError("--plots is for a history.json; the page of a registry has its plots in it")
        console.print(versions_table(history))
        console.print(f"report: {write_versions_report(history, page or Path('report.html'))}")
        return
    console.print(summary_table(history))
    console.print(f"report: {write_report(history, page or history.with_name('report.html'))}")
    if plots is not None:
        save_plots(history, plots)
        console.print(f"plots: {plots}")
