"""Finds the hung ranks of a node from their heartbeats, and records where they hang."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from evertune.utils.beat import Beat
from evertune.utils.files import write_atomically
from evertune.utils.processes import process_state

_STOPPED = 10.0
"""Seconds for which the process of a rank may be stopped (SIGSTOP)."""

_AWAY = 10.0
"""Seconds without a check (the supervisor itself was stopped) after which the timeouts of all ranks start over."""

_TIMES_LONGEST_STEP = 10  # a step may take this many times the longest so far, even beyond `hang_timeout`
_INCIDENT = timedelta(seconds=60)  # hangs that are found within it are the same
_NAME = "hang-%Y%m%d-%H%M%S"


@dataclass
class Rank:
    """One rank of this node: what it has announced, its progress, and what the system says of its process.

    Attributes:
        local: Rank on this node.
        rank: Global rank.
        pid: Process id.
        restarts: Number of times that torchrun had restarted its ranks.
        awaited: Whether it trains, so that heartbeats are expected.
        announced: When it announced itself, by the monotonic clock.
        log: File of its output.
        offset: Position in the file at which this process's output begins.
        state: State of the process, as in ``/proc``; empty if it is gone.
        beat: Its last heartbeat, if there was one.
        code: The exit code of its command, once it has ended.
    """

    local: int
    rank: int
    pid: int
    restarts: int
    awaited: bool
    announced: float
    log: Path
    offset: int
    state: str
    beat: Beat | None
    code: int | None

    @property
    def alive(self) -> bool:
        """Whether its process exists and has not ended."""
        return self.state not in ("", "Z", "X")

    @property
    def silent_since(self) -> float:
        """When it last made progress, by the monotonic clock."""
        return self.announced if self.beat is None else self.beat.time


def read_ranks(folder: Path, torchrun: int | None = None) -> list[Rank]:
    """The ranks that have announced themselves on a node.

    Args:
        folder: Folder of the node.
        torchrun: Process id of torchrun, which started them; if None, no rank counts as alive.
    """
    ranks = []
    for path in sorted(folder.glob("rank-*.json")):
        facts = _read(path)
        if facts is None:
            continue
        local = int(path.stem.removeprefix("rank-"))
        state, parent = process_state(facts["pid"])
        beat = Beat.read(folder / f"beat-{local}")
        ranks.append(
            Rank(
                local=local,
                rank=facts["rank"],
                pid=facts["pid"],
                restarts=facts["restarts"],
                awaited=facts["awaited"],
                announced=facts["time"],
                log=Path(facts["log"]),
                offset=facts["offset"],
                state=state if parent == torchrun else "",  # the number may be another process's by now
                beat=beat if beat is not None and beat.pid == facts["pid"] else None,
                code=_code(folder / f"code-{local}", facts["pid"]),
            )
        )
    return ranks


def _code(path: Path, pid: int) -> int | None:
    facts = _read(path)
    return int(facts["code"]) if facts is not None and facts["pid"] == pid else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:  # it belonged to the processes before
        return None


class Watch:
    """Finds ranks that hang.

    Args:
        hang_timeout: Seconds without progress inside a training step.
        silence_timeout: Seconds without progress elsewhere, and in the first step, which compiles and allocates much.
    """

    def __init__(self, hang_timeout: float, silence_timeout: float) -> None:
        self.hang_timeout, self.silence_timeout = hang_timeout, silence_timeout
        self._stopped: dict[int, float] = {}  # process to the time when it was first seen stopped
        self._looked, self._back = time.monotonic(), float("-inf")

    def late(self, ranks: Iterable[Rank]) -> list[Rank]:
        """The ranks that hang. Call it about every second."""
        now = time.monotonic()
        if now - self._looked > _AWAY:  # this process was stopped itself, perhaps with all of this machine
            self._back, self._stopped = now, {}
        self._looked = now
        stopped = {rank.pid: self._stopped.get(rank.pid, now) for rank in ranks if rank.state == "T"}
        self._stopped = stopped
        allowed = min(_STOPPED, self.hang_timeout / 2)
        return [
            rank
            for rank in ranks
            if rank.alive
            and (
                now - stopped.get(rank.pid, now) > allowed
                or now - max(rank.silent_since, self._back) > self._patience(rank)
            )
        ]

    def _patience(self, rank: Rank) -> float:
        """Seconds that a rank may be without progress where it is."""
        if rank.beat is None and not rank.awaited:
            return float("inf")
        if rank.beat is not None and rank.beat.in_step and rank.beat.longest_step:
            return max(self.hang_timeout, _TIMES_LONGEST_STEP * rank.beat.longest_step)
        return self.silence_timeout


@dataclass(frozen=True)
class Place:
    """Where a rank was when a hang was examined; exchanged between the nodes.

    Attributes:
        node: Rank of its node.
        host: Host name of its node.
        rank: Global rank.
        pid: Process id.
        state: State of the process, as in ``/proc``.
        marks: Number of heartbeats so far.
        step: Optimizer steps so far.
        in_step: Whether it is inside a training step.
        silent: Seconds without progress.
        stack: Its innermost stack frames.
    """

    node: int
    host: str
    rank: int
    pid: int
    state: str
    marks: int
    step: int
    in_step: bool
    silent: float
    stack: str

    def __str__(self) -> str:
        where = f"in step {self.step + 1}" if self.in_step else f"after step {self.step}, outside of a step"
        return (
            f"rank {self.rank} (process {self.pid} on node {self.node}, {self.host}) has made no progress for "
            f"{self.silent:.0f} s: {where}, state {self.state}; stack: {self.stack or 'not available'}"
        )


def incident(logs: Path) -> Path:
    """The folder for a hang that was just found: one that is at most a minute old, or a new one.

    Args:
        logs: Folder of the run, shared by all nodes.
    """
    now = datetime.now(UTC)
    recent = _recent(logs, now)
    if recent is None:
        recent = logs / now.strftime(_NAME)
        recent.mkdir(exist_ok=True)
    return recent


def look_into(ranks: Sequence[Rank], node: int, folder: Path, incident: Path) -> Path:
    """Record where the ranks of this node are, for people and for the other nodes.

    The stack trace of each rank is written to ``rank-<n>.txt``. A stopped rank is continued for as long as that takes.

    Args:
        ranks: Ranks that are alive.
        node: Rank of this node.
        folder: Folder of this node.
        incident: Folder to write to.

    Returns:
        ``incident``.
    """
    now, host = time.monotonic(), socket.gethostname()
    places = []
    for rank in ranks:
        stacks = _stacks(rank, folder / f"stack-{rank.local}")
        place = Place(
            node=node,
            host=host,
            rank=rank.rank,
            pid=rank.pid,
            state=rank.state,
            marks=rank.beat.marks if rank.beat else 0,
            step=rank.beat.step if rank.beat else 0,
            in_step=bool(rank.beat and rank.beat.in_step),
            silent=now - rank.silent_since,
            stack=innermost(stacks),
        )
        (incident / f"rank-{rank.rank}.txt").write_text(f"{place}\n\n{stacks}")
        places.append(place)
    write_atomically(incident / f"node-{node}.json", json.dumps([asdict(place) for place in places]).encode())
    return incident


def look_into_with_others(ranks: Sequence[Rank], node: int, folder: Path, logs: Path) -> None:
    """Record where the ranks of this node are if another node has just found a hang."""
    recent = _recent(logs, datetime.now(UTC))
    if recent is not None and not (recent / f"node-{node}.json").exists():
        look_into(ranks, node, folder, recent)


def places_in(incident: Path) -> list[Place]:
    """The places of the ranks of all nodes that have reported so far."""
    reports = [json.loads(path.read_text()) for path in incident.glob("node-*.json")]
    return sorted((Place(**facts) for places in reports for facts in places), key=lambda place: place.rank)


def furthest_behind(places: Sequence[Place]) -> list[Place]:
    """The stopped ranks; if there are none, those that have made the least progress."""
    # In a collective all ranks wait for the one with the fewest heartbeats.
    fewest = min((place.marks for place in places), default=0)
    return [place for place in places if place.state == "T"] or [place for place in places if place.marks == fewest]


def innermost(stacks: str, depth: int = 4) -> str:
    """The innermost frames of a process's main thread, from what ``faulthandler`` writes about all of its threads.

    Example:
        >>> innermost('Thread 0x1 (most recent call first):\\n  File "/there/a.py", line 3 in wait\\n')
        'wait (a.py:3)'
    """
    main = stacks.rstrip().split("\n\n")[-1]  # the oldest thread comes last
    frames = re.findall(r'File "([^"]*)", line (\d+) in (.*)', main)
    return " < ".join(f"{name} ({Path(file).name}:{line})" for file, line, name in frames[:depth])


def _stacks(rank: Rank, file: Path) -> str:
    """The stack traces that a process writes on SIGUSR1: by faulthandler, which does not need the interpreter lock."""
    before = file.stat().st_size
    try:
        # The handler runs only in a process that is not stopped. The signal is sent first, so that it is delivered as
        # soon as the process continues, which then stands where it was stopped.
        os.kill(rank.pid, signal.SIGUSR1)
        if rank.state == "T":
            os.kill(rank.pid, signal.SIGCONT)
        _wait_until_written(file, before)
        if rank.state == "T":
            os.kill(rank.pid, signal.SIGSTOP)
    except ProcessLookupError:
        return ""
    with file.open(errors="replace") as stacks:
        stacks.seek(before)
        return stacks.read()


def _wait_until_written(file: Path, before: int) -> None:
    """Wait until a file has grown and stopped growing, for two seconds at most."""
    size, deadline = before, time.monotonic() + 2
    while time.monotonic() < deadline:
        time.sleep(0.05)
        last, size = size, file.stat().st_size
        if before < size == last:
            return


def _recent(logs: Path, now: datetime) -> Path | None:
    for path in sorted(logs.glob("hang-*"), reverse=True):
        if now - datetime.strptime(path.name, _NAME).replace(tzinfo=UTC) < _INCIDENT:
            return path
    return None
