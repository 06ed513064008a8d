"""Temporary folders are deleted after their process, and never before."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from evertune.memory.memory import ReplayMemory
from evertune.utils.scratch import scratch_folder

FORK = multiprocessing.get_context("fork")


class Owner:
    """An object that a folder belongs to."""


OWNER = Owner()


def scratch(parent):
    return scratch_folder(OWNER, "evertune-test-", parent)


def old(folder):
    os.utime(folder, (0, 0))


def _hold(parent, connection):
    connection.send(str(scratch(parent)))
    connection.recv()


def _fork(parent, connection):
    """A process that makes a folder and dies; one that it has forked lives on."""
    folder = scratch(parent)
    child = os.fork()
    if child == 0:
        connection.recv()
        os._exit(0)
    connection.send((str(folder), child))
    os._exit(0)


def test_what_a_killed_process_left_is_deleted_by_the_next(tmp_path):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(tmp_path, theirs), daemon=True)
    process.start()
    left = Path(ours.recv())
    (left / "memory").write_bytes(b"x")
    old(left)
    scratch(tmp_path)
    assert left.is_dir()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    scratch_folder(OWNER, "evertune-other-", tmp_path)
    assert left.is_dir()
    scratch(tmp_path)
    assert not left.exists()


def test_a_folder_is_kept_for_the_processes_that_were_forked(tmp_path):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_fork, args=(tmp_path, theirs))
    process.start()
    folder, child = ours.recv()
    process.join()
    old(folder)
    scratch(tmp_path)
    assert Path(folder).is_dir()
    os.kill(child, signal.SIGKILL)


def test_a_folder_that_may_not_be_locked_yet_and_a_link_are_left_alone(tmp_path):
    (tmp_path / "evertune-test-new").mkdir()
    (tmp_path / "elsewhere").mkdir()
    old(tmp_path / "elsewhere")
    (tmp_path / "evertune-test-link").symlink_to(tmp_path / "elsewhere")
    scratch(tmp_path)
    assert (tmp_path / "evertune-test-new").is_dir()
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("n", [1, 3])
def test_a_memory_leaves_nothing_behind(tmp_path, n):
    for _ in range(n):
        memory = ReplayMemory(4, directory=tmp_path)
        memory.update([{"x": 1}], experience="a")
        assert memory.directory.parent == tmp_path
        del memory
    assert list(tmp_path.iterdir()) == []
