"""Preemption: on a request to stop, all ranks save a checkpoint at the same step and end; a restart resumes from it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from evertune._lightning import (
    Checkpoint,
    cluster_environment,
    either,
    keep_signals,
    pl,
    rank_zero_info,
    restore_later,
    return_signals,
)
from evertune.training.checkpoint import UpdateCheckpoint
from evertune.utils.processes import PREEMPTED


class Preempted(SystemExit):
    """A ``fit`` was asked to stop and has saved a checkpoint. Not caught, it ends the process with exit code 75."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Preemption(Checkpoint):
    """Ends ``fit`` with a checkpoint when the job is preempted: a signal to any rank stops all of them.

    Schedulers send a signal some time before they reclaim a machine (a spot instance, a job of higher priority, the
    end of the time limit). The ranks agree on a step, save through :class:`UpdateCheckpoint`, and each raises
    :class:`Preempted`. Restarted with ``ckpt_path=latest(...)``, the fit is bit-identical to an uninterrupted one.

    The signal only sets a flag. The flags of all ranks are all-reduced on the CPU while the next batch is computed, so
    the checkpoint is written after the batch that follows the signal, or at the next point at which
    :meth:`UpdateCheckpoint.save_now` can save. If no such point is left, the fit ends as usual, and the callback
    remembers the signal: its next fit is stopped.

    This callback handles the signals from ``setup`` to the end of the fit. The previous handlers are then restored;
    after :class:`Preempted`, signals that had none are ignored, so that a second one does not change the exit code.

    Args:
        signals: Numbers or names of signals, as ``"SIGTERM"``. Keep the default under ``evertune launch``. For other
            launchers, add the signals that they send, as in ``("SIGUSR2", "SIGTERM")``: they must send them to the
            processes themselves, and wait for the checkpoint.

    Raises:
        ValueError: If a signal is unknown or cannot be handled, there is no :class:`UpdateCheckpoint` among the
            callbacks, Lightning's own requeueing under SLURM is enabled, or ``fit`` does not run in the main thread.

    Example::

        callbacks = [UpdateCheckpoint("checkpoints"), Preemption(signals=("SIGUSR2", "SIGTERM"))]
        trainer = pl.Trainer(max_epochs=3, callbacks=callbacks)
        trainer.fit(module, datamodule, ckpt_path=latest("checkpoints"))  # exit code 75: restart it
    """

    across_experiences = True

    def __init__(self, signals: Sequence[int | str] = (signal.SIGUSR2,)) -> None:
        self.signals = _numbers(signals)
        self._asked = False  # on this rank
        self._agreed = False  # on all ranks
        self._before: dict[signal.Signals, Any] = {}  # the handlers to restore
        self._group: dist.ProcessGroup | None = None
        self._reduction: dist.Work | None = None
        self._flag = torch.zeros(1, dtype=torch.uint8, device="cpu")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and install the signal handlers."""
        if stage != "fit":
            return
        _check(trainer)
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in self.signals}
        for number in self.signals:
            signal.signal(number, self._ask)
        # Lightning's own SIGTERM handler would start a collective and end the fit without saving.
        if signal.SIGTERM in self.signals:
            keep_signals(trainer)
        if folder := os.environ.get("EVERTUNE_NODE_DIR"):  # the launcher was asked before this handler existed
            self._asked |= (Path(folder) / f"asked-{os.environ.get('LOCAL_RANK', '0')}").exists()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create a separate process group, so that the flags never interleave with other collectives."""
        self._agreed = False
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            self._flag = torch.zeros(1, dtype=torch.uint8, device="cpu")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and end if any rank was asked to stop. Lightning calls checkpoint callbacks after all others."""
        if not self._agreed:
            self._agree()
        if self._agreed and _update_checkpoint(trainer).save_now(trainer):
            if self._group is not None:
                dist.barrier(self._group)  # launchers end all ranks once one has ended, so all must have saved by then
            rank_zero_info(f"Preemption: asked to stop, saved step {trainer.global_step}: restart it to resume")
            raise Preempted

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the pending collective."""
        self._wait()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the handlers. The other ranks may be gone, so do not wait for them."""
        self._group = self._reduction = None
        if isinstance(exception, Preempted):
            self._before = {
                number: signal.SIG_IGN if handler == signal.SIG_DFL else handler
                for number, handler in self._before.items()
            }
        self._restore(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the handlers and destroy the group."""
        self._restore(trainer)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It must never wait for another rank."""
        self._asked = True

    def _agree(self) -> None:
        """Read the all-reduce started at the previous batch; unless a rank was asked, start the next one."""
        if self._group is None:
            self._agreed = self._asked
        elif self._wait():
            self._agreed = True
        else:
            self._flag.fill_(self._asked)
            self._reduction = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _wait(self) -> bool:
        """Whether any rank had been asked to stop by the end of the previous batch."""
        if self._reduction is None:
            return False
        self._reduction.wait()
        self._reduction = None
        return bool(self._flag)

    def _restore(self, trainer: pl.Trainer) -> None:
        return_signals(trainer)
        for number, handler in self._before.items():
            signal.signal(number, handler)
            restore_later(trainer, number, handler)  # else Lightning would restore the handlers of this callback
        self._before = {}


def _numbers(signals: Sequence[int | str]) -> tuple[signal.Signals, ...]:
    """Signals by number or name."""
    if isinstance(signals, str) or not signals:
        raise ValueError(f"signals must be a non-empty list of numbers or names, got {signals!r}")
    numbers = []
    for one in signals:
        try:
            number = signal.Signals[one] if isinstance(one, str) else signal.Signals(one)
        except (KeyError, ValueError):
            raise ValueError(f"unknown signal {one!r}; pass a name such as 'SIGTERM', or a number") from None
        if number in (signal.SIGKILL, signal.SIGSTOP):
            raise ValueError(f"{number.name} cannot be handled, so nothing can be saved; use another signal")
        numbers.append(number)
    return tuple(numbers)


def _check(trainer: pl.Trainer) -> None:
    _update_checkpoint(trainer)
    environment = cluster_environment(trainer)
    if isinstance(environment, either("SLURMEnvironment")) and environment.auto_requeue:
        raise ValueError(
            "Preemption does not work with SLURMEnvironment(auto_requeue=True), Lightning's default under SLURM: it "
            "saves inside the signal handler, where the ranks can deadlock. Use "
            "Trainer(plugins=[SLURMEnvironment(auto_requeue=False)]) and requeue the job on exit code 75"
        )
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            f"Preemption needs fit in the main thread, got {threading.current_thread().name!r}: Python handles signals "
            "only there"
        )


def _update_checkpoint(trainer: pl.Trainer) -> UpdateCheckpoint:
    """The callback that saves."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, UpdateCheckpoint):
            return callback
    raise ValueError("Preemption needs an UpdateCheckpoint among the trainer's callbacks: it saves through it")
