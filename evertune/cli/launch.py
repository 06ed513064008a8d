"""``evertune launch``: the same command on this machine, over SSH, in SLURM or in Kubernetes."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

from evertune.launch.settings import read_settings
from evertune.utils.plugins import load, plugins
from evertune.utils.terminal import complain

LAUNCHERS = {
    "local": "processes on this machine",
    "torchrun": "nodes that are reached over SSH, or a line for each to run by hand",
    "slurm": "a job of SLURM, or an array of jobs for seeds and sweeps",
    "kubernetes": "a JobSet or PyTorchJob of Kubernetes; for `serve`, a Deployment",
}
"""Built-in launchers, modules of ``evertune.launch``. Other packages add theirs by entry point."""

COMMANDS = ("fit", "update", "watch")

_HELP = """usage: evertune launch WHERE [options] -- COMMAND ...

Run a command of evertune on many processes. WHERE is one of

{launchers}

and COMMAND is `fit`, `update` or `watch` with its own options: of a watch, which stays here, each update is launched.
On Kubernetes it may also be `serve`, whose servers stay up.
Options may also stand in the section `launch` of the command's --config file; see `evertune launch WHERE --help`.

  evertune launch local --processes_per_node 2 -- fit --config stream.yaml
  evertune launch slurm --nodes 4 --dry_run -- update --config live.yaml

Exit codes: those of the command where the launcher waits for it (--wait), else 0 once it was submitted; 1 if it could
not be; 2 a wrong argument: --dry_run shows what would be run.
"""
_WATCH_MARGIN = 30.0  # seconds that a launcher gets beyond its own `grace` before the watch kills it


def launch(arguments: Sequence[str]) -> int:
    """Launch a command.

    Args:
        arguments: Arguments of ``evertune launch``: ``WHERE [options] -- COMMAND ...``.

    Returns:
        The exit code: that of the command if the launcher waits for it, else 0 once it has been submitted; 2 if the
        arguments are invalid.

    Raises:
        SystemExit: With a message, if an option or the section ``launch`` of the configuration is invalid.
    """
    where, *others = list(arguments) or ["--help"]
    if where in ("-h", "--help"):
        print(_HELP.format(launchers="\n".join(f"  {name:<12}{what}" for name, what in _described().items())))
        return 0
    point = _launcher(where)
    if point is None:
        return _refuse("", f"WHERE must be one of {', '.join({**LAUNCHERS, **plugins('launchers')})}, got {where!r}")
    options, command = others, None
    if "--" in others:
        at = others.index("--")
        options, command = others[:at], others[at + 1 :]
    elif any(option == "-h" or option.endswith("help") for option in options):
        read_settings(options, ["fit"], where)  # prints it, and exits
    if not command:
        example = f"evertune launch {where} -- fit --config stream.yaml"
        return _refuse(where, f"the command to launch must follow `--`, as in `{example}`")
    commands = (*COMMANDS, "serve") if where == "kubernetes" else COMMANDS
    if command[0] not in commands:
        return _refuse(where, f"the command must be one of {', '.join(commands)}, got {command[0]!r}")
    if command[0] == "serve":
        point = EntryPoint(where, "evertune.launch.kubernetes_serve", "evertune.launchers")
    try:
        launcher = load(point)
        return 2 if launcher is None else _launch(launcher, where, options, command)
    except (ValueError, OSError) as error:
        return _refuse(where, str(error))


def _launcher(name: str) -> EntryPoint | None:
    """The built-in launcher of this name, or else one from another package."""
    if name in LAUNCHERS:
        return EntryPoint(name, f"evertune.launch.{name}", "evertune.launchers")
    return plugins("launchers").get(name)


def _described() -> dict[str, str]:
    """Each launcher with a description: for those of other packages, the first line of their docstring."""
    others = {name: load(point) for name, point in plugins("launchers").items() if name not in LAUNCHERS}
    words = {name: (found.__doc__ or "").strip().split("\n")[0] for name, found in others.items() if found is not None}
    return LAUNCHERS | words


def _launch(launcher: Any, where: str, options: Sequence[str], command: Sequence[str]) -> int:
    from evertune.registry.lease import TOKEN
    from evertune.utils.processes import end_with_supervisor

    settings, dry_run, wait = read_settings(options, command, where)
    if command[0] != "watch":
        # SIGTERM rather than a kill: the launcher still has to stop the processes that it started elsewhere.
        end_with_supervisor(lambda: os.kill(os.getpid(), signal.SIGTERM))
        if TOKEN in os.environ:  # processes on other machines, too, work under the lease of the watch
            settings = replace(settings, environment=settings.environment | {TOKEN: os.environ[TOKEN]})
        return int(launcher.run(settings, list(command), dry_run=dry_run, wait=wait))
    update = ["update", *command[1:]]
    with redirect_stdout(io.StringIO()) as shown:  # a dry run now refuses what each update would
        launcher.run(settings, update, dry_run=True, wait=True)
    if dry_run:
        print(shown.getvalue(), end="")
        return 0
    from evertune.cli.watch import watch

    words = ["launch", where, *options, "--wait", "--"]
    return watch(command[1:], launcher=words, grace=settings.grace + _WATCH_MARGIN)


def _refuse(where: str, why: str) -> int:
    complain(f"evertune launch {where}".strip(), why)
    return 2
