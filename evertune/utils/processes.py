"""Facts about processes that Python does not tell, and processes that end together."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL) of a run that was asked to stop and has saved; it resumes when it is started again."""

SUPERVISOR = "EVERTUNE_SUPERVISOR"
"""The environment variable with the pipe that closes when the watch ends."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _kill_all() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


def end_with_supervisor(end: Callable[[], None] = _kill_all) -> None:
    """Let this process end when the ``evertune watch`` that runs it dies; by default it and its group are killed.

    Called first by ``evertune update``; does nothing in a process that no watch has started.
    """
    pipe = os.environ.pop(SUPERVISOR, None)  # not for the processes that this one starts

    def wait() -> None:
        assert pipe is not None
        os.read(int(pipe), 1)  # returns when the other end is closed
        end()

    if pipe is not None:
        threading.Thread(target=wait, name="evertune-supervisor", daemon=True).start()


def die_with_parent() -> None:
    """Let this process be killed when its parent ends, however that happens. Only Linux can."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def process_state(pid: int) -> tuple[str, int]:
    """A process's state (``R`` runs, ``S`` sleeps, ``T`` stopped, ``Z`` ended) and its parent; ``("", 0)`` if gone.

    Example:
        >>> process_state(os.getpid())[1] == os.getppid()
        True
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # it is gone; or a system without /proc, where nobody knows
        return ("", 0)
    state, parent = stat.rpartition(")")[2].split()[:2]  # the name before it may have anything in it
    return (state, int(parent))


def kill_group(pid: int) -> None:
    """Kill a process that leads a group, with all that it has started in it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
