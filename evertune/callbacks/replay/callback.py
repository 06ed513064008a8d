"""Experience replay: past examples are mixed into every training batch."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from evertune._lightning import isolate_rng, n_started, pl, reset_loaders
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.replay.collate import UNSTORABLE, Extra, Joined, ReplayCollate, Schedule, restarting
from evertune.callbacks.replay.features import check_features, default_features, default_losses, features_of
from evertune.callbacks.replay.interception import intercept, release
from evertune.callbacks.replay.lengths import StepLengths
from evertune.callbacks.replay.progress import Progress, batches_ahead, batches_done, end_of_batches
from evertune.callbacks.replay.readers import Encoded, IdReader, LabelReader, Parts
from evertune.callbacks.replay.self_answers import SelfAnswers, check_prompt, check_writes, slots_to_draw
from evertune.callbacks.replay.spool import (
    Capture,
    Record,
    best_records,
    parse_records,
    prune_records,
    read_records,
    serialize_records,
)
from evertune.callbacks.state import load_state
from evertune.callbacks.trained import experience_name, reads_by_index, recorded, recorded_batches
from evertune.memory.codec import encode
from evertune.memory.draws import Draws
from evertune.memory.memory import Content, ReplayMemory
from evertune.memory.policies import Policy
from evertune.shards.support import check_strategy
from evertune.strategies.deepspeed import warn_about_stock_deepspeed
from evertune.tasks.base import task_of
from evertune.utils.batches import batch_size_of, to_device
from evertune.utils.collectives import gather_bytes
from evertune.utils.loaders import restart_loaders
from evertune.utils.ranks import barrier, is_writer

Source = Literal["data", "self"]
_EXTRA = (0, 2)  # the name of the extra examples' draws
_STATE = "replay.json"
_REFUSED = re.compile(UNSTORABLE.format(r"(\d+)", r"(\d+)"))


@dataclass
class _Saved:
    """The content of the file that :meth:`Replay.save` writes beside the memory."""

    experience_index: int


class Replay(ContinualCallback):
    """Mixes examples of a memory into every training batch (experience replay).

    Examples are added before collation: the ``collate_fn`` of the training loader is called with the new examples
    followed by the replayed ones, so padding, tuples and custom batch types work, including in worker processes. The
    loader and the module are not modified. When ``fit`` completes, the memory takes in the new experience; a ``fit``
    that fails leaves it as it was. During the first experience there is nothing to replay.

    Replay is a strong and cheap baseline (Chaudhry et al. 2019, "On tiny episodic memories"; Rolnick et al. 2019).

    All ranks share one memory. The draws of an update are one sequence distributed over the ranks, and which examples
    are kept depends only on their ids and the seed: with the same global batch, the result is the same on any number of
    processes, and after a resume. If the training loader has a :class:`~evertune.streams.BucketSampler`, as that of an
    ``ExperienceDataModule``, texts of about the same length are replayed beside the new ones, to save padding.

    The memory is filled with what was trained on: with ``limit_train_batches``, ``max_steps`` or an early stop, with
    nothing else, and after ``fast_dev_run`` with nothing. With a map-style dataset, it is filled by index. It is filled
    from the examples as they pass the ``collate_fn`` (each is encoded once, in the process that loads it) if the
    dataset is iterable, the sampler or batch sampler is a custom one, Lightning reloads the loader within the ``fit``,
    or a ``DriftTrigger`` ends experiences in the middle of it.

    Args:
        memory_size: Number of examples kept in memory, over all ranks.
        policy: Selection policy: ``"reservoir"`` (default; a uniform sample of all examples seen),
            ``"class_balanced"``, ``"ring"`` (the newest of each class), ``"herding"`` (nearest to the class means of
            ``features``), ``"loss_aware"`` (of each class, examples with a large loss more often), or a ``Policy``.
        replay_ratio: Replayed examples per new one in a batch. 1 (default) doubles the batch; 0.05 is common in
            continued training of language models; 0 only keeps the memory, for methods that read it (``AGEM``).
        label: The class of an example: a function, a key (of a dict) or a position (in a tuple). By default that of the
            module's task: ``labels``, ``label``, ``targets`` or ``target``, or the last item of a tuple. Several labels
            together count as one class.
        id: The id of an example, for :meth:`forget`: a function, a key or a position. By default the number of the
            experience and the index in the dataset, or a hash of the content if there is no index.
        features: Function ``(module, batch) -> tensor [batch, d]`` for herding. By default ``module.features`` if the
            module has such a method, else its logits. For ``"loss_aware"``, the losses ``[batch, 1]``, by default
            those of the logits and targets that the module's task finds.
        loader: With several training loaders (a dict, a list or a ``CombinedLoader``), the key or position of the one
            whose batches get replayed examples; the others are left alone. Its examples are kept as they pass.
        seed: Seed of the selection and of the order of the draws. Default: 0.
        directory: Folder for the working file (:class:`~evertune.memory.ReplayMemory`). By default the system's
            temporary folder.
        extra: Examples that join every batch after the replayed ones, from the first experience on, and are never put
            in the memory: a part of the data of pretraining, for example. A dataset that is read by index, whose
            examples the loader's ``collate_fn`` can join to the new ones.
        extra_ratio: Examples of ``extra`` per new one in a batch. Default: 0.05.
        source: Where replayed answers come from: ``"data"`` (default), as they were learned; or ``"self"``, for modules
            that write texts: the memory keeps only prompts, and at the start of an update the model answers those that
            the update can draw, and those of ``extra``. See the notes.

    With ``source="self"`` nothing of an answer is kept, and the old model's own answers are what its update must not
    change (Huang et al. 2024, "Mitigating Catastrophic Forgetting in Large Language Models with Self-Synthesized
    Rehearsal"). Answers are written as the module's ``generation`` says, greedily by default; sampled ones are seeded
    by the seed and the update, and the same on any number of ranks. Answers that are empty, that ``max_new_tokens``
    cuts off or that repeat themselves are dropped, and so are prompts that leave no room for an answer: how many is
    reported, and in ``replay.answers.counts``. A checkpoint holds the answers of its update.

    Raises:
        ValueError: If ``memory_size`` or ``extra_ratio`` is not positive, ``replay_ratio`` is negative, ``source`` is
            unknown, or ``extra`` cannot be read by index. In ``setup``, if the strategy is not supported, there is a
            second ``Replay``, or with ``source="self"`` the module writes no texts. Before training, if there are
            several training loaders and no ``loader``, or with ``source="self"`` the data has no prompts.
        TypeError: Before training, if the loader is not a ``DataLoader`` or does not collate. When an example comes
            that contains something that cannot be stored.
        ValueError: At a batch, if its ``collate_fn`` cannot join the examples of the past, which have other keys or
            shapes.

    Example:
        >>> import pytorch_lightning as pl
        >>> from evertune.callbacks.replay.callback import Replay
        >>> replay = Replay(memory_size=2_000)
        >>> trainer = pl.Trainer(callbacks=[replay], logger=False, accelerator="cpu", enable_progress_bar=False)
        >>> replay  # grows with trainer.fit(module, loader)
        Replay(0 of 2000 examples, policy='reservoir', 0 experiences)
    """

    time_part = "replay"
    candidates: int = 1  # draws for each example to replay

    @staticmethod
    def of(trainer: pl.Trainer) -> Replay | None:
        """The first one among the callbacks of a trainer."""
        return next((one for one in trainer.callbacks if isinstance(one, Replay)), None)  # type: ignore[attr-defined]

    def __init__(
        self,
        memory_size: int,
        policy: str | Policy = "reservoir",
        replay_ratio: float = 1.0,
        label: str | int | Callable[[Any], Any] | None = None,
        id: str | int | Callable[[Any], Any] | None = None,
        features: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
        directory: str | Path | None = None,
        loader: str | int | None = None,
        extra: Any = None,
        extra_ratio: float = 0.05,
        source: Source = "data",
    ) -> None:
        if not (replay_ratio >= 0 and math.isfinite(replay_ratio)):
            raise ValueError(f"replay_ratio must be finite and not negative, got {replay_ratio}")
        if not (extra_ratio > 0 and math.isfinite(extra_ratio)):
            raise ValueError(f"extra_ratio must be positive and finite, got {extra_ratio}")
        if source not in get_args(Source):
            raise ValueError(f"source must be one of {list(get_args(Source))}, got {source!r}")
        if extra is not None and not (hasattr(extra, "__getitem__") and hasattr(extra, "__len__") and len(extra)):
            kind = type(extra).__name__
            raise ValueError(f"extra must be a dataset that is read by index, with at least one example, got a {kind}")
        self.extra = None if extra is None else Extra(extra, extra_ratio, Draws(len(extra), seed, _EXTRA))
        self.source = source
        content: Content = "examples" if source == "data" else "prompts"
        self.memory = ReplayMemory(memory_size, policy, seed, directory, content)
        self.answers = None if source == "data" else SelfAnswers(memory_size, seed, directory)
        """What the model has answered to the prompts of the memory in this update, with ``source="self"``."""
        self.replay_ratio = replay_ratio
        self.label_of = LabelReader(label)
        self.id_of = None if id is None else IdReader(id)
        self.features = features or (default_losses if self.memory.policy.needs_losses else default_features)
        self.loader = loader
        self._trainer: pl.Trainer | None = None
        self._loader: DataLoader[Any] | None = None
        self._unwrapped: DataLoader[Any] | None = None  # the user's loader
        self._lengths: StepLengths | None = None  # of the batches to come, if the loader's sampler knows them
        self._schedule = Schedule()
        self._is_writer = True
        self._set_up_early = False  # before Lightning read its part of the checkpoint
        self._progress = Progress()
        self._resumed = False  # whether this fit resumes from a checkpoint with this callback's state
        self._captured = b""  # records from that checkpoint
        self._resumed_batches: dict[str, Any] = {}  # the indices trained on, from that checkpoint
        self._ended = False  # whether the experience has ended and no other has started
        self._skipped: set[int] = set()  # batches that the module's on_train_batch_start left out
        self._n_skipped = 0  # before this fit
        self._tried = False  # whether the features of this fit's first batch were checked

    def __repr__(self) -> str:
        """The size, the policy and the number of experiences of the memory."""
        memory = self.memory
        return (
            f"{type(self).__name__}({len(memory)} of {memory.memory_size} examples, policy={memory.policy.name!r}, "
            f"{self.experience_index} experiences)"
        )

    @property
    def drawn(self) -> ReplayMemory:
        """What replayed examples are drawn from: the memory, or the model's answers to its prompts."""
        return self.memory if self.answers is None else self.answers.memory

    def check_whole(self, who: str) -> None:
        """Refuse a callback that reads the examples of the memory, where it holds prompts alone.

        Raises:
            ValueError: If it does.
        """
        if self.source == "self":
            raise ValueError(
                f"{who} reads the examples of the memory, and with Replay(source='self') it keeps prompts without "
                f"answers: leave {who} out, or use source='data'"
            )

    # --- the loader

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, agree on a memory with the other ranks, and intercept the training loader."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        warn_about_stock_deepspeed(trainer, type(self).__name__)
        if any(isinstance(other, Replay) and other is not self for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError("two Replay callbacks in one Trainer; use one, with the sum of the memory sizes")
        self.label_of.task, self._tried = task_of(pl_module), False
        if self.answers is not None:
            check_writes(pl_module)
            self.answers.is_complete = False
        self._trainer, self._loader, self._schedule, self._resumed = trainer, None, Schedule(), False
        self._resumed_batches, self._captured, self._ended, self._skipped = {}, b"", False, set()
        self._is_writer = trainer.local_rank == 0
        if trainer.world_size > 1:
            # All ranks of a node work on the files of rank 0; on other nodes, local rank 0 writes its own copy of them.
            for memory in dict.fromkeys((self.memory, self.drawn)):
                directory, generation = trainer.strategy.broadcast((str(memory.directory), memory.generation))
                if directory != str(memory.directory):
                    memory.share(directory, generation, self._is_writer)
            trainer.strategy.barrier("replay memory")
        for spool in self._spools():
            spool.unlink()
        intercept(trainer, self.loader, self._wrap)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Override the start of an experience: it is announced when the loader is set up, possibly before this hook."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart a loader that was set up before the checkpoint was read."""
        self._n_skipped = batches_done(trainer) - n_started(trainer)
        batches = recorded_batches(self._loader)
        if batches is not None:
            batches.start_here()
            if self._resumed_batches:
                batches.load_state_dict(self._resumed_batches)
        answers = self.answers is not None and not self.answers.is_complete and self._answer(trainer, pl_module)
        if answers or (self._resumed and self._set_up_early):
            reset_loaders(trainer)  # no worker may be at work now
            self._start_schedule(trainer)
            restart_loaders(trainer)
        self._captured = b""

    def _answer(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Let the model answer the prompts that this update can draw; returns whether there were any."""
        assert self.answers is not None
        per_step = trainer.accumulate_grad_batches * self._collate().stride * self.replay_ratio
        self.answers.write(
            trainer,
            module,
            self.memory,
            slots_to_draw(trainer, self.memory, per_step, self.experience_index),
            self.extra,
            self.experience_index,
            is_writer=self._is_writer,
        )
        return self.answers.counts["asked"] > 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compute ``features`` on the first batch, so that nothing fails after hours of training."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._tried and self.memory.policy.needs_features:
            check_features(trainer, pl_module, self.features, (batch, *self._few(trainer)))
        self._tried = True

    def _few(self, trainer: pl.Trainer) -> Iterator[Any]:
        """Batches of one example each, if the dataset is read by index; equally many on all ranks."""
        if recorded_batches(self._loader) is None:
            return
        assert self._loader is not None
        dataset: Any = self._loader.dataset
        for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
            with isolate_rng():
                example = dataset[index]
            yield self.batch_of(trainer, [example])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announce the new iterator that Lightning makes right after this, except in the first epoch of a fit."""
        loop = trainer.fit_loop
        if trainer.current_epoch == 0 or loop.is_resuming or loop.epoch_loop.restarting:
            return
        assert self._loader is not None
        persistent = getattr(self._loader, "_iterator", None)
        if persistent is None or getattr(persistent, "_tasks_outstanding", True):
            reset_loaders(trainer)  # no worker of the last epoch may still be loading
        self._start_iterator(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note a batch that ended the epoch without being trained on."""
        done = batches_done(trainer)
        if done - n_started(trainer) > self._n_skipped + len(self._skipped):
            self._skipped.add(done - 1)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the trainer."""
        if self._trainer is trainer:
            self._detach()
            for spool in self._spools():  # of this rank, which is known only while the trainer is
                spool.unlink()
            self._trainer, self._loader, self._unwrapped = None, None, None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the trainer, and name an example that could not be stored; nothing is consolidated."""
        batches, refused = recorded_batches(self._loader), _REFUSED.search(str(exception))
        if batches is not None and refused is not None:
            place, batch = map(int, refused.groups())
            if (index := batches.index_of(batch - self._schedule.iterator()[1], place)) is not None:
                exception.add_note(f"it has index {index} in the training dataset")
        self._detach()

    def _detach(self) -> None:
        if self._lengths is not None:
            self._lengths.release()
            self._lengths = None
        if self._trainer is not None:
            release(self._trainer, self.loader, self._loader, self._unwrapped)

    def _wrap(self, loader: object) -> DataLoader[Any]:
        """A copy of the training loader that replays examples."""
        trainer = self._trainer
        assert trainer is not None
        if not isinstance(loader, DataLoader):
            raise TypeError(f"Replay needs a torch DataLoader to train on, got {type(loader).__name__}")
        if loader.batch_sampler is None:
            raise TypeError("Replay cannot join examples to a loader with batch_size=None, which does not collate")
        first_of_fit, self._unwrapped = self._loader is None, loader
        if self.loader is None:  # several loaders may restart this one in the middle of an epoch
            loader = recorded(loader, trainer)
        self._loader = copy.copy(loader)
        by_index = recorded_batches(loader) is not None
        if reads_by_index(trainer, loader):
            self._check_example(trainer.lightning_module, loader.dataset)
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self._lengths = None
        if self.loader is None:
            limit = trainer.limit_train_batches
            self._lengths = StepLengths.of(loader, batch_size, limit, lambda: self._schedule.iterator()[1])
        # Batches may be loaded but never trained on, so a spool keeps more candidates than the memory has room for.
        room = (batch_size or 1024) * (batches_ahead(self._loader) + 1)
        # The shallow copy shares the persistent workers of the original, which use its collate_fn.
        self._loader._iterator = None
        self._loader.collate_fn = ReplayCollate(
            loader.collate_fn,
            schedule=self._schedule,
            directory=self.drawn.directory,
            batch_size=batch_size,
            ratio=self.replay_ratio,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            capture=None
            if by_index
            else Capture(
                self.memory.directory,
                self.memory.policy,
                self.memory.seed,
                self.memory.memory_size + room,
                self.label_of,
                self.id_of,
                self._kept_part,
            ),
            lengths=self._lengths,
            extra=self.extra,
            candidates=self.candidates,
        )
        if self.loader is not None:
            restarting(self._loader, self._schedule)
        if first_of_fit:
            self._set_up_early = not trainer.fit_loop.is_resuming
            self._start_schedule(trainer)
        else:
            self._start_iterator(trainer)
        return self._loader

    def _start_schedule(self, trainer: pl.Trainer) -> None:
        """Set the number of the loader's first batch and the memory that it draws from."""
        if not self._resumed:
            self._progress = Progress(batches_done(trainer), batches_done(trainer))
        elif self._captured and is_writer():
            (self.memory.directory / "0-resumed.spool").write_bytes(self._captured)
        self._schedule.reset()
        if self.answers is not None:
            self._collate().extra = self.answers.drawn_from(self.extra)
        if self._progress.before is not None:
            self._schedule.start_update(*self._progress.before, self.drawn.generation - 1)
        self._schedule.start_update(self._progress.update, self.experience_index, self.drawn.generation)
        self._start_iterator(trainer)

    def _start_iterator(self, trainer: pl.Trainer) -> None:
        for spool in self._spools():
            prune_records(spool, self._end_batch(trainer))
        self._schedule.start_iterator(batches_done(trainer))

    def _check_example(self, module: pl.LightningModule, dataset: Any) -> None:
        """Check that an example can be stored and its label read, before hours are spent on training."""
        with isolate_rng():
            example = dataset[0]
        encode(example)
        if self.answers is not None:
            check_prompt(module, example)
        label = self.label_of(example)
        if self.memory.policy.needs_labels and label is None:
            raise ValueError(
                f"policy {self.memory.policy.name!r} needs the class of every example, and Replay finds none in a "
                f"{type(example).__name__}; pass label=, a key or a function"
            )
        if self.id_of is not None:
            self.id_of(example)

    # --- experiences

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """In the middle of a fit: switch the loader processes to the new memory, all at the same batch."""
        self._ended = False
        if self.answers is not None:
            self._answer(trainer, module)
        assert self._loader is not None
        ahead, accumulated = batches_ahead(self._loader), trainer.accumulate_grad_batches
        self._progress.switch(batches_done(trainer), ahead, accumulated, self.experience_index)
        self._schedule.start_update(self._progress.update, self.experience_index, self.drawn.generation)

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the experience into the memory."""
        if self._loader is None:
            return
        collate = self._loader.collate_fn
        assert isinstance(collate, ReplayCollate)
        experience = experience_name(trainer) or str(self.experience_index)
        batches = recorded_batches(self._loader)
        with isolate_rng():
            if batches is not None:
                trained = batches.trained().tolist()
                dataset: Any = Subset(self._loader.dataset, trained)
                labels: Any = self.label_of
                if self.id_of is None:
                    ids = [f"{self.experience_index}:{index}" for index in trained]
                else:
                    ids = [self.id_of(dataset[i]) for i in range(len(dataset))] if self._is_writer else []
            else:
                records = self._candidates(trainer)
                dataset, labels, ids = Encoded(records), [r.label for r in records], [r.id for r in records]
            features = None
            if self.memory.policy.needs_features:
                size = self._loader.batch_size or 32
                features = features_of(trainer, module, self.features, dataset, size, collate.collate_fn)
            self.memory.update(
                dataset if self._kept_part is None or batches is None else Parts(dataset, self._kept_part),
                experience,
                labels=labels,
                ids=ids,
                features=features,
                is_writer=self._is_writer,
            )
        self._ended = True
        trainer.strategy.barrier("replay memory")

    @property
    def _kept_part(self) -> Callable[[Any], Any] | None:
        """A function that returns the part of an example that the memory keeps; None for all of it."""
        task: Any = self.label_of.task
        return None if self.answers is None else task.prompt_of

    def undo_point(self) -> Callable[[], None]:
        """Also put the memory back."""
        attributes, memory = super().undo_point(), self.memory.undo_point(self._is_writer)

        def undo() -> None:
            attributes()
            memory()

        return undo

    def forget(self, ids: Sequence[str]) -> int:
        """Erase examples from the memory and verify it (:meth:`evertune.memory.ReplayMemory.forget`).

        With several processes, call it on every rank.

        Raises:
            RuntimeError: During ``fit``, when batches already loaded may contain the examples.
        """
        if self._trainer is not None and not self._trainer.interrupted:
            raise RuntimeError("forget examples before or after fit, not during it")
        held = set(self.memory.ids).intersection(ids)
        barrier()  # every rank must have read the file that is about to be deleted
        erased = self.memory.forget(held, is_writer=self._is_writer)
        if self.answers is not None:
            self.answers.memory.forget(held, is_writer=self._is_writer)
        barrier()
        return erased

    def _candidates(self, trainer: pl.Trainer) -> list[Record]:
        """The candidate examples of the experience from all ranks, in the order in which they last arrived."""
        records = read_records(self._spools(), self._progress.experience, self._end_batch(trainer))
        own = [record for record in records if record.batch not in self._skipped]
        parts = gather_bytes(serialize_records(own), trainer)
        everyones = (record for part in parts for record in parse_records(part))
        return best_records(everyones, self.memory.policy, self.memory.memory_size)

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """Tensors, strings and numbers only: a checkpoint with it loads under ``weights_only=True``."""
        captured, before, trained, answers = b"", {}, {}, {}
        progress = self._progress
        if self._ended and self._trainer is not None:
            progress = Progress(batches_done(self._trainer), batches_done(self._trainer))  # of the next experience
        elif self._trainer is not None and self._loader is not None:
            if (batches := recorded_batches(self._loader)) is not None:
                trained = batches.state_dict()
            if self.answers is not None and self.answers.is_complete:
                answers = self.answers.state_dict()
            collate = self._loader.collate_fn
            if isinstance(collate, ReplayCollate) and collate.capture is not None:
                captured = serialize_records(self._candidates(self._trainer))
            if progress.before is not None and batches_done(self._trainer) < progress.update:
                start, update = progress.before  # its draws still have batches to come
                memory = self.drawn.state_dict(self.drawn.generation - 1)
                before = {"memory": memory, "update_start": start, "experience_index": update}
        return {
            "memory": self.memory.state_dict(),
            "answers": answers,
            "experience_index": self.experience_index,
            "experience_start": progress.experience,
            "update_start": progress.update,
            "accumulation": 1 if self._trainer is None else self._trainer.accumulate_grad_batches,
            "before": before,
            "trained": trained,
            "captured": torch.tensor(bytearray(captured), dtype=torch.uint8),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`, on any number of ranks and with any accumulation."""
        saved = state_dict["accumulation"]
        here = saved if self._trainer is None else self._trainer.accumulate_grad_batches
        before = state_dict["before"]
        if before:
            self.drawn.load_state_dict(before["memory"], is_writer=self._is_writer)
        self.memory.load_state_dict(state_dict["memory"], is_writer=self._is_writer)
        if self.answers is not None and state_dict["answers"]:
            self.answers.load_state_dict(state_dict["answers"], is_writer=self._is_writer)
        self.experience_index = state_dict["experience_index"]
        self._progress = Progress(
            state_dict["experience_start"] * here // saved,
            state_dict["update_start"] * here // saved,
            (before["update_start"] * here // saved, before["experience_index"]) if before else None,
        )
        records = parse_records(state_dict["captured"].numpy().tobytes())
        self._captured = serialize_records([r._replace(batch=r.batch * here // saved) for r in records])
        self._resumed_batches = state_dict["trained"]
        self._resumed = True
        barrier()

    def save(self, directory: str | Path) -> None:
        """Write the memory to a folder (Arrow and JSON). Call on every rank."""
        if is_writer():
            self.memory.save(directory)
            (Path(directory) / _STATE).write_text(json.dumps({"experience_index": self.experience_index}))
        barrier()

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, at any world size. Call on every rank.

        Raises:
            FileNotFoundError: If the folder holds no memory.
            ValueError: If the memory is corrupt, truncated or a pickle, or was filled under another policy or seed.
        """
        index = load_state(_Saved, Path(directory) / _STATE).experience_index
        self.memory.load(directory, is_writer=self._is_writer)
        self.experience_index = index
        barrier()

    # --- batches

    def joined(self, trainer: pl.Trainer, batch: Any) -> Joined:
        """Which examples are new and which are replayed in the batch that is being trained on.

        Call it from ``on_train_batch_start`` to ``on_before_backward``. Which
        examples they are follows from the number of the batch, as in the loader processes; nothing is sent along.

        Raises:
            ValueError: If the ``collate_fn`` has changed the number of examples, or the examples are those of one of
                several loaders.
        """
        if self.loader is not None:
            raise ValueError(
                f"which examples of a batch are replayed is not known with loader={self.loader!r}; train from one "
                "DataLoader"
            )
        return self._collate().joined(batches_done(trainer), batch_size_of(batch))

    def batch_of(self, trainer: pl.Trainer, examples: list[Any]) -> Any:
        """A batch of examples of the dataset or of the memory, on the device, without replayed ones."""
        with isolate_rng():
            return to_device(trainer, self._collate().collate_fn(examples))

    @property
    def batch_size(self) -> int | None:
        """The batch size of the training loader; None if it varies, or without a training loader."""
        return None if self._loader is None else self._loader.batch_size

    def set_logits(self, trainer: pl.Trainer, slots: Sequence[int], logits: Any) -> None:
        """Store logits with examples of the memory (:meth:`ReplayMemory.set_logits`). Call on every rank."""
        trainer.strategy.barrier("replay memory")  # every rank has read the file that is about to be replaced
        self.memory.set_logits(slots, logits, is_writer=self._is_writer)
        trainer.strategy.barrier("replay memory")
        if self._loader is not None:
            self._collate().reopen()

    def _collate(self) -> ReplayCollate:
        assert self._loader is not None
        assert isinstance(self._loader.collate_fn, ReplayCollate)
        return self._loader.collate_fn

    def _spools(self) -> list[Path]:
        """The spool files of this rank."""
        rank = 0 if self._trainer is None else self._trainer.global_rank
        return sorted(self.memory.directory.glob(f"{rank}-*.spool"))

    def _end_batch(self, trainer: pl.Trainer) -> int:
        """The number after that of the last batch trained on."""
        return end_of_batches(trainer) if self.loader is None else batches_done(trainer)
