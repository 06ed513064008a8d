"""Facts about processes that Python does not tell, and the end of a process with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


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
