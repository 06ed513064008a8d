"""The command line: ``fit`` a stream, ``update`` and ``watch`` a registry, and inspect the results."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from evertune._lightning import LightningError
from evertune.cli.registry import add_registry_commands, run_registry
from evertune.utils.terminal import complain, guard, pipes

_OWN_PARSER = {
    "fit": "learn a stream of experiences: --config FILE, --print_config, --help",
    "tune": "search the settings of fit that learn a stream best: --config FILE, --space FILE",
    "update": "learn what has arrived, and promote it if it is no worse: --config FILE, --help",
    "watch": "keep on updating as records arrive: --config FILE, --help",
    "distil": "make a smaller version that production teaches: --config FILE --student.layers N",
    "predict": "the answers to the records of a file: REGISTRY --input FILE --output FILE",
    "serve": "answer requests over HTTP with the version in production: --registry R, --help",
    "ui": "a web page over a registry: versions, updates, quarantine, review: --registry R, --help",
    "export": "write a version as ONNX, torch.export or safetensors, and check it: REGISTRY VERSION --output DIR",
    "keys": "API keys of the server: add, list, rotate, revoke",
    "compare": "whether a version answers better than another, and where: REGISTRY A B --data FILE",
    "explain": "why a version answers a text as it does, and since when: REGISTRY VERSION --text TEXT",
    "check": "try what a configuration of update or watch names, without training: --config FILE",
    "quarantine": "records that were set aside: list, show, retry, drop",
    "review": "label the records that a version is least sure of: choose, take",
    "pending": "records that wait for the next update: list, show, drop",
    "launch": "run one of these on many processes: local, torchrun, slurm, kubernetes",
    "drift": "whether new records differ from old ones, since when, and in what",
    "forget": "erase records from a registry by id, and prove it: REGISTRY --id ID",
    "completion": "print a script that completes commands and options in bash or zsh",
    "plan": "what a model needs of each GPU, before there is one",
}
"""Commands that parse their own arguments. Command ``x`` is the function ``x`` of the module ``evertune.cli.x``."""

_RUNS_ON = ("torch", "lightning", "pytorch-lightning", "transformers", "deepspeed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Arguments of the command line, without the program's name; by default those of the process.

    Raises:
        SystemExit: With the exit code of the command, except after a ``report`` that succeeded.
    """
    guard()
    with pipes():
        _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="evertune",
        description="Keep a fine-tuned transformer up to date.",
        epilog="`evertune COMMAND --help` has the options, exit codes and an example of each command.",
    )
    parser.add_argument("--version", action=_Version, help="print the versions of evertune and what it runs on")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in _OWN_PARSER.items():
        commands.add_parser(name, help=what, add_help=False)
    report = commands.add_parser(
        "report",
        help="make the HTML page of a history.json, or of a registry",
        epilog="Example: evertune report news --out news.html. Exit codes: 0 done, 1 an error, 2 a bad argument.",
    )
    report.add_argument("history", type=Path, help="the history.json that a run has written, or a registry's folder")
    report.add_argument("--out", type=Path, help="the page to write (default: report.html beside the history)")
    report.add_argument("--plots", type=Path, metavar="FOLDER", help="also write PNG plots to this folder")
    report.add_argument(
        "--suspects",
        type=Path,
        metavar="FILE",
        help="also write a registry's suspect labels as JSON lines for relabelling",
    )
    add_registry_commands(commands)
    # Before argparse, which knows the names of these commands but not their options.
    if arguments[:1] and arguments[0] in _OWN_PARSER:
        sys.exit(_run(arguments[0], arguments[1:]))
    known = parser.parse_args(arguments)
    if known.command == "registry":
        sys.exit(run_registry(known))
    if wrong := _report(known):
        sys.exit(wrong)


class _Version(argparse.Action):
    """Prints versions, of what is installed, without importing any of it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"evertune {_version_of('evertune')}")
        found = {name: _version_of(name) for name in _RUNS_ON}
        print(", ".join(f"{name} {number}" for name, number in found.items() if number), end="")
        print(f", Python {platform.python_version()}")
        parser.exit()


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _run(command: str, arguments: Sequence[str]) -> int:
    """Run a command of :data:`_OWN_PARSER`. Its module is imported only here, so that other commands start fast."""
    try:
        code: int = getattr(import_module(f"evertune.cli.{command}"), command)(arguments)
    except LightningError as error:
        complain(f"evertune {command}", error)
        return 2
    return code


def _report(known: argparse.Namespace) -> int:
    """Write the page of a history or a registry; returns the exit code, 1 after an error."""
    from evertune.registry.store import RegistryError
    from evertune.reports.write import make_report

    try:
        make_report(known.history, known.out, known.plots, known.suspects)
    except (OSError, ValueError, RegistryError) as error:
        complain("evertune report", error)
        return 1
    return 0
