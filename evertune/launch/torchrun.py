"""``evertune launch torchrun``: nodes that are reached over SSH, or started by hand."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from evertune.launch import local
from evertune.launch.settings import DECIDED
from evertune.launch.shell import line
from evertune.utils.processes import PREEMPTED

if TYPE_CHECKING:
    from evertune.launch.settings import LaunchSettings

UNREACHABLE = 255
"""Exit code of ssh itself."""

_UNKNOWN = "FIRST_NODE"  # placeholder in lines that are run by hand
_MARGIN = 30.0  # seconds beyond the grace period after which a node is given up
_LISTEN = 'exec 3<&0; (while read -r s <&3; do kill -s "$s" $$; done; kill -s TERM $$) >/dev/null 2>&1 &'
"""Shell code that runs beside a supervisor on its host. It reads the names of signals from standard input and sends
them to the supervisor; the end of the input means that the connection is lost, and becomes SIGTERM."""


def run(settings: LaunchSettings, command: Sequence[str], *, dry_run: bool, wait: bool = True) -> int:
    """Run a command on all nodes over SSH and wait for it to end; without SSH, print the line of each node.

    The output of the nodes is printed here, prefixed with the node's name. SIGINT, SIGTERM and SIGUSR2 are forwarded
    to all supervisors, which get a SIGTERM when this process dies or loses its connection to them.

    Args:
        settings: Settings of the launch.
        command: Command of every rank.
        dry_run: Only print what would be run.
        wait: Ignored: this launcher always waits.

    Returns:
        The exit code of the command, as the node of rank 0 reports it; 0 if enough nodes succeed; else the exit code
        of a node that failed.

    Raises:
        ValueError: If the hosts are not given, or contradict the other settings.
    """
    settings, hosts = nodes_of(settings)
    if settings.nodes == 1 and not hosts:
        return local.run(settings, command, dry_run=dry_run)
    node_lines = lines(settings, command)
    if hosts and settings.torchrun.ssh:
        if not dry_run:
            return _Nodes(settings, hosts, node_lines).wait()
        print("\n".join(node_lines))
        return 0
    if not dry_run and settings.torchrun.ssh:
        raise ValueError(
            f"torchrun.hosts or torchrun.hostfile must name the {settings.nodes} nodes; with --dry_run, or an empty "
            "torchrun.ssh, the line of each node is printed, to be run by hand"
        )
    if not hosts:
        print(f"# In all lines, replace {_UNKNOWN} by the name or address of the first node.")
    for rank, node_line in enumerate(node_lines):
        print(f"# Node {rank} of {settings.nodes}{f', on {hosts[rank]}' if hosts else ''}:\n{node_line}")
    return 0


def lines(settings: LaunchSettings, command: Sequence[str], run_id: str | None = None) -> list[str]:
    """One shell line for each node: to run here if the node is reached over SSH, else to run on the node.

    Args:
        settings: Settings of the launch.
        command: Command of every rank.
        run_id: Identifier of the run, the same on all nodes; by default a new one.

    Raises:
        ValueError: If the hosts contradict the other settings.
    """
    settings, hosts = nodes_of(settings)
    ssh, run_id = settings.torchrun.ssh, run_id or local.new_run_id(settings)
    master = hosts[0].rpartition("@")[2] if hosts else _UNKNOWN
    before = [f"cd {shlex.quote(settings.torchrun.folder or str(Path.cwd()))}"]
    if settings.modules:  # a non-login shell over SSH may lack the command `module`
        before.append("{ command -v module >/dev/null || . /etc/profile; }")
    made = []
    for rank in range(settings.nodes):
        words = settings.node_command(command, node_rank=str(rank), master=master, run_id=run_id)
        text = line(settings, words, *before)
        if ssh and hosts:
            made.append(f"{ssh} {shlex.quote(hosts[rank])} {shlex.quote(f'{_LISTEN} {text} </dev/null 3<&-')}")
        else:
            made.append(shlex.join(["bash", "-c", text]))
    return made


def nodes_of(settings: LaunchSettings) -> tuple[LaunchSettings, list[str]]:
    """The settings with the numbers of nodes and processes that follow from the hosts, and the hosts.

    Raises:
        ValueError: If the hosts contradict the other settings.
    """
    hosts = settings.torchrun.hosts
    if settings.torchrun.hostfile is not None:
        if hosts:
            raise ValueError("torchrun.hosts and torchrun.hostfile must not both be given")
        hosts, slots = _read_hostfile(Path(settings.torchrun.hostfile))
        if slots is not None:
            if settings.processes_per_node not in (None, slots):
                raise ValueError(
                    f"processes_per_node must agree with {settings.torchrun.hostfile}: slots={slots}, got "
                    f"{settings.processes_per_node}"
                )
            settings = replace(settings, processes_per_node=slots)
    if twice := sorted({host for host in hosts if hosts.count(host) > 1}):
        raise ValueError(f"each host must be named once, got {', '.join(twice)} more than once")
    if hosts and settings.nodes not in (1, len(hosts)):
        raise ValueError(f"nodes must be the number of hosts, {len(hosts)}, got {settings.nodes}")
    return replace(settings, nodes=len(hosts) or settings.nodes), hosts


def _read_hostfile(file: Path) -> tuple[list[str], int | None]:
    """The hosts of a file, and the number of slots that they share (None if not given)."""
    try:
        content = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"torchrun.hostfile cannot be read: {error}") from None
    hosts: list[str] = []
    slots: set[int | None] = set()
    for entry in filter(None, content):
        match = re.fullmatch(r"(\S+)(?:\s+slots\s*=\s*([1-9]\d*))?", entry)
        if match is None:
            raise ValueError(f"{file}: a line must be `name` or `name slots=8`, got {entry!r}")
        hosts.append(match[1])
        slots.add(int(match[2]) if match[2] else None)
    if not hosts:
        raise ValueError(f"{file} names no host")
    if len(slots) > 1:
        raise ValueError(f"{file}: slots must be the same for all hosts, got {', '.join(map(str, slots))}")
    return hosts, slots.pop()


class _Nodes:
    """The connections to all nodes: their output, their exit codes, and the signals to them."""

    def __init__(self, settings: LaunchSettings, hosts: Sequence[str], node_lines: Sequence[str]) -> None:
        self.settings, self.hosts = settings, hosts
        self._enough = settings.min_nodes or settings.nodes
        self._children: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._printing = threading.Lock()
        self._deadline: float | None = None  # when the remaining nodes are asked to end, later: when they are killed
        self._asked = False
        self._lost = 0  # exit code of the lost node that made the others end
        try:
            for host, node_line in zip(hosts, node_lines, strict=True):
                self._start(host, node_line)
        except BaseException:
            self._give_up()
            raise

    def _start(self, host: str, node_line: str) -> None:
        child = subprocess.Popen(
            shlex.split(node_line),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's signals would end the connection instead of the run
        )
        self._children.append(child)
        self._readers.append(threading.Thread(target=self._print, args=(host, child), daemon=True))
        self._readers[-1].start()

    def wait(self) -> int:
        """Wait for all nodes; when too few are left to continue, ask them to end."""
        with local.forwarded(self._send):
            while any(code is None for code in self._codes()):
                time.sleep(0.1)
                self._look()
        for reader in self._readers:
            reader.join(5)
        codes = [local.exit_code(child.wait()) for child in self._children]
        for host, code in zip(self.hosts, codes, strict=True):
            if code:
                reason = ": it cannot be reached, or the connection was lost" if code == UNREACHABLE else ""
                print(f"evertune launch torchrun: {host} ended with exit code {code}{reason}", file=sys.stderr)
        # The node of rank 0 ends with the command's result, the others with 0: the highest code is the result.
        decided = [code for code in codes if code in (*DECIDED, PREEMPTED)]
        if self._lost or any(decided):
            return self._lost or max(decided)
        return 0 if len(decided) >= self._enough else max(codes)

    def _codes(self) -> list[int | None]:
        return [child.poll() for child in self._children]

    def _look(self) -> None:
        codes, grace, now = self._codes(), self.settings.grace, time.monotonic()
        failed = [code for code in codes if code]
        # An unreachable node does not come back, so the others are asked to end at once. After any other failure they
        # get `grace` seconds to end by themselves.
        if self._deadline is None and len(codes) - len(failed) < self._enough:
            self._deadline = now + (0 if UNREACHABLE in failed else grace)
        if self._deadline is not None and now >= self._deadline:
            if self._asked:
                self._give_up()
            else:
                self._lost = local.exit_code(failed[0])
                self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        self._asked, self._deadline = True, time.monotonic() + self.settings.grace + _MARGIN
        for child in self._children:
            assert child.stdin is not None
            with suppress(BrokenPipeError):
                os.write(child.stdin.fileno(), f"{number.name.removeprefix('SIG')}\n".encode())

    def _give_up(self) -> None:
        for child in self._children:
            child.kill()

    def _print(self, host: str, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        with child.stdout:
            for said in child.stdout:
                with self._printing:
                    print(f"{host}: {said.rstrip()}", flush=True)
