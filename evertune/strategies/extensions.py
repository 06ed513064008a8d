"""DeepSpeed's compiled extension for CPUs: one folder per environment, without hanging on stale locks."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

_VARIABLE = "TORCH_EXTENSIONS_DIR"
_NAME = "deepspeed_shm_comm"


def load_extension() -> None:
    """Load DeepSpeed's extension for all-reduces in shared memory, compiling it if this environment has none yet.

    torch recompiles whenever the folder holds the extension of another environment, and waits forever for the lock file
    of a process that was killed while compiling. Here, each environment has its own folder, and processes take turns
    with a lock of the operating system, which is released when its process ends; the holder removes the stale lock file
    of a killed process. A folder set in ``TORCH_EXTENSIONS_DIR`` is used as it is.
    """
    from deepspeed.comm.torch import build_shm_op

    folder = Path(os.environ.setdefault(_VARIABLE, str(_of_this_environment())))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "evertune.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / _NAME / "lock").unlink(missing_ok=True)
        with redirect_stdout(sys.stderr):  # it prints that it was built, and standard output is for what was asked for
            build_shm_op()  # DeepSpeed caches it and uses it when it joins the process group


def _of_this_environment() -> Path:
    environment = hashlib.sha256(f"{sys.prefix} {sys.version} {torch.__version__}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "torch_extensions" / f"evertune-{environment}"
