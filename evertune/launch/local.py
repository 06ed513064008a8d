"""``evertune launch local``: processes on this machine."""

from __future__ import annotations

import secrets
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from evertune.launch.shell import line
from evertune.utils.processes import die_with_parent

if TYPE_CHECKING:
    from evertune.launch.settings import LaunchSettings


def run(settings: LaunchSettings, command: Sequence[str], *, dry_run: bool, wait: bool = True) -> int:
    """Run a command on this machine and wait for it to end.

    If the port has its default value, a free port is chosen, so that several runs can share the machine.

    Args:
        settings: Settings of the launch.
        command: Command of every rank.
        dry_run: Only print what would be run.
        wait: Ignored: this launcher always waits.

    Returns:
        The exit code of the node's supervisor.

    Raises:
        ValueError: If the settings ask for several nodes, or for a container that only SLURM can start.
    """
    if settings.nodes != 1:
        raise ValueError(f"nodes must be 1 on this machine, got {settings.nodes}: use torchrun, slurm or kubernetes")
    if settings.port == type(settings).port:
        settings = replace(settings, port=_free_port())
    words = settings.node_command(command, node_rank="0", master="127.0.0.1", run_id=new_run_id(settings))
    shell = ["bash", "-c", line(settings, words)]
    if dry_run:
        print(shlex.join(shell))
        return 0
    process = subprocess.Popen(shell, preexec_fn=die_with_parent)  # noqa: PLW1509 (one system call)
    with forwarded(process.send_signal):
        return exit_code(process.wait())


def new_run_id(settings: LaunchSettings) -> str:
    """A unique identifier for a run."""
    return f"{settings.name}-{secrets.token_hex(4)}"


def exit_code(code: int) -> int:
    """The exit code of a child as a shell reports it: 128 plus the number of the signal that killed it."""
    return code if code >= 0 else 128 - code


@contextmanager
def forwarded(send: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Forward the signals that ask a run to stop, instead of ending this process."""

    def handle(number: int, frame: object) -> None:
        send(signal.Signals(number))

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # 0: the system chooses; nothing reserves the port after this function
        port: int = probe.getsockname()[1]
        return port
