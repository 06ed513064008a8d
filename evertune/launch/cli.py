"""The command line: ``fit`` a stream, ``update`` and ``watch`` a registry, and look at what became of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

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
    for name, (_, what) in _OWN_PARSER.items():
        commands.add_parser(name, help=what, add_help=False)
    report = commands.add_parser("report", help="make the HTML page of a history.json, or of a registry")
    report.add_argument("history", type=Path, help="the history.json that a run has written, or a registry's folder")
    report.add_argument("--out", type=Path, help="the page to write (default: report.html beside the history)")
    report.add_argument("--plots", type=Path, metavar="FOLDER", help="also write PNG plots to this folder")
    add_registry_commands(commands)
    if arguments[:1] and arguments[0] in _OWN_PARSER:
        sys.exit(_OWN_PARSER[arguments[0]][0](arguments[1:]))
    known = parser.parse_args(arguments)
    if known.command == "registry":
        sys.exit(run_registry(known))
    try:
        make_report(known.history, known.out, known.plots)
    except (OSError, ValueError, RegistryError) as error:
        sys.exit(f"evertune report: {error}")


def _fit(arguments: Sequence[str]) -> int:
    from evertune.launch.fit import fit

    return fit(arguments)


def _update(arguments: Sequence[str]) -> int:
    from evertune.launch.update import update

    return update(arguments)


def _watch(arguments: Sequence[str]) -> int:
    from evertune.launch.watch import watch

    return watch(arguments)


def _launch(arguments: Sequence[str]) -> int:
    from evertune.launch.command import launch

    return launch(arguments)


def _plan(arguments: Sequence[str]) -> int:
    from evertune.launch.plan import plan

    return plan(arguments)


def _drift(arguments: Sequence[str]) -> int:
    from evertune.launch.drift import drift

    return drift(arguments)


_OWN_PARSER: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "fit": (_fit, "learn a stream of experiences: --config FILE, --print_config, --help"),
    "update": (_update, "learn what has arrived, and promote it if it is no worse: --config FILE, --help"),
    "watch": (_watch, "keep on updating as records arrive: --config FILE, --help"),
    "launch": (_launch, "run one of these on many processes: local, torchrun, slurm, kubernetes"),
    "drift": (_drift, "whether new records differ from old ones, since when, and in what"),
    "plan": (_plan, "what a model needs of each GPU, before there is one"),
}


def make_report(history: Path, page: Path | None, plots: Path | None) -> None:
    """Print the table of a history or a registry and write its HTML page (and plots)."""
    from rich.console import Console

    from evertune.reports import save_plots, summary_table, write_report

    console = Console()
    if history.is_dir():
        from evertune.reports.versions import versions_table, write_versions_report

        if plots is not None:
            raise ValueError("--plots is for a history.json; the page of a registry has its plots in it")
        console.print(versions_table(history))
        page = write_versions_report(history, page or Path("report.html"))
    else:
        console.print(summary_table(history))
        page = write_report(history, page or history.with_name("report.html"))
    console.print(f"report: {page}", markup=False, soft_wrap=True)
    if plots is not None:
        save_plots(history, plots)
        console.print(f"plots: {plots}", markup=False, soft_wrap=True)
