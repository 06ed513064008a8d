"""The heartbeat of a rank: a few numbers in a small file that is mapped into memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from functools import cache
from pathlib import Path


class Beat(ctypes.Structure):
    """Where a rank is, written by the rank itself and read by the supervisor of its node.

    Every number is eight bytes in one place, so a reader never sees half of one. Writing is a store in memory: no
    system call, and nothing is lost to the reader when the process is stopped or killed.

    Attributes:
        pid: of the process.
        marks: how many times it has made progress; ranks of one run count alike, so the smallest is furthest behind.
        step: optimizer steps so far.
        in_step: 1 inside a training step, 0 elsewhere.
        begun: when the current training step began, by the system's monotonic clock.
        time: when it last made progress, by the same clock.
        longest_step: seconds of the longest training step so far; 0 before the first is done.
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
        """A new file, and this process's view of it."""
        draft = path.with_name(f".{path.name}")
        draft.write_bytes(bytes(ctypes.sizeof(cls)))
        with draft.open("r+b") as file:
            beat = cls.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(cls)))
        beat.pid, beat.time = os.getpid(), time.monotonic()
        draft.replace(path)
        return beat

    @classmethod
    def read(cls, path: Path) -> Beat | None:
        """What a rank has written last; None when it has written nothing yet."""
        try:
            return cls.from_buffer_copy(path.read_bytes())
        except FileNotFoundError:
            return None

    def mark(self, step: int) -> None:
        """Progress has been made."""
        self.step = step
        self.marks += 1
        self.time = time.monotonic()

    def begin_step(self, step: int) -> None:
        """A training step begins."""
        self.mark(step)
        self.begun = self.time
        self.in_step = 1

    def end_step(self, step: int) -> None:
        """A training step has ended, or what follows is none."""
        self.mark(step)
        if self.in_step:
            self.in_step = 0
            self.longest_step = max(self.longest_step, self.time - self.begun)


@cache
def own_beat() -> Beat | None:
    """The beat of this process, where a supervisor reads it; None when none has started this process."""
    folder, local_rank = os.environ.get("EVERTUNE_NODE_DIR"), os.environ.get("LOCAL_RANK")
    if folder is None or local_rank is None:
        return None
    return Beat.create(Path(folder) / f"beat-{local_rank}")
