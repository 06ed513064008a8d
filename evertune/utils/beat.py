"""The heartbeat of a rank: a few numbers in a small memory-mapped file."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from functools import cache
from pathlib import Path


class Beat(ctypes.Structure):
    """The progress of a rank, written by the rank itself and read by the supervisor of its node.

    Every number is eight bytes at a fixed place, so a reader never sees a partial one. Writing is a store to memory: it
    needs no system call, and the reader still sees it after the process is stopped or killed.

    Attributes:
        pid: Id of the process.
        marks: Number of times the rank has made progress. Ranks of one run count alike, so the smallest is furthest
            behind.
        step: Number of optimizer steps so far.
        in_step: 1 inside a training step, else 0.
        begun: Start of the current training step, in seconds of the system's monotonic clock.
        time: Time of the last progress, on the same clock.
        longest_step: Duration of the longest training step so far, in seconds; 0 before the first has ended.
    """

    pid: int
    marks: int
    step: int
    in_step: int
    begun: float
    time: float
    longest_step: float

    _fields_ = [
        ("pid", ctypes.c_int64),
        ("marks", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("in_step", ctypes.c_int64),
        ("begun", ctypes.c_double),
        ("time", ctypes.c_double),
        ("longest_step", ctypes.c_double),
    ]

    @classmethod
    def create(cls, path: Path) -> Beat:
        """Create the file of this process and map it."""
        draft = path.with_name(f".{path.name}")
        draft.write_bytes(bytes(ctypes.sizeof(cls)))
        with draft.open("r+b") as file:
            beat = cls.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(cls)))
        beat.pid, beat.time = os.getpid(), time.monotonic()
        # Renamed last, so that a reader never sees a file without a pid.
        draft.replace(path)
        return beat

    @classmethod
    def read(cls, path: Path) -> Beat | None:
        """The last state written by a rank; None if it has not written any."""
        try:
            return cls.from_buffer_copy(path.read_bytes())
        except FileNotFoundError:
            return None

    def mark(self, step: int) -> None:
        """Record progress."""
        self.step = step
        self.marks += 1
        self.time = time.monotonic()

    def begin_step(self, step: int) -> None:
        """Record the start of a training step."""
        self.mark(step)
        self.begun = self.time
        # Last: the reader must never combine in_step with the start of an earlier step.
        self.in_step = 1

    def end_step(self, step: int) -> None:
        """Record the end of a training step, or progress outside of one."""
        self.mark(step)
        if self.in_step:
            self.in_step = 0
            self.longest_step = max(self.longest_step, self.time - self.begun)


@cache
def own_beat() -> Beat | None:
    """The heartbeat of this process, for its supervisor; None if it was not started by one."""
    folder, local_rank = os.environ.get("EVERTUNE_NODE_DIR"), os.environ.get("LOCAL_RANK")
    if folder is None or local_rank is None:
        return None
    return Beat.create(Path(folder) / f"beat-{local_rank}")
