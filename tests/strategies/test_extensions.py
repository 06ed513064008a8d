"""DeepSpeed's compiled extension: found again, and not waited for in vain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

LOAD = """
from evertune.strategies.extensions import load_extension
load_extension()
import os
print(os.environ["TORCH_EXTENSIONS_DIR"])
"""


def load(**environment: str) -> Path:
    """Load the extension in a process of its own; the folder it lies in."""
    settings = {name: value for name, value in os.environ.items() if name != "TORCH_EXTENSIONS_DIR"}
    command = [sys.executable, "-c", LOAD]
    settings |= {"DS_ACCELERATOR": "cpu"} | environment
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=1_200, check=True)
    return Path(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_lock_that_a_killed_process_has_left_is_removed() -> None:
    folder = load()
    lock = folder / "deepspeed_shm_comm" / "lock"
    assert (folder / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").is_file()
    lock.touch()
    assert load() == folder
    assert not lock.exists()


def test_the_folder_of_the_user_is_used(tmp_path: Path) -> None:
    own = load()
    given = tmp_path / "given"
    given.mkdir()
    (given / "deepspeed_shm_comm").symlink_to(own / "deepspeed_shm_comm")
    assert load(TORCH_EXTENSIONS_DIR=str(given)) == given


def test_each_environment_has_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from evertune.strategies.extensions import _of_this_environment

    here = _of_this_environment()
    monkeypatch.setattr(sys, "prefix", "/another")
    assert _of_this_environment() != here
    assert _of_this_environment().parent == here.parent
