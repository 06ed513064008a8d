"""`evertune launch torchrun` through a real SSH server on this machine, with supervisors that only take notes."""

from __future__ import annotations

import getpass
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from evertune.cli.launch import launch
from tests.cli.test_main import CONFIG, ROOT, check_outputs
from tests.launch.test_command import prepare

HOSTS = ("127.0.0.1", "127.0.0.2")
NOBODY = "127.0.0.3"
PATIENCE = 120.0
SUPERVISOR = """#!/bin/sh
# Notes what it gets, and ends with the exit code of the file `code-RANK`, or with 75 after SIGTERM.
while [ "$1" != --node_rank ]; do shift; done
note() { echo "$1" >> signals-$rank; }
rank=$2
trap 'note INT' INT; trap 'note USR2' USR2; trap 'note TERM; exit 75' TERM
env > environment-$rank
pwd > folder-$rank
echo "node $rank is up"
echo "a warning of $rank" >&2
echo $$ > pid-$rank
while ! [ -e code-$rank ]; do sleep 0.05; done
exit $(cat code-$rank)
"""


def until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The command that logs in on this machine, at a server with keys of its own."""
    server, keygen = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"), "ssh-keygen"
    if server is None or shutil.which("ssh") is None or shutil.which(keygen) is None:
        pytest.skip("sshd is not installed (apt-get install openssh-server)")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    listen = "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
    (folder / "sshd_config").write_text(
        f"{listen}HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\nStrictModes no\n"
        "UsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\nPort {port}\nUser {getpass.getuser()}\nIdentityFile {folder}/user\nIdentitiesOnly yes\n"
        f"StrictHostKeyChecking no\nUserKnownHostsFile {folder}/known\nBatchMode yes\nLogLevel ERROR\n"
    )
    needed = Path("/run/sshd")  # by root's sshd
    made = os.geteuid() == 0 and not needed.exists()
    if made:
        needed.mkdir()
    command = f"ssh -F {folder}/ssh_config"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([server, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while subprocess.run([*command.split(), HOSTS[1], "true"], check=False, capture_output=True).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"no SSH server can be run here: {(folder / 'log').read_text()}")
            time.sleep(0.1)
        yield command
    finally:
        process.terminate()
        process.wait()
        if made:
            needed.rmdir()


class Run:
    """A launch of two nodes."""

    def __init__(self, folder: Path, ssh: str) -> None:
        self.folder = folder
        self.supervisor = folder / "supervisor"
        self.supervisor.write_text(SUPERVISOR)
        self.supervisor.chmod(0o755)
        self.options = [f"--torchrun.ssh={ssh}", f"--torchrun.folder={folder}", f"--python={self.supervisor}"]
        self.options += ["--processes_per_node=1", "--grace=1", f"--torchrun.hosts={json.dumps(HOSTS)}"]

    def __call__(self, *options: str) -> int:
        return launch(["torchrun", *self.options, *options, "--", "fit"])

    def ends(self, *codes: int) -> None:
        """The supervisors end so."""
        for rank, code in enumerate(codes):
            (self.folder / f"code-{rank}").write_text(str(code))

    def signals(self, rank: int) -> list[str]:
        notes = self.folder / f"signals-{rank}"
        return notes.read_text().split() if notes.exists() else []

    def pids(self, *ranks: int) -> list[int]:
        """Of the supervisors, once they run."""
        files = [self.folder / f"pid-{rank}" for rank in ranks]
        until(lambda: all(file.exists() and file.read_text().endswith("\n") for file in files))
        return [int(file.read_text()) for file in files]

    def runs(self, rank: int) -> bool:
        return Path(f"/proc/{self.pids(rank)[0]}").exists()


@pytest.fixture
def run(tmp_path: Path, ssh: str) -> Iterator[Run]:
    made = Run(tmp_path, ssh)
    yield made
    for file in tmp_path.glob("pid-*"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def in_background(do: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=do)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("codes", "options", "code"),
    [
        ((0, 0), (), 0),
        ((75, 75), (), 75),
        ((4, 0), (), 4),
        ((0, 4), (), 4),  # rank 0 may be on any node
        ((0, 1), (), 1),
        ((1, 75), (), 75),
        ((0, 1), ("--min_nodes=1", "--nodes=2"), 0),
    ],
)
def test_the_exit_code_is_that_of_the_command(
    run: Run, codes: tuple[int, int], options: tuple[str, ...], code: int
) -> None:
    run.ends(*codes)
    assert run(*options) == code


def test_output_comes_with_the_name_of_the_node(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.ends(0, 0)
    assert run() == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "127.0.0.1: a warning of 0",
        "127.0.0.1: node 0 is up",
        "127.0.0.2: a warning of 1",
        "127.0.0.2: node 1 is up",
    ]


def test_each_node_has_the_folder_the_setup_and_the_variables(run: Run) -> None:
    run.ends(0, 0)
    options = ["--environment.NOTE=it's $5 & more", "--setup=['export SHELL_WAS=$0', 'true || false']"]
    assert run(*options, "--interface=lo") == 0
    for rank in range(2):
        assert (run.folder / f"folder-{rank}").read_text().strip() == str(run.folder)
        environment = (run.folder / f"environment-{rank}").read_text().splitlines()
        assert {"NOTE=it's $5 & more", "GLOO_SOCKET_IFNAME=lo", "OMP_NUM_THREADS=1"} <= set(environment)
        assert any(line.startswith("SHELL_WAS=") and len(line) > len("SHELL_WAS=") for line in environment)


def test_signals_reach_every_supervisor_once(run: Run) -> None:
    def send() -> None:
        run.pids(0, 1)
        for name in ("USR2", "INT"):
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
            until(lambda name=name: all(name in run.signals(rank) for rank in range(2)))  # type: ignore[misc]
        os.kill(os.getpid(), signal.SIGTERM)

    sender = in_background(send)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    assert run() == 75
    sender.join()
    assert [run.signals(rank) for rank in range(2)] == [["USR2", "INT", "TERM"]] * 2
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]


def test_supervisors_are_asked_to_end_when_the_launcher_is_killed(run: Run) -> None:
    launcher = multiprocessing.get_context("fork").Process(target=run)
    launcher.start()
    run.pids(0, 1)
    launcher.kill()
    launcher.join()
    until(lambda: not run.runs(0) and not run.runs(1))
    assert [run.signals(rank) for rank in range(2)] == [["TERM"]] * 2


def test_a_host_that_cannot_be_reached_ends_the_others(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(f"--torchrun.hosts={json.dumps([HOSTS[0], NOBODY])}") == 255  # no 75: it would end so again
    assert not (run.folder / "pid-0").exists() or run.signals(0) == ["TERM"]
    assert f"{NOBODY} ended with exit code 255: it cannot be reached" in capfd.readouterr().err


def test_the_others_go_on_without_a_host_they_can_spare(run: Run) -> None:
    def end() -> None:
        run.pids(0)
        time.sleep(2)
        assert run.runs(0)
        run.ends(0)

    ending = in_background(end)
    assert run(f"--torchrun.hosts={json.dumps([HOSTS[0], NOBODY])}", "--min_nodes=1", "--nodes=2") == 0
    ending.join()
    assert run.signals(0) == []


def test_a_node_that_fails_ends_the_others_after_the_grace(run: Run) -> None:
    (run.folder / "code-1").write_text("1")
    assert run() == 1
    assert run.signals(0) == ["TERM"]


def test_a_lost_connection_ends_its_supervisor_and_the_others(run: Run) -> None:
    def cut() -> None:
        run.pids(0, 1)
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = status.read_bytes().split(b"\0")
                if words[0] == b"ssh" and HOSTS[1].encode() in words and str(run.supervisor).encode() in words[-2]:
                    os.kill(int(status.parent.name), signal.SIGKILL)

    cutting = in_background(cut)
    assert run() == 137
    cutting.join()
    until(lambda: not run.runs(1))
    assert [run.signals(rank) for rank in range(2)] == [["TERM"]] * 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nodes_learn_a_stream_and_go_on_after_they_were_asked_to_stop(tmp_path: Path, ssh: str) -> None:
    prepare(tmp_path)
    hosts = "".join(f"{host} slots=1\n" for host in HOSTS)
    (tmp_path / "hosts").write_text(f"# the cluster\n{hosts}")
    (tmp_path / "cluster.yaml").write_text(
        f"{CONFIG}launch:\n  interface: lo\n  grace: 60\n  torchrun: {{hostfile: hosts, ssh: '{ssh}'}}\n"
        f"  environment: {{PYTHONPATH: '{ROOT}'}}\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "evertune", "launch", "torchrun", f"--port={port}", "--", "fit"]
    command += ["--config=cluster.yaml", "--trainer.strategy=ddp", "--data.batch_size=2", "--out=nodes"]
    command += ["--trainer.max_epochs=40", "--checkpoint_every_n_steps=10"]
    for code in (75, 0):  # asked to stop; started again
        with (tmp_path / "output").open("w") as output:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
        try:
            if code:
                until(lambda: any(tmp_path.glob("nodes/run/checkpoints-*/*")), 4 * PATIENCE)
                launcher.send_signal(signal.SIGUSR2)
            assert launcher.wait(4 * PATIENCE) == code, (tmp_path / "output").read_text()[-6000:]
        finally:
            launcher.kill()
            launcher.wait()
    assert (tmp_path / "output").read_text().count("report: nodes/report.html") == 1
    check_outputs(tmp_path / "nodes")
