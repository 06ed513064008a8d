"""The command line: ``fit`` a stream, ``update`` and ``watch`` a registry, and look at what became of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from evertune.cli.registry import add_registry_commands, run_registry
from evertune.registry.store import RegistryError
from evertune.reports.write import make_report


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
    from evertune.cli.fit import fit

    return fit(arguments)


def _update(arguments: Sequence[str]) -> int:
    from evertune.cli.update import update

    return update(arguments)


def _watch(arguments: Sequence[str]) -> int:
    from evertune.cli.watch import watch

    return watch(arguments)


def _launch(arguments: Sequence[str]) -> int:
    from evertune.cli.launch import launch

    return launch(arguments)


def _plan(arguments: Sequence[str]) -> int:
    from evertune.cli.plan import plan

    return plan(arguments)


def _drift(arguments: Sequence[str]) -> int:
    from evertune.cli.drift import drift

    return drift(arguments)


_OWN_PARSER: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "fit": (_fit, "learn a stream of experiences: --config FILE, --print_config, --help"),
    "update": (_update, "learn what has arrived, and promote it if it is no worse: --config FILE, --help"),
    "watch": (_watch, "keep on updating as records arrive: --config FILE, --help"),
    "launch": (_launch, "run one of these on many processes: local, torchrun, slurm, kubernetes"),
    "drift": (_drift, "whether new records differ from old ones, since when, and in what"),
    "plan": (_plan, "what a model needs of each GPU, before there is one"),
}
