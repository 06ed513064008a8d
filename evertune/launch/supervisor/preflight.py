"""Checks all nodes before training: that they join, are alike and share folders, and how fast the network is.

Runs on all nodes at the same time, one process per node::

    python -m evertune.launch.supervisor.preflight --nodes 2 --node_rank 0 --processes 8 --master a:29500 --run_id 1 \\
        --config stream.yaml --shared runs

The exit code is 0 when training can start, and 1 on all nodes, with the reasons, when it cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.launch.supervisor.facts import Facts, compare, read_facts
from evertune.utils.terminal import console

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_SIZES = (1_000_000, 64_000_000)  # bytes reduced: one size for latency, one for bandwidth
_REPEATS = 3  # timed reductions of each size
_SEEN_WITHIN = 15.0  # seconds until a file must be visible on another node
_ANSWER = 120.0  # seconds for a node to answer
_LOOK = (
    "Check there whether it is running, `getent hosts {host}` (name resolution) and `nc -vz {host} {port}` (port, "
    "firewall); with several networks, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (launch.interface) to the network "
    "interface between the nodes"
)


class _FailedError(Exception):
    """Training cannot start."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = list(reasons)


class _Meeting:
    """Exchanges JSON messages between the nodes, in a store that node 0 hosts at the master's address."""

    def __init__(self, store: Store, rank: int) -> None:
        self.store, self.rank = store, rank
        self.facts: dict[int, Facts] = {}  # of the nodes that have joined; known to node 0 only
        self.nodes = [rank]
        self.gpus = False  # on every node

    def post(self, what: str, value: Any) -> None:
        self.store.set(f"{what}/{self.rank}", json.dumps(value))

    def has(self, what: str, rank: int) -> bool:
        return bool(self.store.check([f"{what}/{rank}"]))

    def read(self, what: str, rank: int, seconds: float = _ANSWER) -> Any:
        """What a node has posted, or posts within some seconds; raises TimeoutError."""
        if not _within(seconds, lambda: self.has(what, rank)):
            raise TimeoutError
        return json.loads(self.store.get(f"{what}/{rank}"))

    def collect(self, what: str) -> tuple[dict[int, Any], list[str]]:
        """On node 0: what all nodes have posted, and a problem for each that has not."""
        answers: dict[int, Any] = {}
        problems = []
        end = time.monotonic() + _ANSWER
        for rank in self.nodes:
            try:
                answers[rank] = self.read(what, rank, end - time.monotonic())
            except TimeoutError:
                problems.append(f"{self.who(rank)}: no answer within {_ANSWER:.0f} s ({what})")
        return answers, problems

    def agree(self, what: str, problems: Sequence[str], seconds: float = 2 * _ANSWER, **more: Any) -> dict[str, Any]:
        """Share the decision of node 0, and more values; raises on all nodes if there are problems."""
        if self.rank == 0:
            self.post(f"{what}, decided", {"problems": problems, **more})
        try:
            answer: dict[str, Any] = self.read(f"{what}, decided", 0, seconds)
        except TimeoutError:
            raise _FailedError([f"node 0 does not answer ({what}): does another run use this port?"]) from None
        if answer["problems"]:
            raise _FailedError(answer["problems"])
        return answer

    def leave(self) -> None:
        """Leave; node 0 leaves last, as it hosts the store."""
        self.post("left", True)
        if self.rank == 0:
            _within(10, lambda: all(self.has("left", rank) for rank in self.nodes))

    def who(self, rank: int) -> str:
        return self.facts[rank].called(rank) if rank in self.facts else f"node {rank} (host {socket.gethostname()})"


def _open(options: argparse.Namespace) -> _Meeting:
    """Open the store on node 0; connect to it from the others."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    host, port = options.master
    rank: int = options.node_rank
    who = f"node {rank} (host {socket.gethostname()})"
    errors: list[str] = []

    def reached() -> bool:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return True
        except OSError as error:
            errors.append(error.strerror or str(error))
            return False

    if rank > 0 and not _within(options.timeout, reached):
        raise _FailedError(
            [
                f"{who} cannot reach node 0 at {host}:{port} within {options.timeout:.0f} s: {errors[-1]}. "
                + _LOOK.format(host=host, port=port)
            ]
        )
    try:
        wait = timedelta(seconds=_ANSWER)
        store = TCPStore(host, port, is_master=rank == 0, wait_for_workers=False, timeout=wait)
    except DistError as error:
        what = f"open port {port}: {error}. If another run uses it, choose another port"
        if rank > 0:
            what = f"talk to node 0 at {host}:{port}: {error}. Check whether another program uses this port"
        raise _FailedError([f"{who} cannot {what}"]) from None
    if store.add(f"rank/{rank}", 1) > 1:
        raise _FailedError([f"{who}: another node also has rank {rank}: give each node its own --node_rank"])
    return _Meeting(store, rank)


def _gather(meeting: _Meeting, facts: Facts, options: argparse.Namespace) -> list[str]:
    """Wait for the nodes and compare them; node 0 returns warnings."""
    problems: list[str] = []
    warnings: list[str] = []
    meeting.post("facts", asdict(replace(facts, clock=time.time())))
    if meeting.rank == 0:

        def all_here() -> bool:
            for rank in range(options.nodes):
                if rank not in meeting.facts and meeting.has("facts", rank):
                    # The time until the message is read counts as a difference; only seconds matter here.
                    one = Facts(**meeting.read("facts", rank))
                    meeting.facts[rank] = replace(one, clock=one.clock - time.time())
            return len(meeting.facts) == int(options.nodes)

        host, port = options.master
        if not _within(options.timeout, all_here):
            missing = ", ".join(str(rank) for rank in range(options.nodes) if rank not in meeting.facts)
            text = (
                f"node {missing}: has not connected to {host}:{port} within {options.timeout:.0f} s. "
                f"{_LOOK.format(host=host, port=port)}"
            )
            enough = options.min_nodes is not None and len(meeting.facts) >= options.min_nodes
            (warnings if enough else problems).append(text)
        differences, more = compare(meeting.facts, options.processes)
        problems, warnings = problems + differences, warnings + more
        meeting.nodes = sorted(meeting.facts)
    decided = {"nodes": meeting.nodes, "gpus": all(one.gpus for one in meeting.facts.values())}
    seconds = options.timeout + _ANSWER
    answer = meeting.agree("comparison", problems, seconds, **decided)
    meeting.nodes, meeting.gpus = answer["nodes"], answer["gpus"]
    if meeting.rank not in meeting.nodes:
        raise _FailedError([f"{meeting.who(meeting.rank)} joined too late: the others have started without it"])
    return warnings


def _check_folders(meeting: _Meeting, folders: Sequence[str]) -> None:
    """Check that a file of node 0 in each folder is visible on every node, and a file of every node on node 0."""
    rank = meeting.rank
    token = str(meeting.agree("token", [], token=uuid.uuid4().hex)["token"])
    ours = {folder: _file(folder, token, rank) for folder in folders}
    problems = []
    try:
        if rank == 0:
            for folder, file in ours.items():
                if error := _write(file, token):
                    problems.append(f"{meeting.who(0)}: cannot write to the shared folder {folder}: {error}")
        # The others look for the files of node 0 only after all of them have been written.
        meeting.agree("files", problems)
        if rank > 0:
            seen = {folder: _see(_file(folder, token, 0), token) or _write(ours[folder], token) for folder in folders}
            meeting.post("folders", seen)
        else:
            meeting.post("folders", dict.fromkeys(folders))
            answers, problems = meeting.collect("folders")
            for other, answer in answers.items():
                for folder in folders:
                    error = answer[folder] or _see(_file(folder, token, other), token)
                    if error:
                        problems.append(
                            f"{meeting.who(other)}: does not share the folder {folder} with node 0: {error}"
                        )
        meeting.agree("shared folders", problems)
    finally:
        for file in ours.values():
            file.unlink(missing_ok=True)


def _file(folder: str, token: str, rank: int) -> Path:
    return Path(folder) / f".evertune-preflight-{token}-{rank}"


def _write(file: Path, token: str) -> str | None:
    """Write a file; returns what went wrong."""
    try:
        file.write_text(token)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _see(file: Path, token: str) -> str | None:
    """Wait for a file to appear; returns what went wrong."""
    error = ""

    def seen() -> bool:
        nonlocal error
        try:
            error = "" if file.read_text() == token else "the file has other content"
        except OSError as problem:
            error = problem.strerror or str(problem)
        return not error

    return None if _within(_SEEN_WITHIN, seen) else f"{error} ({file.resolve()})"


def _check_network(meeting: _Meeting) -> dict[int, list[float]]:
    """All-reduce tensors over all nodes; returns the seconds for each size, by node, on node 0."""
    if len(meeting.nodes) == 1:
        return {}
    try:
        meeting.post("network", {"seconds": _time_reductions(meeting)})
    except Exception as error:  # report any error of a network library to the other nodes
        meeting.post("network", {"error": f"{type(error).__name__}: {error}"})
    answers: dict[int, Any] = {}
    problems: list[str] = []
    if meeting.rank == 0:
        answers, problems = meeting.collect("network")
        problems += [
            f"{meeting.who(rank)}: the all-reduce failed: {answer['error']}. With several networks, set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (launch.interface) to the interface between the nodes"
            for rank, answer in answers.items()
            if "error" in answer
        ]
    meeting.agree("network", problems)
    return {rank: answer["seconds"] for rank, answer in answers.items()}


def _time_reductions(meeting: _Meeting) -> list[float]:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    dist.init_process_group(
        "nccl" if meeting.gpus else "gloo",
        store=PrefixStore("all-reduce", meeting.store),
        rank=meeting.nodes.index(meeting.rank),
        world_size=len(meeting.nodes),
        timeout=timedelta(seconds=_ANSWER / 2),
    )
    try:
        times = []
        for size in _SIZES:
            tensor = torch.zeros(size // 4, device="cuda:0" if meeting.gpus else "cpu")
            dist.all_reduce(tensor)  # untimed: the first one opens the connections
            float(tensor[0])  # synchronizes with the GPU
            start = time.perf_counter()
            for _ in range(_REPEATS):
                dist.all_reduce(tensor)
            float(tensor[0])
            times.append((time.perf_counter() - start) / _REPEATS)
        return times
    finally:
        dist.destroy_process_group()


def _show(meeting: _Meeting, seconds: Mapping[int, Sequence[float]]) -> None:
    """Print a table with a line for each node."""
    from rich.table import Table

    table = Table(title=f"{len(meeting.nodes)} nodes", title_justify="left")
    for name in ("node", "host", "GPUs", "free memory", "/dev/shm", "clock"):
        table.add_column(name)
    for size in _SIZES if seconds else ():
        table.add_column(f"all-reduce {size // 10**6} MB ({'NCCL' if meeting.gpus else 'gloo'})", justify="right")
    n = len(meeting.nodes)
    for rank in meeting.nodes:
        one = meeting.facts[rank]
        row = [
            str(rank),
            one.host,
            one.gpu_names,
            _gib(one.free_memory),
            _gib(one.shared_memory),
            f"{one.clock:+.1f} s",
        ]
        for size, took in zip(_SIZES, seconds.get(rank, ()), strict=False):
            bandwidth = 2 * (n - 1) / n * size / took / 1e9  # of each node's link, for a ring all-reduce
            row.append(f"{took * 1e3:.1f} ms, {bandwidth:.2f} GB/s")
        table.add_row(*row)
    screen = console()
    (screen if screen.is_terminal else console(width=160)).print(table)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _within(seconds: float, is_so: Callable[[], bool]) -> bool:
    """Poll until a condition holds; False if it does not within some seconds."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"must be host:port, as in node-0:29500, got {text!r}")
    return host.strip("[]"), int(port)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evertune.launch.supervisor.preflight", description="Check every node before training."
    )
    parser.add_argument("--nodes", type=int, required=True, help="how many there are")
    parser.add_argument("--node_rank", type=int, required=True, help="which one this is, from 0")
    parser.add_argument("--processes", type=int, default=1, help="on each node")
    parser.add_argument("--master", type=_address, required=True, help="host:port of node 0")
    parser.add_argument("--run_id", default="", help="the same on all nodes")
    parser.add_argument("--config", action="extend", nargs="+", default=[], help="files to be alike on all nodes")
    parser.add_argument("--shared", action="extend", nargs="+", default=[], help="folders that all nodes must see")
    parser.add_argument("--min_nodes", type=int, help="continue with this many nodes if others do not join in time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for the nodes")
    options = parser.parse_args(arguments)
    if not 0 <= options.node_rank < options.nodes:
        parser.error(f"--node_rank must be from 0 to {options.nodes - 1}, got {options.node_rank}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every node; runs on all of them at the same time.

    Args:
        arguments: Arguments of the command line; by default those of the process.

    Returns:
        The exit code, the same on all nodes that have joined: 0 if training can start.
    """
    options = _options(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its warnings while nodes wait duplicate our own messages
    from torch.distributed import DistError

    facts = read_facts(options.run_id, options.config)
    try:
        meeting = _open(options)
        try:
            for warning in _gather(meeting, facts, options):
                print(f"preflight: warning: {warning}", flush=True)
            _check_folders(meeting, options.shared)
            seconds = _check_network(meeting)
            if meeting.rank == 0:
                _show(meeting, seconds)
        finally:
            meeting.leave()
    except _FailedError as failed:
        for reason in failed.reasons:
            print(f"preflight: {reason}", flush=True)
        return 1
    except DistError as error:
        print(f"preflight: the connection to node 0 was lost, see its output: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
