"""The end of an experience: all callbacks consolidate as one step, or none does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from evertune._lightning import either, pl, replace_method, return_method
from evertune.utils.clock import measured

_saved: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
"""For each strategy, the checkpoints that it has written, and at which step."""


class Method(Protocol):
    """A ``ContinualCallback``, as far as the end of an experience concerns it."""

    experience_index: int
    time_part: str

    def undo_point(self) -> Callable[[], None]:
        """Return a function that puts the method back as it is now."""

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Consolidate."""


def end_experience(
    methods: Sequence[Method],
    trainer: pl.Trainer,
    module: pl.LightningModule,
    *,
    with_checkpoints: bool = False,
) -> None:
    """Consolidate callbacks and count the experience. If one fails, all are put back as they were.

    ``with_checkpoints`` writes the checkpoints of this step again, with the state that the experience leaves.

    With ``fast_dev_run``, they are put back in any case: one batch of a smoke test is not an experience. A
    ``ContinualTrainer`` does this itself at the end of the stream, so that later experiences have something to replay.
    """
    undo = [method.undo_point() for method in methods]
    completed = False
    try:
        for method in methods:
            with measured(trainer, method.time_part):
                method.on_experience_end(trainer, module)
        for method in methods:
            method.experience_index += 1
        if with_checkpoints:
            _save_again(trainer)
        completed = not trainer.fast_dev_run or getattr(trainer, "experience", None) is not None  # type: ignore[attr-defined]
    finally:
        if not completed:
            for put_back in undo:
                put_back()


def end_experience_after_training(methods: Sequence[Method], trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Consolidate callbacks once every hook ``on_train_end`` has run. Call it in one of them.

    Lightning calls the strategy's hook last: after callbacks that set the final weights in ``on_train_end``
    (``StochasticWeightAveraging``), wherever they stand in the list, and after the module's own.
    """
    strategy = trainer.strategy

    def on_train_end() -> None:
        return_method(strategy, "on_train_end")
        strategy.on_train_end()
        end_experience(methods, trainer, module, with_checkpoints=True)

    replace_method(strategy, "on_train_end", on_train_end)


def record_checkpoints(trainer: pl.Trainer) -> None:
    """Note at which step each checkpoint is written. Call it in ``setup``."""
    strategy = trainer.strategy
    if strategy in _saved:
        return
    saved = _saved[strategy] = {}
    save_checkpoint = strategy.save_checkpoint

    @wraps(save_checkpoint)
    def save_and_note(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, filepath, storage_options)
        saved[str(filepath)] = trainer.global_step

    replace_method(strategy, "save_checkpoint", save_and_note)


def _save_again(trainer: pl.Trainer) -> None:
    """Write the checkpoints of the last step again: ``ModelCheckpoint`` wrote them before the experience ended."""
    kept: set[str] = set()
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, either("ModelCheckpoint")) and not one.save_weights_only:
            kept |= {one.best_model_path, one.last_model_path, *one.best_k_models}
    last = [path for path, step in _saved.get(trainer.strategy, {}).items() if step == trainer.global_step]
    for path in last:
        if path in kept:
            trainer.save_checkpoint(path)
