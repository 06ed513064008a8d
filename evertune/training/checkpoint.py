"""Checkpoints inside an update: a killed fit resumes from the last one, with a bit-identical result."""

from __future__ import annotations

import hashlib
import random
import shutil
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evertune._lightning import (
    Checkpoint,
    is_training_done,
    pl,
    replace_method,
    return_method,
    validates_next,
)
from evertune.memory.codec import decode, encode
from evertune.shards.portable import REPLICATED
from evertune.shards.support import check_strategy, is_sharded
from evertune.strategies.deepspeed import EvertuneDeepSpeed
from evertune.streams.sampler import BucketSampler
from evertune.training.manifest import MANIFEST, CheckpointManifest, Layout
from evertune.utils.collectives import gather_bytes
from evertune.utils.files import sha256, sync_folder, sync_tree
from evertune.utils.loaders import resume_loaders
from evertune.utils.random_state import random_state, set_random_state
from evertune.utils.ranks import is_writer

_NAME = "step-"
_STATE = "update.ckpt"


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of :class:`UpdateCheckpoint` in a folder, for ``fit(ckpt_path=...)``, or None.

    Example:
        >>> latest("there/is/none")
    """
    steps = [path for path in Path(directory).glob(f"{_NAME}*") if (path / MANIFEST).is_file()]
    newest = max(steps, key=lambda path: int(path.name.removeprefix(_NAME)), default=None)
    return None if newest is None else newest / _STATE


class UpdateCheckpoint(Checkpoint):
    """Lets a killed ``fit`` resume where it was, with bit-identical weights and learning state.

    Every ``every_n_steps`` optimizer steps, all ranks write everything that the rest of the fit depends on: weights,
    optimizer, learning-rate schedule, position in the data, state of the callbacks, and the state of the random
    generators of every rank. A checkpoint is temporary, and only for the same version of the code; published versions
    are saved differently. Writes are atomic: a checkpoint gets its final name once it is completely on disk, and only
    then is the previous one removed. No random numbers are drawn: a fit with checkpoints is bit-identical to one
    without.

    **On a different number of processes** (a node was lost, or came back), a fit resumes with the same optimizer steps:
    each uses the examples that it would have used, if the step size (processes x ``batch_size`` x
    ``accumulate_grad_batches``; see :func:`evertune.training.elastic.layout`) stays the same and the loader is that of
    ``ExperienceDataModule``. The weights are then equal up to rounding. The random generators of all ranks but the
    first are reseeded deterministically, so dropout differs. If ``replay_ratio`` does not give a whole number of
    examples per batch, up to one example per rank is replayed twice or not at all. Under
    ``evertune_deepspeed_stage_...`` the stage may change, too, and ``evertune_fsdp2`` may take its place.

    No checkpoint is written at the end of an epoch or right before validation: it is written one step later. Metrics
    averaged over an epoch start over when a fit resumes in the middle of it.

    A bit-identical result requires a loader that resumes with the next batch, as that of ``ExperienceDataModule`` does,
    and examples that are not changed at random in worker processes.

    Checkpoints consist of safetensors, JSON and files for ``torch.load(weights_only=True)``, each with its SHA-256. The
    exceptions are Lightning's own DeepSpeed strategy, and optimizers offloaded to NVMe or in part: they use DeepSpeed's
    checkpoints, which require the same number of processes and the same stage, and are read with pickle, so do not
    resume from a folder that others can write to.

    Args:
        directory: Folder of a single update, shared by all nodes. A fit that does not resume from its checkpoint
            empties it when training starts.
        every_n_steps: Optimizer steps between two checkpoints: the most that a kill can cost. The default of 100 keeps
            the overhead at a few percent for models of MiniLM's size.

    Raises:
        ValueError: If ``every_n_steps`` is not positive. When ``fit`` resumes, if a file of the checkpoint is damaged,
            or the checkpoint is of another kind of strategy or another step size.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[Replay(memory_size=2_000), UpdateCheckpoint("checkpoints")])
        trainer.fit(module, datamodule, ckpt_path=latest("checkpoints"))  # None at first: starts from the beginning
    """

    across_experiences = True

    def __init__(self, directory: str | Path, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be positive, got {every_n_steps}")
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self._resumed: Path | None = None  # the folder of the checkpoint that this fit resumes from
        self._saved: Layout | None = None  # the layout of the fit that wrote it
        self._last_step = 0
        self._saved_step: int | None = None  # the step of the newest checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have checkpoints verified before the strategy loads them."""
        if stage != "fit":
            return
        check_strategy(trainer, "UpdateCheckpoint")
        self._resumed = None
        load_checkpoint = trainer.strategy.load_checkpoint

        @wraps(load_checkpoint)
        def check_and_load(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            folder = Path(checkpoint_path).parent
            if not (folder / MANIFEST).is_file():
                return load_checkpoint(checkpoint_path, weights_only=weights_only)
            # Before loading, so that a damaged or foreign checkpoint changes no weights.
            manifest = CheckpointManifest.read(folder)
            saved = manifest.layout
            self._resumed, self._saved = folder, saved
            _check_strategy(folder, saved, Layout.of(trainer))
            _check_files(folder, manifest.files, trainer)
            checkpoint = load_checkpoint(checkpoint_path, weights_only=weights_only is not False)
            _set_buffers(decode(self._rank_file(trainer).read_bytes())["buffers"], pl_module)
            return _recounted(checkpoint, saved.accumulation, trainer.accumulate_grad_batches)

        replace_method(trainer.strategy, "load_checkpoint", check_and_load)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the random generators. The loader's iterator exists by now, but no batch has been read yet."""
        resume_loaders(trainer)
        if self._resumed is not None:
            assert self._saved is not None
            _check_steps(self._resumed, self._saved, trainer)
            content = self._rank_file(trainer).read_bytes()
            if self._saved.processes == trainer.world_size or is_writer():  # all ranks share the draws of rank 0
                set_random_state(decode(content)["random"], trainer.strategy.root_device)
            else:
                _reseed(content, trainer)
        self._last_step = trainer.global_step
        self._saved_step = None if self._resumed is None else trainer.global_step
        if is_writer():
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
            Whether a checkpoint of this step exists, from this call or an earlier one. None is written inside an
            accumulation, at the end of an epoch or of the fit, and right before validation: retry after the next batch.
        """
        if trainer.global_step == self._saved_step:
            return True
        loop = trainer.fit_loop.epoch_loop
        stepped = (loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or is_training_done(trainer) or trainer.should_stop or validates_next(trainer):
            return False
        self._save(trainer)
        self._saved_step = trainer.global_step
        return True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the strategy."""
        return_method(trainer.strategy, "load_checkpoint")

    def _rank_file(self, trainer: pl.Trainer) -> Path:
        """The file with this rank's own state; on a different number of processes, that of rank 0."""
        assert self._resumed is not None
        assert self._saved is not None
        same = self._saved.processes == trainer.world_size
        return self._resumed / _rank_name(trainer.global_rank if same else 0)

    def _save(self, trainer: pl.Trainer) -> None:
        """Write to a hidden temporary folder, then rename it."""
        whole = self.directory / f"{_NAME}{trainer.global_step}"
        draft = _hidden(whole)
        draft.mkdir(parents=True, exist_ok=True)
        # Collective: under DeepSpeed and FSDP2 every rank writes its part of the folder.
        self._write_state(trainer, draft / _STATE)
        own = draft / _rank_name(trainer.global_rank)
        own.write_bytes(encode({"random": random_state(trainer.strategy.root_device), "buffers": _buffers(trainer)}))
        digests = [digest.decode() for digest in gather_bytes(sha256(own).encode(), trainer)]
        trainer.strategy.barrier("the parts of a checkpoint")  # the manifest must come after all parts
        if is_writer():
            alike = [draft / _STATE] if (draft / _STATE).is_file() else _written_by_rank_0(draft / _STATE)
            files = {str(path.relative_to(draft)): sha256(path) for path in alike}
            files |= {_rank_name(rank): digest for rank, digest in enumerate(digests)}
            CheckpointManifest(Layout.of(trainer), files).write(draft)
            # Data first, then the rename, then the folder's entry: a power failure leaves the old or the new checkpoint
            # complete.
            sync_tree(draft)
            draft.rename(whole)
            sync_folder(self.directory)
            self._remove_all_but(whole)
        trainer.strategy.barrier("a whole checkpoint")

    @staticmethod
    def _write_state(trainer: pl.Trainer, path: Path) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, EvertuneDeepSpeed):
            trainer.save_checkpoint(path)
            return
        strategy.portable = strategy.can_be_portable
        try:
            trainer.save_checkpoint(path)
        finally:
            strategy.portable = False

    def _remove_all_but(self, kept: Path | None) -> None:
        """Remove older checkpoints and leftovers of killed processes. A rename first hides one while it is removed."""
        for path in self.directory.glob(f".{_NAME}*"):
            shutil.rmtree(path)
        for path in self.directory.glob(f"{_NAME}*"):
            if kept is None or path.resolve() != kept.resolve():
                shutil.rmtree(path.rename(_hidden(path)))


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}.state"


def _written_by_rank_0(state: Path) -> list[Path]:
    """The files that rank 0 wrote to a folder with the parts of all ranks. Its indices hold the others' digests."""
    return [path for path in (state / REPLICATED, *state.rglob("index.json")) if path.is_file()]


def _check_strategy(folder: Path, saved: Layout, here: Layout) -> None:
    """Reject a checkpoint whose weights this fit cannot read."""
    if not here.can_read(saved):
        raise ValueError(
            f"the checkpoint {folder} was written by {saved.describe_processes()}, this fit has "
            f"{here.describe_processes()}. Inside an update the kind of strategy must stay the same, and where "
            "checkpoints are DeepSpeed's own the number of processes and the stage too: resume with the same settings "
            "(ZeRO works on one process), or delete the checkpoint and restart the update from the previous version. "
            "Between two updates they may change"
        )


def _check_files(folder: Path, files: dict[str, str], trainer: pl.Trainer) -> None:
    """Verify the digests of the files that every rank reads, and of this rank's own file."""
    for name, expected in files.items():
        path = folder / name
        if name.startswith("rank-") and name not in (_rank_name(0), _rank_name(trainer.global_rank)):
            continue
        if not path.is_file() or sha256(path) != expected:
            raise ValueError(
                f"{path} is damaged or missing: it does not match its digest in {MANIFEST}. Delete the checkpoint and "
                "restart the update from scratch"
            )


def _check_steps(folder: Path, saved: Layout, trainer: pl.Trainer) -> None:
    """Reject a checkpoint if the optimizer steps would use other examples."""
    here = Layout.of(trainer)
    if here.has_same_batches(saved):
        return
    if saved.step_size != here.step_size:
        raise ValueError(
            f"the checkpoint {folder} was written in optimizer steps of {saved.describe_step()} examples, this fit has "
            f"{here.describe_step()}: keep the product, as evertune.training.elastic.layout does, or delete the "
            "checkpoint and restart the update from scratch"
        )
    if not isinstance(getattr(trainer.train_dataloader, "sampler", None), BucketSampler):
        raise ValueError(
            f"the checkpoint {folder} was written by {saved.describe_step()} examples a step, this fit has "
            f"{here.describe_step()}: only loaders of ExperienceDataModule deal the same examples to another number of "
            "processes. Use one, or resume with the same settings"
        )


def _recounted(checkpoint: dict[str, Any], saved: int, here: int) -> dict[str, Any]:
    """Convert Lightning's counts of batches to another accumulation, for the same number of optimizer steps.

    Args:
        checkpoint: Lightning's checkpoint, changed in place.
        saved: Batches in an optimizer step when it was written.
        here: Batches in an optimizer step now.
    """
    if saved == here:
        return checkpoint
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if progress["total"]["ready"] != checkpoint["global_step"] * saved:
        raise ValueError(
            f"the checkpoint has {progress['total']['ready']} batches in {checkpoint['global_step']} optimizer steps, "
            f"not {saved} in each, so it can only be resumed with accumulate_grad_batches={saved}"
        )
    for counts in (progress["total"], progress["current"]):
        batches = counts["ready"] // saved * here
        running = counts["ready"] - counts["completed"]  # the batch during which the checkpoint was written
        counts |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - running}
    for loader in checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", []):
        if loader.keys() == {"epoch", "batch"}:  # those of a ResumableLoader
            loader["batch"] = loader["batch"] // saved * here
    return checkpoint


def _buffers(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    """The persistent buffers of this rank; where weights are not sharded, they are among those of the checkpoint."""
    if not is_sharded(trainer):
        return {}
    persistent = trainer.lightning_module.state_dict().keys()
    return {name: buffer for name, buffer in trainer.lightning_module.named_buffers() if name in persistent}


def _set_buffers(buffers: dict[str, torch.Tensor], module: pl.LightningModule) -> None:
    for name, buffer in module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def _reseed(content: bytes, trainer: pl.Trainer) -> None:
    """Seed this rank's generators from the content of a checkpoint, so that each resumption draws the same numbers."""
    seed = int.from_bytes(hashlib.sha256(content).digest()[:3]) + trainer.global_rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
