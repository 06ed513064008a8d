"""Process state that Python does not expose, and processes that end together."""

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
"""Exit code (EX_TEMPFAIL) of a run that saved a checkpoint on request; it resumes when it is started again."""

SUPERVISOR = "EVERTUNE_SUPERVISOR"
"""Environment variable with the file descriptor of the pipe that closes when the watch ends."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _kill_all() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


def end_with_supervisor(end: Callable[[], None] = _kill_all) -> None:
    """End this process when the ``evertune watch`` that runs it dies; by default, kill it and its process group.

    Called first by ``evertune update``. Has no effect in a process that was not started by a watch.
    """
    pipe = os.environ.pop(SUPERVISOR, None)  # not inherited by child processes

    def wait() -> None:
        assert pipe is not None
        os.read(int(pipe), 1)  # returns when the other end is closed
        end()

    if pipe is not None:
        threading.Thread(target=wait, name="evertune-supervisor", daemon=True).start()


def die_with_parent() -> None:
    """Have this process killed when its parent ends for any reason. Linux only."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def process_state(pid: int) -> tuple[str, int]:
    """A process's state (``R`` running, ``S`` sleeping, ``T`` stopped, ``Z`` zombie) and parent; ``("", 0)`` if gone.

    Example:
        >>> process_state(os.getpid())[1] == os.getppid()
        True
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # it has ended, or the system has no /proc
        return ("", 0)
    state, parent = stat.rpartition(")")[2].split()[:2]  # the name in parentheses may contain anything
    return (state, int(parent))


def kill_group(pid: int) -> None:
    """Kill the leader of a process group and all processes in the group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
