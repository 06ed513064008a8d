"""Two nodes on one machine: two network namespaces, joined by a cable that can be pulled."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "eth0"

_NAME = re.compile(r"evertune-(\d+)-\d+-node\d")
_counter = itertools.count()


def available() -> str | None:
    """Why there can be no namespaces here, or None."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"evertune-{os.getpid()}-{next(_counter)}-node0"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespaces here: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


class Nodes:
    """Two nodes, 0 and 1, with an address each and the network device ``INTERFACE`` between them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def run_on(self, node: int, command: Sequence[str], env: Mapping[str, str] | None = None, **settings: Any) -> Any:
        """Start a command on a node; its variables come over those of this process.

        The process has the command's own id: ``ip netns exec`` becomes the command.
        """
        environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE} | (env or {})
        return subprocess.Popen(["ip", "netns", "exec", self.names[node], *command], env=environment, **settings)

    def processes(self, node: int) -> list[int]:
        """The ids of all processes of a node."""
        return _processes(self.names[node])

    def cut(self, node: int) -> None:
        """Pull the cable: what is sent is lost, and no connection is closed."""
        _ip("-n", self.names[node], "link", "set", INTERFACE, "down")

    def restore(self, node: int) -> None:
        """Put the cable back. The device still has its address, and with it comes the route to the other node."""
        _ip("-n", self.names[node], "link", "set", INTERFACE, "up")


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Set up two nodes; at the end kill what still runs there and remove them."""
    _remove_leftovers()
    number = next(_counter)
    names = [f"evertune-{os.getpid()}-{number}-node{node}" for node in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        ends = [word for name in names for word in ("name", INTERFACE, "netns", name)]
        _ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
        yield Nodes(names)
    finally:
        for name in names:
            _remove(name)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _names() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _processes(name: str) -> list[int]:
    return [int(line) for line in _ip("netns", "pids", name).split()]


def _remove(name: str) -> None:
    if name not in _names():
        return
    for _ in range(10):  # until the children of those killed are gone, too
        running = _processes(name)
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not running:
            break
    _ip("netns", "delete", name)


def _remove_leftovers() -> None:
    """Remove the nodes of test processes that were killed."""
    for name in _names():
        found = _NAME.fullmatch(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(name)
