"""The supervisor of one node: ``python -m evertune.launch.supervisor.node``, started once on each node.

It starts torchrun, which starts the ranks, and makes sure that the run ends with the exit code of its command: hung
ranks are reported and restarted, torchrun is restarted when it has lost the other nodes, and a request to stop is
forwarded to the ranks, which save and end.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from evertune.launch.settings import config_files
from evertune.launch.supervisor.heartbeat import (
    Rank,
    Watch,
    furthest_behind,
    incident,
    look_into,
    look_into_with_others,
    places_in,
    read_ranks,
)
from evertune.utils.processes import PREEMPTED, die_with_parent, kill_group, process_state

WAIT = 600
"""Seconds for which a node waits for the others: at the start, and after they or the network were lost."""

_LAST_CALL = 30  # seconds in which more nodes may join once `min_nodes` have
_CONNECT = 60  # seconds for one attempt to reach the first node
_POLL = 0.5
_OTHERS = 2.0  # seconds that the other nodes have to report where their ranks are
_STUCK = 90.0  # seconds for which torchrun may be stopped, or not notice that a rank has ended; up to 60 are normal
_LINGER = 360.0  # seconds from the end of all ranks here to that of torchrun, which waits 300 for the other nodes


def main(arguments: Sequence[str] | None = None) -> int:
    """Supervise one node until the run has ended there.

    Args:
        arguments: Arguments as :meth:`evertune.launch.settings.LaunchSettings.node_command` writes them.

    Returns:
        The command's exit code, on the node of rank 0; 0 on others. 75 when the run was asked to stop and resumes when
        it is started again; 130 after Ctrl-C; otherwise 1.
    """
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="evertune-") as folder:
        return Supervisor(options, Path(folder)).run()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="evertune.launch.supervisor.node", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--min_nodes", type=int)
    parser.add_argument("--node_rank", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--master", required=True, metavar="HOST:PORT")
    parser.add_argument("--run_id", required=True)
    parser.add_argument("--log_dir", type=Path, required=True)
    parser.add_argument("--max_restarts", type=int, required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--hang_timeout", type=float, required=True)
    parser.add_argument("--silence_timeout", type=float, required=True)
    parser.add_argument("--preflight", action="store_true")
    parser.add_argument("--shared", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--module", default="evertune.cli.worker", help=SUPPRESS)
    parser.add_argument("command", nargs="+", help="what every rank runs")
    return parser


class _End(Exception):  # noqa: N818
    """The run has ended here."""

    def __init__(self, code: int) -> None:
        self.code = code


class Supervisor:
    """One node of a run.

    Args:
        options: Options of the command line.
        folder: An empty folder on this node, for this run only.
    """

    def __init__(self, options: Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.logs: Path = options.log_dir.absolute() / options.run_id
        self._watch = Watch(options.hang_timeout, options.silence_timeout)
        self._asked: float | None = None  # when it was asked to stop
        self._interrupted = False
        self._started = time.time()
        self._alive_at = time.monotonic()  # when a rank was last alive here
        self._tries = options.max_restarts
        self._signalled: set[int] = set()  # processes that have been asked to stop
        self._killed: set[int] = set()  # processes that hung
        self._since: dict[str, float] = {}  # condition to the time since which it holds, see `_for`

    def run(self) -> int:
        """Supervise until the run has ended on this node; returns the exit code."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self._ended.unlink(missing_ok=True)
        except OSError as error:
            self._say(f"cannot write to the log folder: {error}")
            return 1
        (self.folder / "logs").symlink_to(self.logs)  # ranks know only the folder of the node
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGINT, self._interrupt)
        output = _Output(self.folder)
        output.start()
        try:
            if self.options.preflight:
                self._preflight()
            self._alive_at = time.monotonic()
            while True:
                self._torchrun()
        except _End as end:  # other nodes read this file, and do not wait for this one any longer
            with suppress(OSError):
                self._ended.write_text(str(end.code))
            return end.code
        finally:
            output.finish()

    # --- the preflight

    def _preflight(self) -> None:
        """Check all nodes before the first start. A node that rejoins later skips it, as the others are training."""
        options = self.options
        passed = self.logs / f"node-{options.node_rank}.preflight"
        if passed.exists():
            return
        words = ["--nodes", str(options.nodes), "--node_rank", str(options.node_rank)]
        words += ["--processes", str(options.processes), "--master", options.master, "--run_id", options.run_id]
        if options.min_nodes is not None:
            words += ["--min_nodes", str(options.min_nodes)]
        for file in config_files(options.command):
            words += ["--config", str(file)]
        for shared in options.shared:
            words += ["--shared", shared]
        process = self._start([sys.executable, "-m", "evertune.launch.supervisor.preflight", *words])
        while process.poll() is None:
            if self._interrupted or self._asked is not None:
                kill_group(process.pid)
                process.wait()
                raise _End(130 if self._interrupted else PREEMPTED)
            time.sleep(_POLL)
        if process.returncode != 0:
            raise _End(1)
        passed.touch()

    # --- torchrun

    def _torchrun(self) -> None:
        """Start torchrun and watch it to its end.

        Raises:
            _End: Unless torchrun is to be restarted.
        """
        if self._interrupted or self._asked is not None:
            raise _End(130 if self._interrupted else PREEMPTED)
        self._end_if_alone()
        try:
            command = self._command()
        except OSError as error:
            self._say(f"the first node, {self.options.master}, cannot be resolved or reached yet, retrying: {error}")
            time.sleep(2)
            return
        for path in self.folder.glob("rank-*.json"):
            path.unlink()
        error_file = self.folder / "torchrun.json"
        error_file.unlink(missing_ok=True)
        self._say(shlex.join(command))
        process = self._start(
            command,
            EVERTUNE_NODE_DIR=str(self.folder),
            TORCHELASTIC_ERROR_FILE=str(error_file),
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # a shared one is not found again when the first rank moves
        )
        ranks: list[Rank] = []
        try:
            while process.poll() is None:
                ranks = read_ranks(self.folder, process.pid)
                self._look_after(process.pid, ranks)
                time.sleep(_POLL)
        finally:
            _kill(process, ranks)
        self._judge(process, error_file)

    def _command(self) -> list[str]:
        options = self.options
        nodes = f"{options.nodes}" if options.min_nodes is None else f"{options.min_nodes}:{options.nodes}"
        first = options.node_rank == 0
        settings = {
            "is_host": int(first),
            "join_timeout": WAIT,
            "last_call_timeout": _LAST_CALL,
            "read_timeout": _CONNECT,
        }
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", nodes, "--nproc-per-node", str(options.processes)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", options.master, "--rdzv-id", options.run_id),
            *("--rdzv-conf", ",".join(f"{name}={value}" for name, value in settings.items())),
            *("--local-addr", _own_address(options.master, first), "--max-restarts", str(self._tries)),
            *("-m", options.module, *options.command),
        ]

    def _start(self, command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **variables}
        environment.pop("EVERTUNE_SUPERVISOR", None)  # a pipe that children do not inherit
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches this process only
            preexec_fn=_as_child,  # noqa: PLW1509  two system calls
        )

    def _judge(self, process: subprocess.Popen[bytes], error_file: Path) -> None:
        """Torchrun has ended: end too, or return to restart it.

        Raises:
            _End: With the exit code.
        """
        # Results of the commands come first: torchrun may still fail while it shuts down.
        ranks, code = read_ranks(self.folder, process.pid), process.returncode
        decided = self._decided(ranks)
        if decided is not None:
            raise _End(decided)
        if code == 0:
            raise _End(0)
        if self._asked is not None:
            raise _End(PREEMPTED)
        if code < 0:
            reason = f"it was killed by signal {-code}"
        elif error_file.exists():  # torchrun itself failed, rather than the ranks with all their restarts
            reason = json.loads(error_file.read_text())["message"]["message"]
        else:
            self._say("the ranks have failed too often")
            raise _End(1)
        if ranks:  # restarts within that torchrun count as well; a failed rendezvous does not
            self._tries -= 1 + max(rank.restarts for rank in ranks)
        if self._tries < 0:
            self._say(f"torchrun has ended, and no restarts are left: {reason}")
            raise _End(1)
        self._say(f"torchrun has ended and is restarted: {reason}")
        time.sleep(1)

    def _decided(self, ranks: Sequence[Rank]) -> int | None:
        """The exit code, once the commands of all ranks here have ended."""
        codes = {rank.rank: rank.code for rank in ranks}
        if len(codes) < self.options.processes or None in codes.values():
            return None
        return codes.get(0, PREEMPTED if PREEMPTED in codes.values() else 0)

    # --- looking after it

    def _look_after(self, torchrun: int, ranks: Sequence[Rank]) -> None:
        """Check torchrun and its ranks once.

        Raises:
            _End: When they are to be ended.
        """
        if self._interrupted:
            raise _End(130)
        decided = self._decided(ranks)
        if any(rank.alive for rank in ranks):
            self._alive_at = time.monotonic()
        elif decided is None:
            self._end_if_alone()
        if self._for("lingers", decided is not None) > (_LINGER if self._asked is None else self.options.grace):
            raise _End(decided or 0)
        if self._asked is not None and decided is None:
            self._pass_on(ranks)
        self._look_for_hangs(ranks)
        stuck = process_state(torchrun)[0] == "T" or any(rank.state == "Z" for rank in ranks)
        if self._for("stuck", stuck) > _STUCK:
            self._say(f"torchrun (process {torchrun}) is stuck and is killed")
            kill_group(torchrun)

    def _pass_on(self, ranks: Sequence[Rank]) -> None:
        """Ask the ranks to save and to end."""
        assert self._asked is not None
        alive = [rank for rank in ranks if rank.alive]
        for rank in alive:
            if rank.pid not in self._signalled:
                self._signalled.add(rank.pid)
                self._say(f"asked to stop: rank {rank.rank} saves and ends, within {self.options.grace:g} s")
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGUSR2)
        if not alive:
            raise _End(PREEMPTED)
        if time.monotonic() - self._asked > self.options.grace:
            self._say(f"the ranks have not ended {self.options.grace:g} s after they were asked to stop; killing them")
            raise _End(PREEMPTED)

    def _look_for_hangs(self, ranks: Sequence[Rank]) -> None:
        """Report hung ranks and kill them: torchrun then restarts all ranks, on all nodes."""
        late = [rank for rank in self._watch.late(ranks) if rank.pid not in self._killed]
        alive = [rank for rank in ranks if rank.alive]
        try:
            if late:
                self._tell(late, look_into(alive, self.options.node_rank, self.folder, incident(self.logs)))
            elif self.options.nodes > 1 and alive:
                look_into_with_others(alive, self.options.node_rank, self.folder, self.logs)
        except OSError as error:
            self._say(f"cannot record where the ranks hang: {error}")
        for rank in late:
            self._killed.add(rank.pid)
            kill_group(rank.pid)

    def _tell(self, late: Sequence[Rank], found: Path) -> None:
        for place in places_in(found):
            if place.pid in {rank.pid for rank in late} and place.node == self.options.node_rank:
                self._say(str(place))
        if self.options.nodes > 1:  # the rank that holds up the others may be on another node
            time.sleep(_OTHERS)
        for place in furthest_behind(places_in(found)):
            self._say(f"furthest behind: {place}")
        self._say(f"the stack traces of all ranks are in {found}; hung ranks are killed, and all ranks restart")

    def _end_if_alone(self) -> None:
        """End if no rank has run here for too long, or if the other nodes have ended.

        Raises:
            _End: If so.
        """
        if time.monotonic() - self._alive_at > WAIT:
            self._say(f"the other nodes have not joined within {WAIT} s")
            raise _End(1)
        if self.options.min_nodes is not None:
            return  # the remaining nodes continue
        for path in self.logs.glob("node-*.ended"):  # a file from before this start is of an earlier attempt
            if path.stat().st_mtime > self._started:
                code = int(path.read_text() or 1)
                self._say(f"{path.stem} has ended with exit code {code}")
                raise _End(PREEMPTED if code == PREEMPTED else 1)

    def _for(self, what: str, true: bool) -> float:
        """Seconds for which something has been true without interruption."""
        if not true:
            self._since.pop(what, None)
            return 0.0
        now = time.monotonic()
        return now - self._since.setdefault(what, now)

    # --- signals and words

    def _ask(self, number: int, frame: object) -> None:
        if self._asked is None:
            self._asked = time.monotonic()

    @property
    def _ended(self) -> Path:
        """The file that reports to the other nodes how the run has ended here."""
        return self.logs / f"node-{self.options.node_rank}.ended"

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True

    def _say(self, words: str) -> None:
        line = f"[node {self.options.node_rank}] {words}"
        with suppress(OSError):  # nobody may be listening any more
            print(line, file=sys.stderr, flush=True)
        with suppress(OSError), (self.logs / f"node-{self.options.node_rank}.log").open("a") as log:
            log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {words}\n")


class _Output(threading.Thread):
    """Copies the output of the ranks here to the console, prefixing each line with its rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name="evertune-output", daemon=True)
        self._folder = folder
        self._places: dict[Path, int] = {}
        self._finished = threading.Event()

    def run(self) -> None:
        """Look for new lines until :meth:`finish`."""
        with suppress(OSError):  # nobody may be listening any more
            while not self._finished.wait(_POLL):
                self._pass_on(whole_lines=True)
            self._pass_on(whole_lines=False)

    def finish(self) -> None:
        """Copy the rest. Does not wait for a console that blocks."""
        self._finished.set()
        self.join(10)

    def _pass_on(self, whole_lines: bool) -> None:
        for rank in read_ranks(self._folder):
            place = self._places.get(rank.log, rank.offset)
            with suppress(OSError), rank.log.open("rb") as log:
                log.seek(place)
                text = log.read()
                if whole_lines:
                    text = text[: text.rfind(b"\n") + 1]
                self._places[rank.log] = place + len(text)
                for line in text.split(b"\n"):
                    if shown := line.rstrip().rpartition(b"\r")[2]:  # as a terminal shows a progress bar
                        sys.stdout.buffer.write(b"[rank %d]: %s\n" % (rank.rank, shown))
        sys.stdout.flush()


def _as_child() -> None:
    die_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # some schedulers send it to all processes


def _kill(process: subprocess.Popen[bytes], ranks: Sequence[Rank]) -> None:
    """End torchrun and its ranks, if they have not ended."""
    if process.poll() is None:
        kill_group(process.pid)
        for rank in ranks:
            if rank.alive:
                kill_group(rank.pid)
        process.wait()


def _own_address(master: str, first: bool) -> str:
    """The address at which other nodes reach this one: that of the interface with a route to the first node.

    Raises:
        OSError: If the first node's name cannot be resolved, or it cannot be reached.
    """
    host, _, port = master.rpartition(":")
    host = host.strip("[]")
    if first:
        return host
    family, kind, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


if __name__ == "__main__":
    sys.exit(main())
