"""Reports the progress of this rank to the supervisor of its node."""

from __future__ import annotations

import signal
from typing import Any

from evertune._lightning import Callback, pl, restore_nothing
from evertune.utils.beat import own_beat


class Heartbeat(Callback):
    """Reports the progress of this rank, so that a hung rank is found, named and restarted.

    ``evertune launch`` monitors every rank: one that stops making progress inside a training step, or whose process is
    stopped, is found in less than a minute. In a process that was not started by ``evertune launch``, this callback
    does nothing. ``evertune fit`` and ``update`` add it automatically; a heartbeat costs a few microseconds.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[Replay(memory_size=2_000), Heartbeat()])
    """

    across_experiences = True

    def _elsewhere(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        beat = own_beat()
        if beat is not None:
            beat.end_step(trainer.global_step)

    def _progress(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        beat = own_beat()
        if beat is not None:
            beat.mark(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        beat = own_beat()
        if beat is not None:
            beat.begin_step(trainer.global_step)

    def _starts(self, trainer: Any, *_: Any, **__: Any) -> None:
        self._elsewhere(trainer)
        # Lightning would restore SIGUSR1 as Python knows it, which removes the handler of faulthandler.
        if own_beat() is not None:
            restore_nothing(trainer, signal.SIGUSR1)

    on_train_start = on_validation_start = on_test_start = on_predict_start = _starts
    on_before_backward = on_after_backward = on_before_optimizer_step = on_before_zero_grad = _progress
    on_train_batch_end = _elsewhere
    setup = teardown = on_fit_start = on_fit_end = on_train_end = on_exception = _elsewhere
    on_train_epoch_start = on_train_epoch_end = on_save_checkpoint = on_load_checkpoint = _elsewhere
    on_validation_batch_start = on_validation_batch_end = on_validation_end = _elsewhere
    on_test_batch_start = on_test_batch_end = on_test_end = _elsewhere
    on_predict_batch_start = on_predict_batch_end = on_predict_end = _elsewhere
