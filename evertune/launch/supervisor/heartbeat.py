"""The ranks of one node as its supervisor sees them: which of them hang, and where."""

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
"""Seconds for which a rank may be stopped."""

_AWAY = 10.0
"""Seconds without a look after which all ranks get their time anew."""

_TIMES_LONGEST_STEP = 10
_INCIDENT = timedelta(seconds=60)  # hangs that are found within it are the same
_NAME = "hang-%Y%m%d-%H%M%S"


@dataclass
class Rank:
    """One rank of this node: what it has announced, its progress, and what the system says of its process.

    Attributes:
        local: its number on this node.
        rank: its number among all.
        pid: of its process.
        restarts: how often torchrun had started its ranks over.
        awaited: whether it trains, so that it owes signs of life.
        announced: when it did, by the monotonic clock.
        log: where its output goes.
        offset: where in it this process's output begins.
        state: of the process, as in ``/proc``; empty when it is gone.
        beat: its last sign of life, if there was one.
        code: the exit code that its command has come to.
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
        """Whether its process is there and has not ended."""
        return self.state not in ("", "Z", "X")

    @property
    def silent_since(self) -> float:
        """When it last made progress, by the monotonic clock."""
        return self.announced if self.beat is None else self.beat.time


def read_ranks(folder: Path, torchrun: int | None = None) -> list[Rank]:
    """The ranks that have announced themselves on a node.

    Args:
        folder: of the node.
        torchrun: the process that has started them; without it, none counts as alive.
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
        hang_timeout: seconds without progress inside a training step.
        silence_timeout: the same elsewhere, and in the first step, in which much is compiled and allocated.
    """

    def __init__(self, hang_timeout: float, silence_timeout: float) -> None:
        self.hang_timeout, self.silence_timeout = hang_timeout, silence_timeout
        self._stopped: dict[int, float] = {}  # process to the time when it was first seen stopped
        self._looked, self._back = time.monotonic(), 0.0

    def late(self, ranks: Iterable[Rank]) -> list[Rank]:
        """Those of some ranks that hang. To be called every second or so."""
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
    """Where a rank was when a hang was looked into; what nodes tell each other.

    Attributes:
        node: its node's number.
        host: its node's name.
        rank: its number among all.
        pid: of its process.
        state: of its process.
        marks: how often it has made progress.
        step: optimizer steps so far.
        in_step: whether it is inside a training step.
        silent: seconds without progress.
        stack: its innermost frames.
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
            f"{self.silent:.0f} s: {where}, state {self.state}; stack: {self.stack or 'it gave none'}"
        )


def incident(logs: Path) -> Path:
    """The folder for a hang that has been found now: that of a minute ago or less, or a new one.

    Args:
        logs: the run's folder, which all nodes see.
    """
    now = datetime.now(UTC)
    recent = _recent(logs, now)
    if recent is None:
        recent = logs / now.strftime(_NAME)
        recent.mkdir(exist_ok=True)
    return recent


def look_into(ranks: Sequence[Rank], node: int, folder: Path, incident: Path) -> Path:
    """Write down where the ranks of this node are, for people and for the other nodes.

    Each rank's stacks go into ``rank-<n>.txt``. A stopped rank goes on for as long as that takes.

    Args:
        ranks: that are alive.
        node: the number of this one.
        folder: of this node.
        incident: where to write.

    Returns:
        Where that is.
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
    """Write down where the ranks of this node are if another node has found a hang just now."""
    recent = _recent(logs, datetime.now(UTC))
    if recent is not None and not (recent / f"node-{node}.json").exists():
        look_into(ranks, node, folder, recent)


def places_in(incident: Path) -> list[Place]:
    """What the nodes have told so far of where their ranks are."""
    told = [json.loads(path.read_text()) for path in incident.glob("node-*.json")]
    return sorted((Place(**facts) for places in told for facts in places), key=lambda place: place.rank)


def furthest_behind(places: Sequence[Place]) -> list[Place]:
    """Those of some ranks that are stopped; if none is, those that have come least far."""
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
    """What a process writes when it is asked for its stacks; it needs no Python for it, only to be running."""
    before = file.stat().st_size
    try:
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
    """Wait until a file has grown and grows no more, for two seconds at most."""
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
