"""Signs of life: what a rank writes, and when its supervisor finds that it hangs."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune._lightning import pl
from evertune.launch.supervisor.heartbeat import Place, Rank, Watch, furthest_behind, innermost
from evertune.training.heartbeat import Heartbeat
from evertune.utils.beat import Beat, own_beat
from evertune.utils.processes import process_state
from tests.helpers.quiet import QUIET


@pytest.fixture
def beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("EVERTUNE_NODE_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    own_beat.cache_clear()
    yield tmp_path / "beat-0"
    own_beat.cache_clear()


def a_rank(**about: object) -> Rank:
    made = Beat(pid=7, marks=9, step=3, time=time.monotonic())
    rank = Rank(0, 0, 7, 0, True, time.monotonic(), Path("log"), 0, "S", made, None)
    return replace(rank, **about)


def a_beat(silent: float, in_step: bool, longest: float = 0.1) -> Beat:
    return Beat(pid=7, time=time.monotonic() - silent, in_step=in_step, longest_step=longest)


class Looks(pl.Callback):
    """What a reader sees inside of steps, and after them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inside: list[tuple[int, int]] = []
        self.after: list[tuple[int, int]] = []

    def on_before_optimizer_step(self, *_: object) -> None:
        beat = Beat.read(self.path)
        assert beat is not None
        self.inside.append((beat.in_step, beat.step))

    def on_train_batch_end(self, *_: object) -> None:
        beat = Beat.read(self.path)
        assert beat is not None
        self.after.append((beat.in_step, beat.step))


BoringModel = import_module(f"{pl.__name__}.demos.boring_classes").BoringModel


def fit(*callbacks: pl.Callback) -> None:
    trainer = pl.Trainer(
        max_steps=3,
        limit_val_batches=1,
        accelerator="cpu",
        **QUIET,
        callbacks=list(callbacks),
    )
    trainer.fit(BoringModel())


def test_fit_marks_its_progress(beat: Path) -> None:
    looks = Looks(beat)
    fit(Heartbeat(), looks)
    assert looks.inside == [(1, 0), (1, 1), (1, 2)]
    assert looks.after == [(0, 1), (0, 2), (0, 3)]
    last = Beat.read(beat)
    assert last is not None
    assert (last.pid, last.step, last.in_step) == (os.getpid(), 3, 0)
    assert 0 < last.longest_step < time.monotonic() - last.begun + last.longest_step
    assert last.marks > 3 * 5


def test_stacks_can_be_asked_for_between_two_fits(beat: Path, tmp_path: Path) -> None:
    """Lightning sets the signals that it has found again, and Python knows nothing of ``faulthandler``'s."""
    with (tmp_path / "stacks").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        try:
            fit(Heartbeat())
            caught = re.search(r"SigCgt:\s*(\w+)", Path("/proc/self/status").read_text())
            assert caught and int(caught[1], 16) & 1 << signal.SIGUSR1 - 1  # or it would end this process
            os.kill(os.getpid(), signal.SIGUSR1)
            assert "test_heartbeat.py" in (tmp_path / "stacks").read_text()
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def test_no_supervisor_no_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVERTUNE_NODE_DIR", raising=False)
    own_beat.cache_clear()
    state = torch.get_rng_state()
    Heartbeat().on_train_batch_start(None)  # type: ignore[arg-type]
    assert own_beat() is None
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_written_is_no_beat(tmp_path: Path) -> None:
    assert Beat.read(tmp_path / "beat-0") is None


@pytest.mark.parametrize(
    ("seconds", "beat", "hangs"),
    [
        (30, {"in_step": True}, False),
        (60, {"in_step": True}, True),
        (60, {"in_step": True, "longest": 10}, False),  # ten times the longest step is waited for
        (120, {"in_step": True, "longest": 10}, True),
        (60, {"in_step": True, "longest": 0}, False),  # the first step compiles
        (2_000, {"in_step": True, "longest": 0}, True),
        (1_000, {"in_step": False}, False),
        (2_000, {"in_step": False}, True),
    ],
)
def test_patience(seconds: float, beat: dict[str, Any], hangs: bool) -> None:
    assert bool(Watch(45, 1_800).late([a_rank(beat=a_beat(seconds, **beat))])) == hangs


def test_start_of_a_training_command_takes_no_longer_than_silence() -> None:
    long_ago = time.monotonic() - 2_000
    assert Watch(45, 1_800).late([a_rank(beat=None, announced=long_ago)])
    assert not Watch(45, 1_800).late([a_rank(beat=None, announced=long_ago, awaited=False)])


def test_ended_process_does_not_hang() -> None:
    for state in ("", "Z"):
        assert not Watch(45, 1_800).late([a_rank(beat=a_beat(2_000, in_step=True), state=state)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time; set its only element."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_stopped_process_hangs(clock: list[float]) -> None:
    watch, found = Watch(45, 1_800), []
    for _ in range(4):
        found.append(bool(watch.late([a_rank(state="T")])))
        clock[0] += 4
    assert found == [False, False, False, True]
    assert not watch.late([a_rank(state="S")])
    assert not watch.late([a_rank(state="T")])  # stopped again


def test_supervisor_that_was_stopped_itself_accuses_nobody(clock: list[float]) -> None:
    watch, rank = Watch(45, 1_800), a_rank(beat=a_beat(0, in_step=True))
    assert not watch.late([rank])
    clock[0] += 100
    assert not watch.late([rank])
    for _ in range(12):
        clock[0] += 4
        late = watch.late([rank])
    assert late


def test_furthest_behind() -> None:
    def place(rank: int, marks: int, state: str = "S") -> Place:
        return Place(0, "here", rank, 100 + rank, state, marks, 3, True, 46.2, "wait (a.py:3)")

    assert [found.rank for found in furthest_behind([place(0, 9), place(1, 8), place(2, 9)])] == [1]
    assert [found.rank for found in furthest_behind([place(0, 9), place(1, 9)])] == [0, 1]
    assert [found.rank for found in furthest_behind([place(0, 8), place(1, 9, "T")])] == [1]
    assert furthest_behind([]) == []
    assert str(place(1, 8)) == (
        "rank 1 (process 101 on node 0, here) has made no progress for 46 s: in step 4, state S; stack: wait (a.py:3)"
    )


def test_innermost_frames_are_those_of_the_main_thread() -> None:
    stacks = (
        'Thread 0x2 (most recent call first):\n  File "/lib/threading.py", line 5 in wait\n\n'
        'Current thread 0x1 (most recent call first):\n  File "/a/b.py", line 3 in inner\n  File "/c.py", line 4 in f\n'
    )
    assert innermost(stacks) == "inner (b.py:3) < f (c.py:4)"
    assert innermost("") == ""


def test_process_state() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        assert process_state(process.pid) in [("S", os.getpid()), ("R", os.getpid()), ("D", os.getpid())]
        process.send_signal(signal.SIGSTOP)
        while process_state(process.pid)[0] != "T":
            time.sleep(0.01)
        process.kill()
    assert process_state(process.pid) == ("", 0)
