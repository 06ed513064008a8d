"""The supervisor of a node, with real ranks: how runs end, and what becomes of ranks that crash, hang and stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from evertune.utils.processes import process_state

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300  # of a whole run, on a machine that has other things to do


class Node:
    """A supervisor that runs, and what it prints."""

    def __init__(self, folder: Path, options: list[str], arguments: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.temporary = folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self.printed = folder / "printed"
        command = [sys.executable, "-m", "evertune.launch.supervisor.node", *options, "--", *arguments]
        with self.printed.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, "TMPDIR": str(self.temporary)}
            )

    @property
    def output(self) -> str:
        return self.printed.read_text()

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)


class Run:
    """A run of ``tests.helpers.node_worker`` on nodes that are all this machine."""

    def __init__(self, folder: Path, behaviour: str, steps: int = 10, nodes: int = 1, **options: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.logs, self.nodes = folder, folder / "logs" / "test", nodes
        self.state = folder / "state"
        self.state.mkdir()
        self.arguments = [behaviour, str(self.state), str(steps)]
        settings: dict[str, object] = {
            "processes": 2 // nodes,
            "nodes": nodes,
            "master": f"127.0.0.1:{port}",
            "run_id": "test",
            "log_dir": folder / "logs",
            "max_restarts": 1,
            "grace": 60,
            "hang_timeout": 6,
            "silence_timeout": 200,
            "module": "tests.helpers.node_worker",
        }
        settings |= options
        self.options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self.started: list[Node] = []

    def start(self, node: int = 0) -> Node:
        started = Node(self.folder / f"node-{node}", [*self.options, "--node_rank", str(node)], self.arguments)
        self.started.append(started)
        return started

    def step(self, rank: int = 0) -> int:
        path = self.state / f"step-{rank}"
        return int(path.read_text() or 0) if path.exists() else 0

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.state.glob("pid-*")]

    def log(self, rank: int) -> str:
        return (self.logs / f"rank-{rank}.log").read_text()


@contextmanager
def running(run: Run) -> Iterator[Run]:
    try:
        yield run
    finally:
        for node in run.started:
            node.process.kill()  # and with it all that it has started
            node.process.wait()


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def gone(pid: int) -> bool:
    return process_state(pid)[0] in ("", "Z")


def test_decision_is_the_exit_code_and_no_crash(tmp_path: Path) -> None:
    with running(Run(tmp_path, "code-4")) as run:
        node = run.start()
        assert node.wait() == 4
        assert node.output.count("starts code-4") == 2, node.output
        assert "[rank 0]: starts code-4\n" in node.output
        assert "[rank 1]: starts code-4\n" in node.output
        assert run.log(1) == "starts code-4\n"
        assert not list(node.temporary.glob("evertune-*"))


@pytest.mark.slow
@pytest.mark.parametrize("code", [2, 3, 5, 75])
def test_decisions_pass_through(tmp_path: Path, code: int) -> None:
    with running(Run(tmp_path, f"code-{code}", processes=1)) as run:
        node = run.start()
        assert node.wait() == code
        assert run.log(0) == f"starts code-{code}\n"


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["crash-once", "killed"])
def test_crash_starts_all_ranks_over(tmp_path: Path, behaviour: str) -> None:
    with running(Run(tmp_path, behaviour)) as run:
        node = run.start()
        assert node.wait() == 0, node.output
        assert [run.log(rank).count("starts") for rank in (0, 1)] == [2, 2]
        assert [run.log(rank).count("ends") for rank in (0, 1)] == [1, 1]


@pytest.mark.slow
def test_crash_loop_ends(tmp_path: Path) -> None:
    with running(Run(tmp_path, "crash")) as run:
        node = run.start()
        assert node.wait() == 1
        assert "RuntimeError: every time" in node.output
        assert "failed too often" in node.output
        assert run.log(0).count("starts") == 2


@pytest.mark.slow
def test_stopped_rank_is_named_and_started_over(tmp_path: Path) -> None:
    with running(Run(tmp_path, "stopped", hang_timeout=16)) as run:
        node = run.start()
        assert node.wait() == 0, node.output
        named = [line for line in node.output.splitlines() if "furthest behind" in line]
        assert len(named) == 1
        assert "rank 1 " in named[0]
        assert "in step 4, state T" in named[0]
        assert "_happen (node_worker.py" in named[0]
        (stack,) = run.logs.glob("hang-*/rank-1.txt")
        assert "in _happen" in stack.read_text()


@pytest.mark.slow
def test_rank_that_sleeps_is_named_and_started_over(tmp_path: Path) -> None:
    with running(Run(tmp_path, "sleeps", nodes=2)) as run:
        nodes = [run.start(0), run.start(1)]
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
        assert "in _sleep_for_ever" in _stacks_of(run, 1)
        assert "in all_reduce" in _stacks_of(run, 0)
        named = [line for node in nodes for line in node.output.splitlines() if "furthest behind" in line]
        assert any("rank 1 " in line and "_sleep_for_ever (node_worker.py" in line for line in named), named


def _stacks_of(run: Run, rank: int) -> str:
    return "".join(path.read_text() for path in run.logs.glob(f"hang-*/rank-{rank}.txt"))


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_request_to_stop_reaches_the_ranks(tmp_path: Path, to_all: bool) -> None:
    with running(Run(tmp_path, "train", steps=100_000)) as run:
        node = run.start()
        wait_for(lambda: run.step() > 2, "no step")
        if to_all:  # as some schedulers do
            for pid in {process_state(pid)[1] for pid in run.pids()}.union(run.pids()):
                os.kill(pid, signal.SIGUSR2)
        node.process.send_signal(signal.SIGUSR2 if to_all else signal.SIGTERM)
        assert node.wait() == 75
        assert "killed" not in node.output
        wait_for(lambda: all(gone(pid) for pid in run.pids()), "a rank is left")


@pytest.mark.slow
def test_request_to_stop_before_the_ranks_are_there(tmp_path: Path) -> None:
    with running(Run(tmp_path, "train")) as run:
        node = run.start()
        wait_for(lambda: "torch.distributed.run" in node.output, "no torchrun")
        node.process.send_signal(signal.SIGTERM)
        assert node.wait() == 75
        assert not run.pids()


@pytest.mark.slow
def test_ranks_that_do_not_stop_are_killed_after_the_grace(tmp_path: Path) -> None:
    with running(Run(tmp_path, "sleeps", hang_timeout=1_000, grace=2)) as run:
        node = run.start()
        wait_for((run.state / "happened").exists, "nothing has happened")
        node.process.send_signal(signal.SIGTERM)
        assert node.wait() == 75
        assert "have not ended 2 s after" in node.output
        wait_for(lambda: all(gone(pid) for pid in run.pids()), "a rank is left")


@pytest.mark.slow
def test_interrupt_ends_everything(tmp_path: Path) -> None:
    with running(Run(tmp_path, "train", steps=100_000)) as run:
        node = run.start()
        wait_for(lambda: run.step() > 2, "no step")
        node.process.send_signal(signal.SIGINT)
        assert node.wait() == 130
        wait_for(lambda: all(gone(pid) for pid in run.pids()), "a rank is left")


@pytest.mark.slow
def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with running(Run(tmp_path, "train", steps=100_000)) as run:
        node = run.start()
        wait_for(lambda: run.step() > 2, "no step")
        ranks = run.pids()
        torchrun = {process_state(pid)[1] for pid in ranks}
        assert len(torchrun) == 1
        node.process.kill()
        wait_for(lambda: all(gone(pid) for pid in (*ranks, *torchrun)), "a process is left")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_lost_node_is_waited_for(tmp_path: Path, killed: int) -> None:
    with running(Run(tmp_path, "train", steps=200, nodes=2, max_restarts=2)) as run:
        nodes = [run.start(0), run.start(1)]
        wait_for(lambda: run.step(0) > 2 and run.step(1) > 2, "no step")
        nodes[killed].process.kill()
        nodes[killed].process.wait()
        time.sleep(5)
        assert nodes[1 - killed].process.poll() is None
        nodes[killed] = run.start(killed)
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
        assert [run.log(rank).count("ends") for rank in (0, 1)] == [1, 1]


@pytest.mark.slow
def test_node_goes_on_without_the_other(tmp_path: Path) -> None:
    with running(Run(tmp_path, "train", steps=200, nodes=2, min_nodes=1, max_restarts=2)) as run:
        nodes = [run.start(0), run.start(1)]
        wait_for(lambda: run.step(0) > 2 and run.step(1) > 2, "no step")
        nodes[1].process.kill()
        assert nodes[0].wait() == 0, nodes[0].output
        assert "ends" in run.log(0)


@pytest.mark.slow
def test_node_that_fails_ends_the_others(tmp_path: Path) -> None:
    with running(Run(tmp_path, "crash", nodes=2, max_restarts=0)) as run:
        nodes = [run.start(0), run.start(1)]
        assert [node.wait() for node in nodes] == [1, 1]
