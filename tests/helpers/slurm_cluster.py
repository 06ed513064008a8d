"""A real SLURM on one machine: its own munged, slurmctld and two slurmd, with all their files in a temporary folder.

The nodes are called 127.0.0.1 and 127.0.0.2, so that each name is also an address that leads here. Each has more
processors than the machine and eight GPUs that are none. A requeued job starts again after seconds instead of the
usual two minutes (``cred_expire``). As on clusters with cgroups, a signal reaches what srun has started and not its
children. Two partitions over the same nodes: jobs in ``urgent`` preempt those in ``normal``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from evertune.utils.processes import die_with_parent

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
_CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=300
ReturnToService=2
GresTypes=gpu
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class SlurmCluster:
    """A running cluster; :meth:`stop` ends it and everything that was started in it.

    Attributes:
        environment: variables with which SLURM's commands talk to it.
    """

    nodes = ("127.0.0.1", "127.0.0.2")

    def __init__(self) -> None:
        missing = [name for name in _PROGRAMS if shutil.which(name) is None]
        if missing:
            pytest.skip(f"SLURM is not installed: no {missing[0]} (apt-get install slurm-wlm munge)")
        if os.geteuid() != 0:
            pytest.skip("a SLURM of its own needs root")
        self.folder = Path(tempfile.mkdtemp(prefix="evertune-slurm-"))
        self.folder.chmod(0o755)  # munged wants its socket to be in reach of others
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        } | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows about a job, as in ``{"JobState": "RUNNING", "ExitCode": "0:0", "Restarts": "0"}``."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Until a job is in one of these states."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}, not {states}: {job}"
            time.sleep(0.2)
        return job

    def stop(self) -> None:
        """End all jobs, the daemons, and what is left of either."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for daemon in self._daemons:
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "plugstack.conf").touch()
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        nodes = [
            f"NodeName={node} NodeAddr={node} Port={port} CPUs=64 RealMemory=512000 Gres=gpu:8"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        (folder / "slurm.conf").write_text(
            _CONFIG.format(folder=folder, controller_port=controller_port, nodes="\n".join(nodes))
        )
        key = folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
        files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
        self._daemon("munged", "--foreground", *(f"--{name}={path}" for name, path in files.items()))
        _until(files["socket"].exists, self._logs)
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node)
        idle = ["idle"] * len(self.nodes)
        _until(
            lambda: self.run("sinfo", "--Node", "--noheader", "-p", "normal", "-o", "%T", check=False).split() == idle,
            self._logs,
        )

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,  # noqa: PLW1509  two system calls
                )
            )

    def _logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.out"))

    def _processes(self) -> Iterator[int]:
        """Processes that know this cluster from their environment: steps and jobs as well as daemons."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if int(path.parent.name) != os.getpid() and mark in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _until(reached: Callable[[], bool], logs: Callable[[], str]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline, logs()
        time.sleep(0.2)
