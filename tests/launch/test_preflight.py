"""Every node is looked at before training, and says what is wrong with which."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from evertune.launch.supervisor.facts import Facts, compare, read_facts
from evertune.launch.supervisor.preflight import _FailedError, _Meeting, main

HOST = socket.gethostname()
GOOD = Facts(
    host="a",
    run_id="7",
    software={"Python": "3.11.9", "torch": "2.9.0", "deepspeed": None, "CUDA": "12.8"},
    configs={"stream.yaml": "1234567890"},
    gpus=["H100"] * 4,
    driver="550.1",
    free_memory=2**36,
    shared_memory=2**34,
    open_files=65536,
)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """The preflight on several nodes, each a process in a folder of its own."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port, self.folder = port, folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, rank: int, *options: str, nodes: int = 2, timeout: float = 250) -> None:
        here = self.folder / str(rank)
        here.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "evertune.launch.supervisor.preflight",
            "--nodes",
            str(nodes),
            "--node_rank",
            str(rank),
        ]
        command += ["--master", f"127.0.0.1:{self.port}", "--timeout", str(timeout), "--run_id", "7", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        out = (here / "out").open("w")
        self.processes.append(
            subprocess.Popen(command, cwd=here, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)
        )
        out.close()

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes and outputs, in the order of the starts."""
        codes = [process.wait(300) for process in self.processes]
        return codes, [(self.folder / str(rank) / "out").read_text() for rank in range(len(codes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def nodes(port: int, tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(port, tmp_path)
    yield made
    made.kill()


def test_what_node_0_answers_is_not_what_it_decides() -> None:
    store = HashStore()
    first, second = _Meeting(store, 0), _Meeting(store, 1)
    first.post("network", {"seconds": [0.1]})
    with pytest.raises(_FailedError, match="node 0 does not answer"):
        second.agree("network", [], seconds=0.1)
    first.agree("network", [])
    assert second.agree("network", []) == {"problems": []}


def test_good_nodes(nodes: Nodes, port: int, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "stream.yaml").write_text("a: 1")
    for rank in (1, 0):
        nodes.start(rank, "--config", "../stream.yaml", "--shared", "../shared", str(tmp_path))
    codes, outputs = nodes.end()
    TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=10))  # torchrun meets there next
    assert codes == [0, 0]
    assert outputs[1].replace("preflight: warning", "").count("preflight:") == 0
    lines = [line for line in outputs[0].splitlines() if HOST in line and "GB/s" in line]
    assert [line.split()[1] for line in lines] == ["0", "1"]
    assert all(line.count(" ms, ") == 2 for line in lines)
    assert "all-reduce 64 MB (gloo)" in outputs[0]
    assert list(shared.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "shared", "stream.yaml"]


def test_another_content_of_a_file(nodes: Nodes, tmp_path: Path) -> None:
    for rank in range(2):
        nodes.start(rank, "--config", "stream.yaml")
        (tmp_path / str(rank) / "stream.yaml").write_text(f"seed: {rank}")
    codes, outputs = nodes.end()
    assert codes == [1, 1]
    for output in outputs:
        assert f"preflight: node 1 (host {HOST}): stream.yaml differs from that on node 0 (sha256 " in output


@pytest.mark.slow
def test_a_folder_that_one_node_does_not_see(nodes: Nodes, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank) / "runs").mkdir(parents=True)
        nodes.start(rank, "--shared", "runs")
    codes, outputs = nodes.end()
    assert codes == [1, 1]
    for output in outputs:
        assert f"preflight: node 1 (host {HOST}): does not share the folder runs with node 0: No such file" in output
        assert "all-reduce" not in output
    assert [list((tmp_path / str(rank) / "runs").iterdir()) for rank in range(2)] == [[], []]


def test_nobody_else_comes(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nodes", "3", "--node_rank", "0", "--timeout", "0.2", "--master", f"127.0.0.1:{port}"]) == 1
    said = capsys.readouterr().out
    assert (
        f"preflight: node 1, 2: has not connected to 127.0.0.1:{port} within 0 s. Check there whether it is running, "
        in said
    )
    assert f"`nc -vz 127.0.0.1 {port}`" in said
    assert "GLOO_SOCKET_IFNAME" in said


@pytest.mark.slow
@pytest.mark.parametrize("min_nodes", [2, 3])
def test_one_of_three_does_not_come(nodes: Nodes, port: int, min_nodes: int) -> None:
    for rank in (1, 0):
        nodes.start(rank, "--min_nodes", str(min_nodes), nodes=3, timeout=60)
    codes, outputs = nodes.end()
    missing = f"node 2: has not connected to 127.0.0.1:{port} within 60 s"
    if min_nodes == 2:
        assert codes == [0, 0]
        assert f"preflight: warning: {missing}" in outputs[0]
        assert "2 nodes" in outputs[0]
    else:
        assert codes == [1, 1]
        assert all(f"preflight: {missing}" in output for output in outputs)


@pytest.mark.slow
def test_node_0_dies_under_way(nodes: Nodes, port: int, tmp_path: Path) -> None:
    nodes.start(0, nodes=3, timeout=300)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=200))
    nodes.start(1, nodes=3, timeout=300)
    store.wait(["facts/1"], timedelta(seconds=200))
    nodes.processes[0].kill()
    assert nodes.processes[1].wait(100) == 1
    assert "preflight: the connection to node 0 was lost, see its output" in (tmp_path / "1/out").read_text()


def test_the_master_cannot_be_reached(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--nodes", "2", "--node_rank", "1", "--timeout", "0.2", "--master"]
    assert main([*arguments, f"127.0.0.1:{port}"]) == 1
    said = capsys.readouterr().out
    assert f"preflight: node 1 (host {HOST}) cannot reach node 0 at 127.0.0.1:{port} within 0 s: Connection ref" in said
    assert main([*arguments, f"no-such-host.invalid:{port}"]) == 1
    assert "no-such-host.invalid" in capsys.readouterr().out


def test_a_port_in_use(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    other = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert main(["--nodes", "1", "--node_rank", "0", "--master", f"127.0.0.1:{port}"]) == 1
    assert f"cannot open port {port}" in capsys.readouterr().out
    assert other.port == port


def test_one_node(port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--nodes", "1", "--node_rank", "0", "--master", f"127.0.0.1:{port}", "--shared"]
    assert main([*arguments, str(tmp_path)]) == 0
    assert main([*arguments, str(tmp_path / "none")]) == 1
    said = capsys.readouterr().out
    assert f"cannot write to the shared folder {tmp_path / 'none'}: No such file or directory" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2", "--node_rank", "2", "--master", "a:1"], "--node_rank must be from 0 to 1, got 2"),
        (["--nodes", "2", "--node_rank", "1", "--master", "a"], "must be host:port, as in node-0:29500, got 'a'"),
    ],
)
def test_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "problems", "warnings"),
    [
        (GOOD, [], []),
        (replace(GOOD, run_id="8"), ["belongs to run 8, node 0 to 7"], []),
        (
            replace(GOOD, software={"Python": "3.12.1", "torch": "2.9.0", "deepspeed": "0.19.2", "CUDA": None}),
            [
                "Python 3.12.1, node 0 has 3.11.9",
                "deepspeed 0.19.2, node 0 has none",
                "CUDA is not installed, node 0 has 12.8",
            ],
            [],
        ),
        (
            replace(GOOD, configs={"stream.yaml": "abcdefghijkl"}),
            ["stream.yaml differs from that on node 0 (sha256 abcdefgh, 12345678)"],
            [],
        ),
        (replace(GOOD, configs={"stream.yaml": None}), ["cannot read stream.yaml"], []),
        (
            replace(GOOD, gpus=["H100", "A100"]),
            ["has 2 GPUs for 4 processes"],
            ["GPUs 1 x H100, 1 x A100, node 0 has 4 x H100"],
        ),
        (replace(GOOD, gpus=[]), ["has 0 GPUs for 4 processes"], ["GPUs none, node 0 has 4 x H100"]),
        (replace(GOOD, clock=-61.0), [], ["its clock is 61 s behind that of node 0"]),
        (replace(GOOD, clock=9.0), [], ["its clock is 9 s ahead of that of node 0"]),
        (replace(GOOD, clock=1.0, free_memory=1), [], []),
        (
            replace(GOOD, driver="535.0", open_files=1024, shared_memory=2**26),
            [],
            [
                "driver 535.0, node 0 has 550.1",
                "open files (ulimit -n) 1024, node 0 has 65536",
                "/dev/shm has 64 MiB: DataLoader workers and NCCL need more",
            ],
        ),
    ],
)
def test_compare(other: Facts, problems: list[str], warnings: list[str]) -> None:
    found = compare({0: GOOD, 2: replace(other, host="c")}, processes=4)
    assert found == tuple([f"node 2 (host c): {text}" for text in texts] for texts in (problems, warnings))


def test_no_gpus_anywhere() -> None:
    one = replace(GOOD, gpus=[])
    assert compare({0: one, 1: one}, processes=4) == ([], [])


def test_facts_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1")
    facts = read_facts("7", [str(tmp_path / "a.yaml"), str(tmp_path / "none.yaml")])
    assert facts.host == HOST
    assert facts.software["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts.software["torch"]
    assert [bool(content) for content in facts.configs.values()] == [True, False]
    assert facts.free_memory > 2**20
    assert facts.open_files > 0
