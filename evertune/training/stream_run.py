"""Resumable runs over a stream: the state after each experience, in a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune._lightning import Callback, pl
from evertune.callbacks.base import named_callbacks
from evertune.lightning_modules.saving import load_weights, save_weights
from evertune.memory.codec import decode, encode
from evertune.strategies.masters import LiveMasters, SavedMasters, leave_masters, masters_of
from evertune.training.checkpoint import UpdateCheckpoint, latest
from evertune.training.heartbeat import Heartbeat
from evertune.training.preemption import Preemption
from evertune.utils.files import delete, sync_folder, sync_tree, write_atomically
from evertune.utils.random_state import random_state, set_random_state
from evertune.utils.ranks import barrier, is_leader, is_writer, rank_and_world_size

if TYPE_CHECKING:
    from evertune.streams.experience import Experience

_STATE = "state-"
_RUN = "run.json"
_STEP = "step.json"
_MODULE = "model"
_WEIGHTS = "weights.safetensors"
_MASTERS = "masters"
_CALLBACKS = "callbacks"


class StreamRun:
    """The folder of a run over a stream. A run resumes where the previous one in the same folder stopped.

    After each experience, the folder holds the weights and the state of the continual callbacks; within an experience,
    the checkpoints of :class:`~evertune.callbacks.UpdateCheckpoint`. On the same number of processes, an interrupted
    run is bit-identical to an uninterrupted one. Writes are atomic: a state is renamed to its final name only when it
    is completely on disk.

    Args:
        directory: Folder of a single run, shared by all nodes.
        experiences: Experiences of the stream.
        every_n_steps: Optimizer steps between two checkpoints inside an experience.

    Raises:
        ValueError: If the folder holds a run over other experiences.
    """

    def __init__(self, directory: str | Path, experiences: Sequence[Experience], every_n_steps: int) -> None:
        self.directory = Path(directory)
        self.checkpoint = UpdateCheckpoint(self.directory / "checkpoints", every_n_steps)
        self._generators = _Generators()
        self._describe(experiences)

    def callbacks(self) -> list[pl.Callback]:
        """The callbacks of every fit of the run: checkpoints, preemption, and a heartbeat for the launcher."""
        launched = "EVERTUNE_NODE_DIR" in os.environ  # SIGTERM from its supervisor means a restart, not preemption
        signals = (signal.SIGUSR2,) if launched else (signal.SIGUSR2, signal.SIGTERM)
        return [self._generators, self.checkpoint, Preemption(signals), Heartbeat()]

    def resume(self, trainer: pl.Trainer, module: pl.LightningModule, experiences: Sequence[Experience]) -> int:
        """Restore the saved state. Call on every rank, before the first fit.

        Returns:
            The number of experiences that have been learned.
        """
        learned = max((int(path.name.removeprefix(_STATE)) for path in self.directory.glob(f"{_STATE}*")), default=0)
        self._checkpoints_of(learned)
        if not learned:
            return 0
        prepare = getattr(module, "prepare_experience", None)
        if callable(prepare):
            # The head must have the classes learned so far before their weights are loaded into it.
            for experience in experiences[:learned]:
                prepare(experience)
        state = self.directory / f"{_STATE}{learned}"
        _load_module(module, state)
        for name, callback in named_callbacks(trainer):
            if (state / _CALLBACKS / name).is_dir():
                callback.load(state / _CALLBACKS / name)
        # No fit follows that would build the model.
        if learned == len(experiences):
            module.configure_model()
        random = state / _random_file(trainer.global_rank)
        if random.is_file():  # missing if there are more processes than before
            self._generators.state = decode(random.read_bytes())
        return learned

    def step_size(self, trainer: pl.Trainer, datamodule: Any) -> int | None:
        """Examples in an optimizer step over all processes, fixed at the first start of the run.

        None if the datamodule has no ``batch_size``.
        """
        path = self.directory / _STEP
        if path.is_file():
            return int(json.loads(path.read_bytes())["step_size"])
        batch_size = getattr(datamodule, "batch_size", None)
        if batch_size is None:
            return None
        size: int = batch_size * trainer.world_size * trainer.accumulate_grad_batches
        if is_leader():
            write_atomically(path, json.dumps({"step_size": size}).encode())
        return size

    @property
    def ckpt_path(self) -> Path | None:
        """The checkpoint inside the next experience to resume from, or None."""
        return latest(self.checkpoint.directory)

    @property
    def breakdown(self) -> dict[str, float]:
        """Seconds spent on the experiences that have been learned, by what they were spent on."""
        states = [json.loads(path.read_bytes())["seconds"] for path in self.directory.glob(f"{_STATE}*/{_RUN}")]
        return max(states, key=lambda spent: sum(spent.values()), default={})

    def commit(
        self, trainer: pl.Trainer, module: pl.LightningModule, learned: int, seconds: Mapping[str, float]
    ) -> None:
        """Save the state and remove the previous one. Call on every rank.

        Args:
            trainer: Trainer with the callbacks to save.
            module: Trained module.
            learned: Number of experiences that have been learned.
            seconds: Seconds that they have taken, by what they were spent on.
        """
        whole = self.directory / f"{_STATE}{learned}"
        draft = whole.with_name(f".{whole.name}")
        if is_writer():
            delete(draft)
            draft.mkdir(parents=True)
        barrier()
        _save_module(module, draft)
        for name, callback in named_callbacks(trainer):
            callback.save(draft / _CALLBACKS / name)
        # Every rank has its own generators, so every rank writes its own file.
        self._generators.state = random_state(trainer.strategy.root_device)
        (draft / _random_file(rank_and_world_size()[0])).write_bytes(encode(self._generators.state))
        barrier()
        if is_writer():
            write_atomically(draft / _RUN, json.dumps({"seconds": dict(seconds)}).encode())
            sync_tree(draft)
            draft.rename(whole)
            sync_folder(self.directory)
            # Only after the rename: until then, the checkpoint is the only way to resume this experience.
            delete(self.checkpoint.directory)
            for path in self.directory.glob(f"{_STATE}*"):
                if path != whole:
                    shutil.rmtree(path.rename(path.with_name(f".{path.name}")))
        barrier()
        self._checkpoints_of(learned)

    def _checkpoints_of(self, learned: int) -> None:
        """Give each experience its own checkpoints, so that those of another one are never resumed."""
        self.checkpoint.directory = self.directory / f"checkpoints-{learned}"

    def _describe(self, experiences: Sequence[Experience]) -> None:
        """Record the experiences of the run, or check that they are the same as before."""
        path = self.directory / _RUN
        here = [{"name": e.name, "examples": len(e.train), "classes": list(e.classes)} for e in experiences]
        if path.is_file():
            there = json.loads(path.read_bytes())["experiences"]
            if there != here:
                differs = next((f"{a} now, {b} then" for a, b in zip(here, there, strict=False) if a != b), None)
                raise ValueError(
                    f"{self.directory} holds a run over other experiences: "
                    f"{differs or f'{len(here)} now, {len(there)} then'}; use another folder, or delete this one"
                )
        elif is_leader():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"experiences": here}, indent=1).encode())


class _Generators(Callback):
    """Starts each fit with the random state of the previous one, whatever random numbers were drawn in between."""

    across_experiences = True
    state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.state is not None:
            set_random_state(self.state, trainer.strategy.root_device)


def _save_module(module: Any, folder: Path) -> None:
    masters = masters_of(module)  # of 16-bit training under DeepSpeed
    if isinstance(masters, LiveMasters):
        masters.save(folder / _MASTERS)
    if hasattr(module, "start_from"):
        module.save_pretrained(folder / _MODULE)
    else:
        save_weights(module, folder / _WEIGHTS)


def _load_module(module: Any, folder: Path) -> None:
    if (folder / _MASTERS).is_dir():
        leave_masters(module, SavedMasters(folder / _MASTERS))
    if hasattr(module, "start_from"):
        module.start_from(folder / _MODULE)
        return
    module.configure_model()
    load_weights(module, folder / _WEIGHTS)


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.state"
