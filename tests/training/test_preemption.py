"""Asked to stop, all ranks save at the same step and end; started again, they end in the same bits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from evertune._lightning import SLURMEnvironment, pl
from evertune.training.checkpoint import UpdateCheckpoint, latest
from evertune.training.preemption import Preempted, Preemption
from evertune.utils.processes import PREEMPTED
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.preemption_worker import Ask, fit, update
from tests.helpers.resume_worker import first

STRATEGIES = {
    "ddp": "ddp",
    "zero_2": "evertune_deepspeed_stage_2",
    "zero_3": "evertune_deepspeed_stage_3",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """None at first; after a test they are as before."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("version")
    first(tiny_bert(tmp_path_factory.mktemp("bert")), str(folder))
    return folder


def check_bits(out: Path) -> None:
    undisturbed, resumed = files_of(out / "undisturbed"), files_of(out / "resumed")
    assert {"model/model.safetensors", "model/head.safetensors", "EWC/index.json"} <= undisturbed.keys()
    assert undisturbed.keys() == resumed.keys()
    assert [name for name, content in undisturbed.items() if resumed[name] != content] == []


def stop_and_resume(out: Path, **settings: Any) -> int:
    """Two ranks, of which only the last is asked; the step at which both ended."""
    with pytest.raises(RuntimeError) as error:
        run_ranks("tests.helpers.preemption_worker:update", 2, out=str(out), resume=False, **settings)
    assert "rank 0 ended with 75" in str(error.value)
    assert "rank 1 ended with 75" in str(error.value)
    steps = {int((out / f"stopped-{rank}").read_text()) for rank in range(2)}
    assert len(steps) == 1
    (step,) = steps
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{step}"]
    run_ranks("tests.helpers.preemption_worker:update", 2, out=str(out), resume=True, **settings)
    check_bits(out)
    return step


def test_one_process(version: Path, tmp_path: Path) -> None:
    settings = {"version": str(version), "out": str(tmp_path), "strategy": "auto"}
    with pytest.raises(Preempted) as error:
        update(**settings, resume=False)  # type: ignore[arg-type]
    assert error.value.code == PREEMPTED
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-6"]
    update(**settings, resume=True)  # type: ignore[arg-type]
    check_bits(tmp_path)


def test_a_signal_to_one_of_two_ranks(version: Path, tmp_path: Path) -> None:
    step = stop_and_resume(tmp_path, version=str(version), strategy="ddp")
    assert step in (6, 7)  # known to both one batch after that of the signal


@pytest.mark.slow
@pytest.mark.parametrize("on", STRATEGIES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_ranks_of_every_strategy(on: str, accumulation: int, name: str, version: Path, tmp_path: Path) -> None:
    settings = {"version": str(version), "strategy": STRATEGIES[on], "accumulation": accumulation, "name": name}
    assert stop_and_resume(tmp_path, **settings) in (6, 7)


@pytest.mark.slow
@pytest.mark.parametrize("on", STRATEGIES)
def test_at_the_end_of_an_epoch_the_next_step_is_saved(on: str, version: Path, tmp_path: Path) -> None:
    """Epochs of ten steps; the eighth step is asked to be saved by the schedule too."""
    for step, every_n_steps, saved in ((8, 1000, (11,)), (6, 4, (7, 8))):
        settings = {"version": str(version), "strategy": STRATEGIES[on], "accumulation": 1}
        out = tmp_path / str(step)
        out.mkdir()
        assert stop_and_resume(out, **settings, step=step, every_n_steps=every_n_steps) in saved


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("on_fit_start", 0),
        ("on_sanity_check_start", 0),
        ("on_train_start", 0),
        ("on_train_batch_start", 1),
        ("on_validation_start", 3),
    ],
)
def test_a_signal_at_any_moment(name: str, moment: str, step: int, tmp_path: Path) -> None:
    """Lightning's own reaction to SIGTERM, to end without a checkpoint, does not come first."""
    checkpoint = UpdateCheckpoint(tmp_path, every_n_steps=1000)
    with pytest.raises(Preempted):
        fit([Preemption(["SIGUSR2", "SIGTERM"]), checkpoint, Ask(name, moment, step)], val_check_interval=3)
    saved = latest(tmp_path)
    assert saved is not None
    assert saved.parent.name == f"step-{step + 1}"
    assert signal.getsignal(signal.Signals[name]) == signal.SIG_IGN  # a second signal does not change how it ends


def test_a_signal_in_the_last_step_lets_the_fit_end_and_stops_the_next(tmp_path: Path) -> None:
    preemption = Preemption()
    fit([preemption, UpdateCheckpoint(tmp_path / "1"), Ask("SIGUSR2", "on_train_batch_start", 5)])
    assert latest(tmp_path / "1") is None
    with pytest.raises(Preempted):
        fit([preemption, UpdateCheckpoint(tmp_path / "2")])
    assert latest(tmp_path / "2") is not None


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_handlers_are_brought_back(name: str, tmp_path: Path) -> None:
    class Fail(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    def mine(number: int, _: Any) -> None:
        raise AssertionError("it belongs to the callback as long as fit runs")

    number = signal.Signals[name]
    signal.signal(number, mine)
    fit([Preemption([name]), UpdateCheckpoint(tmp_path)])
    assert signal.getsignal(number) is mine
    with pytest.raises(RuntimeError, match="on purpose"):
        fit([Preemption([name]), UpdateCheckpoint(tmp_path), Fail()])
    assert signal.getsignal(number) is mine
    with pytest.raises(Preempted):
        fit([Preemption([name]), UpdateCheckpoint(tmp_path), Ask(name, "on_train_start")])
    assert signal.getsignal(number) is mine
    fit([], enable_checkpointing=False)  # Lightning brings back what it found
    assert signal.getsignal(number) is mine


def test_asked_before_the_callback_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERTUNE_NODE_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    fit([Preemption(), UpdateCheckpoint(tmp_path / "checkpoints")])
    (tmp_path / "asked-1").touch()  # another rank
    fit([Preemption(), UpdateCheckpoint(tmp_path / "checkpoints")])
    (tmp_path / "asked-0").touch()
    with pytest.raises(Preempted):
        fit([Preemption(), UpdateCheckpoint(tmp_path / "checkpoints")])


def test_under_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's requeueing is refused; without it, the signal that SLURM sends stops the fit."""
    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_ID": "1234"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    callbacks = [Preemption(["SIGTERM"]), UpdateCheckpoint(tmp_path), Ask("SIGTERM", "on_train_batch_start", 2)]
    with pytest.raises(ValueError, match=r"Use Trainer\(plugins=\[SLURMEnvironment\(auto_requeue=False\)\]\)"):
        fit(callbacks)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(Preempted):
        fit(callbacks, plugins=[SLURMEnvironment(auto_requeue=False)])
    assert latest(tmp_path) is not None


def test_signals_by_name_and_number() -> None:
    assert Preemption().signals == (signal.SIGUSR2,)
    assert Preemption(["SIGTERM", int(signal.SIGUSR1)]).signals == (signal.SIGTERM, signal.SIGUSR1)
    parser = ArgumentParser()
    parser.add_argument("--callback", type=pl.Callback)
    given = {"class_path": "evertune.training.preemption.Preemption", "init_args": {"signals": ["SIGTERM", 12]}}
    made = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert made.signals == (signal.SIGTERM, signal.Signals(12))


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ([], r"must be a non-empty list of numbers or names, got \[\]"),
        ("SIGTERM", "must be a non-empty list of numbers or names, got 'SIGTERM'"),
        (["TERM"], "unknown signal 'TERM'; pass a name such as 'SIGTERM', or a number"),
        ([12345], "unknown signal 12345"),
        (["SIGKILL"], "SIGKILL cannot be handled, so nothing can be saved; use another signal"),
    ],
)
def test_signals_that_cannot_be(signals: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preemption(signals)


def test_refused_at_setup(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs an UpdateCheckpoint among the trainer's callbacks"):
        fit([Preemption()])
    errors: list[BaseException] = []

    def in_a_thread() -> None:
        try:
            fit([Preemption(), UpdateCheckpoint(tmp_path)])
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=in_a_thread, name="worker")
    thread.start()
    thread.join()
    assert "needs fit in the main thread, got 'worker'" in str(errors[0])
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
