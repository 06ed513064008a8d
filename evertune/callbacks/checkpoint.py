"""Checkpoints inside an update: killed at any moment, it goes on from the last one and ends in the same bits."""

from __future__ import annotations

import json
import random
import shutil
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import DeepSpeedStrategy

from evertune.files import sync_folder, sync_tree, write_atomically
from evertune.memory.codec import decode, encode
from evertune.resume import resume_loaders
from evertune.strategies.support import check_strategy

_NAME = "step-"
_STATE = "update.ckpt"
_MANIFEST = "checkpoint.json"


def latest(directory: str | Path) -> Path | None:
    """The newest whole checkpoint that :class:`UpdateCheckpoint` left in a folder, for ``fit(ckpt_path=...)``.

    Example:
        >>> latest("there/is/none")
    """
    steps = [path for path in Path(directory).glob(f"{_NAME}*") if (path / _MANIFEST).is_file()]
    newest = max(steps, key=lambda path: int(path.name.removeprefix(_NAME)), default=None)
    return None if newest is None else newest / _STATE


class UpdateCheckpoint(Checkpoint):
    """Lets a killed ``fit`` go on where it was, to the same weights and learning state, bit for bit.

    Every ``every_n_steps`` optimizer steps all ranks write all that the rest of the fit depends on: weights, optimizer,
    schedule, the place in the data, what the callbacks know, and the state of the random generators of every rank. It
    is scratch, for the same code on as many processes; what is published is saved in other ways. A checkpoint appears
    under its name once it is whole and on the disk; only then the one before it is removed. Nothing is drawn from a
    random generator: a fit with checkpoints ends in the same bits as one without.

    A step that ends an epoch, or that validation follows, is passed over: the checkpoint comes a step later. Metrics
    that are averaged over an epoch start anew when a fit goes on in the middle of it.

    The same bits need a loader that goes on with the next batch, as that of ``ExperienceDataModule`` does, and
    examples that are not changed at random in worker processes.

    Under DeepSpeed the checkpoint is DeepSpeed's own, which is read with pickle: do not resume from a folder that
    others can write to. All other checkpoints are loaded with ``weights_only=True``.

    Args:
        directory: belongs to one update, and all nodes must see it. A fit that does not go on from its checkpoint
            empties it when training starts.
        every_n_steps: what a kill costs at most. The default, 100, keeps the time for checkpoints to a few percent for
            models of MiniLM's size.

    Raises:
        ValueError: when ``every_n_steps`` is not positive; when ``fit`` goes on from a checkpoint of another number of
            processes, or of another ZeRO stage.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[Replay(memory_size=2_000), UpdateCheckpoint("checkpoints")])
        trainer.fit(module, datamodule, ckpt_path=latest("checkpoints"))  # None at first: it starts at the beginning
    """

    def __init__(self, directory: str | Path, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be positive, got {every_n_steps}")
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self._resumed: Path | None = None  # the step's folder that this fit goes on from
        self._last_step = 0
        self._saved_step: int | None = None  # the step of the newest checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From now on, look at a checkpoint before the strategy loads it."""
        if stage != "fit":
            return
        check_strategy(trainer, "UpdateCheckpoint")
        self._resumed = None
        load_checkpoint = trainer.strategy.load_checkpoint

        @wraps(load_checkpoint)
        def check_and_load(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            folder = Path(checkpoint_path).parent
            if (folder / _MANIFEST).is_file():
                _check_layout(folder, trainer)
                self._resumed, weights_only = folder, weights_only is not False
            return load_checkpoint(checkpoint_path, weights_only=weights_only)

        trainer.strategy.load_checkpoint = check_and_load  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring back the random generators: the loader's iterator has been made, and no batch has been read yet."""
        resume_loaders(trainer)
        if self._resumed is not None:
            _set_random_state(decode((self._resumed / _random_file(trainer)).read_bytes()), trainer)
        self._last_step = trainer.global_step
        self._saved_step = None if self._resumed is None else trainer.global_step
        if trainer.is_global_zero:
            self._remove_all_but(self._resumed)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint when one is due. Lightning calls checkpoint callbacks after all others."""
        if trainer.global_step - self._last_step >= self.every_n_steps and self.save_now(trainer):
            self._last_step = trainer.global_step

    def save_now(self, trainer: pl.Trainer) -> bool:
        """Write a checkpoint at this step, due or not. Call it on every rank, in ``on_train_batch_end``.

        Returns:
            Whether there is a checkpoint of this step, from this call or before. Not so inside an accumulation, at the
            end of an epoch or of the fit, and where validation follows: try again after the next batch.
        """
        if trainer.global_step == self._saved_step:
            return True
        loop = trainer.fit_loop.epoch_loop
        stepped = (loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or loop._is_training_done or trainer.should_stop or self._validates_next(trainer):
            return False
        self._save(trainer)
        self._saved_step = trainer.global_step
        return True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the strategy as it was."""
        vars(trainer.strategy).pop("load_checkpoint", None)

    @staticmethod
    def _validates_next(trainer: pl.Trainer) -> bool:
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)

    def _save(self, trainer: pl.Trainer) -> None:
        """Write everything under a name that nobody looks for, and give it its own name at last."""
        whole = self.directory / f"{_NAME}{trainer.global_step}"
        draft = _hidden(whole)
        draft.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(draft / _STATE)
        (draft / _random_file(trainer)).write_bytes(encode(_random_state(trainer)))
        trainer.strategy.barrier("the parts of a checkpoint")
        if trainer.is_global_zero:
            write_atomically(draft / _MANIFEST, json.dumps(_layout(trainer)).encode())
            sync_tree(draft)
            draft.rename(whole)
            sync_folder(self.directory)
            self._remove_all_but(whole)

    def _remove_all_but(self, kept: Path | None) -> None:
        """Remove older checkpoints and what a killed process has left; one that is half removed has no name."""
        for path in self.directory.glob(f".{_NAME}*"):
            shutil.rmtree(path)
        for path in self.directory.glob(f"{_NAME}*"):
            if kept is None or path.resolve() != kept.resolve():
                shutil.rmtree(path.rename(_hidden(path)))


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _layout(trainer: pl.Trainer) -> dict[str, int]:
    """What a checkpoint's parts depend on: the number of processes, and the stage of ZeRO (0 without it)."""
    strategy = trainer.strategy
    config: Any = strategy.config if isinstance(strategy, DeepSpeedStrategy) else None
    stage = config["zero_optimization"]["stage"] if config else 0
    return {"processes": trainer.world_size, "zero_stage": stage}


def _check_layout(folder: Path, trainer: pl.Trainer) -> None:
    saved, here = json.loads((folder / _MANIFEST).read_bytes()), _layout(trainer)
    if saved != here:
        raise ValueError(
            f"the checkpoint {folder} was written by {_in_words(saved)}, this fit has {_in_words(here)}. Inside an "
            "update both must stay the same: go on as it was written, or delete the checkpoint and learn the update "
            "anew from the version before it. Between two updates they may change"
        )


def _in_words(layout: dict[str, int]) -> str:
    processes, stage = layout["processes"], layout["zero_stage"]
    return f"{processes} process{'es' * (processes > 1)} {f'with ZeRO-{stage}' if stage else 'without ZeRO'}"


def _random_file(trainer: pl.Trainer) -> str:
    return f"random-{trainer.global_rank:05d}.state"


def _random_state(trainer: pl.Trainer) -> dict[str, Any]:
    """The global random generators of this rank."""
    device = trainer.strategy.root_device
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], trainer: pl.Trainer) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], trainer.strategy.root_device)
