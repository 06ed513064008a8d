"""Temporary folders that do not outlive their process, however it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

_MIN_AGE = 60.0
"""Seconds before which a folder may not be locked yet, so that it is left alone."""


def scratch_folder(owner: object, prefix: str, parent: str | Path | None = None) -> Path:
    """Create a temporary folder, and delete those with the same prefix whose processes were killed.

    A process holds a lock on its folder for as long as it, or a process that it has forked, lives. The system releases
    it when they are gone, also after SIGKILL, and in another container.

    Args:
        owner: Object with which the folder is deleted.
        prefix: Beginning of the folder's name.
        parent: Folder to create it in. By default the system's temporary folder.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # the file system does not support locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    weakref.finalize(owner, _remove, folder, os.getpid(), handle)
    for other in folder.parent.glob(f"{prefix}*"):
        if other != folder:
            _delete_abandoned(other)
    return folder


def _delete_abandoned(folder: Path) -> None:
    with suppress(OSError):  # another user's, or another process was faster
        if time.time() - folder.stat().st_mtime < _MIN_AGE:
            return
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(handle)


def _remove(folder: Path, process: int, handle: int) -> None:
    if os.getpid() == process:  # not in a forked loader worker
        shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)
