"""One update per experience: a Lightning trainer for a stream."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from evertune._lightning import (
    PACKAGES,
    Trainer,
    either,
    is_overridden,
    pl,
    rank_zero_info,
    refuse_other_package,
    replace_method,
    return_method,
)
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.drift_trigger import DriftTrigger
from evertune.callbacks.replay.callback import Replay
from evertune.metrics.history import History
from evertune.streams.datamodule import ExperienceDataModule, StreamDataModule
from evertune.streams.experience import Experience, ExperienceStream
from evertune.tasks.base import task_of
from evertune.training.elastic import layout
from evertune.training.evaluation import ContinualEvaluation
from evertune.training.fastest import Fastest
from evertune.training.untrained import UntrainedBaseline
from evertune.utils.clock import Clock
from evertune.utils.gpus import computes_in_bf16

if TYPE_CHECKING:
    from evertune.training.stream_run import StreamRun

_LIGHTNING = tuple(one.partition(".")[0] for one in PACKAGES)


class ContinualTrainer(Trainer):
    """A ``Trainer`` that learns a stream: one ``fit`` for each experience, each scored on all experiences so far.

    Takes every argument of ``pl.Trainer``; they apply to each update (``max_epochs=3`` means three epochs per
    experience). evertune's callbacks keep their state over the whole stream, so that ``Replay`` and ``EWC`` remember.
    Optimizer and learning-rate schedule are reset for each update: with a decayed learning rate, later experiences
    would hardly be learned.

    **Other callbacks.** Most keep the state of one fit (``EarlyStopping``, ``StochasticWeightAveraging``), so each
    update gets its own copy of every callback, as it was when it was passed. To keep one object for the whole stream,
    as a callback needs that collects something, set ``across_experiences = True`` on its class or on the object.

    ``fit``, ``validate``, ``test`` and ``predict`` are unchanged.

    Args:
        precision: That of ``pl.Trainer``, or ``"auto"``: what is fastest on this machine, together with the attention
            of the module (:class:`~evertune.callbacks.Fastest`).
        **settings: All other arguments of ``pl.Trainer``.

    Raises:
        ValueError: If there is both a precision and a ``Fastest`` that chooses one.

    Example::

        stream = class_incremental("intents.jsonl", label="intent", n_experiences=10)
        module = SequenceClassificationModule("bert-base-uncased")
        trainer = ContinualTrainer(max_epochs=3, callbacks=[Replay(memory_size=2_000), EWC()])
        history = trainer.fit_stream(module, stream)
        print(history.average_accuracy, history.forgetting)

    Attributes:
        experience: The experience being learned, or None outside of ``fit_stream``.
        clock: Where the time goes, since this trainer or its latest ``fit_stream`` began.
    """

    callbacks: list[pl.Callback]

    def __init__(self, *, precision: str | int | None = None, **settings: Any) -> None:
        refuse_other_package(self, [one for value in settings.values() for one in _as_list(value)])
        callbacks = _as_list(settings.get("callbacks"))  # a list of its own: Lightning appends to it
        settings["precision"] = _precision(precision, settings.get("strategy"), callbacks)
        _announce_copies(callbacks)
        settings["callbacks"] = callbacks
        self._settings = _kept(settings)
        super().__init__(**settings)  # as it stands: commands find the options of the trainer by reading this line
        self.experience: Experience | None = None
        self.clock = Clock()

    def fit_stream(
        self,
        module: pl.LightningModule,
        stream: Sequence[Experience] | StreamDataModule,
        datamodule: Callable[[Experience], pl.LightningDataModule] | None = None,
        evaluate_on: Sequence[Experience] | None = None,
        run_dir: str | Path | None = None,
        checkpoint_every_n_steps: int = 500,
        untrained: bool = True,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
        num_workers: int | None = None,
    ) -> History:
        """Learn the experiences of a stream one after the other.

        Args:
            module: Any LightningModule. If it has a method ``prepare_experience(experience)``, as
                ``SequenceClassificationModule`` does to grow its head, the method is called before each fit.
            stream: The experiences, or a ``StreamDataModule`` that describes them and their batches.
            datamodule: Function that returns the datamodule of an experience. By default, a ``StreamDataModule`` makes
                its own, and other streams get an ``ExperienceDataModule`` with the module's tokenizer, if it has one.
            evaluate_on: Experiences to score after every update, seen or not. By default those seen so far.
            run_dir: Folder shared by all nodes in which the run stores its state. Called again with the same folder,
                in a new process, it resumes where it was killed or stopped; on the same number of processes, the
                result is bit-identical. By default nothing is stored.
            checkpoint_every_n_steps: Optimizer steps between two checkpoints inside an experience, with ``run_dir``.
            untrained: Whether to measure what no training would give, if the module has ``features``: one forward pass
                over the data, see :class:`~evertune.training.untrained.UntrainedBaseline`. Default: True.
            batch_size: Training examples per batch and rank. By default that of ``ExperienceDataModule``, 32.
            max_length: Tokens after which a text is truncated. By default that of ``ExperienceDataModule``, 128.
            num_workers: Number of processes that load batches. By default that of ``ExperienceDataModule``, 0.

        With ``fast_dev_run``, the stream is learned from a few batches each, and only the weights change: nothing is
        stored, and the callbacks are put back as they were.

        A second call continues where the first ended: the accuracy matrix gets more rows. A call that fails keeps what
        was learned of the experiences before; call it again with the remaining ones.

        Returns:
            The accuracy matrix, the metrics that follow from it, the duration in seconds and where it went, and
            summaries of the drift triggers and the replay memory.

        Raises:
            ValueError: If the stream is empty, an experience has neither test nor validation data, or settings of the
                batches are given beside a ``StreamDataModule`` or ``datamodule``, which has its own.
        """
        refuse_other_package(self, [module, stream])
        batches = {"batch_size": batch_size, "max_length": max_length, "num_workers": num_workers}
        batches = {name: value for name, value in batches.items() if value is not None}
        if batches and (datamodule is not None or isinstance(stream, StreamDataModule)):
            owner = "the datamodule" if datamodule is not None else "the StreamDataModule"
            raise ValueError(f"{', '.join(batches)} would be ignored: {owner} makes the batches; set it there")
        experiences = stream.stream_for(module) if isinstance(stream, StreamDataModule) else stream
        if len(experiences) == 0:
            raise ValueError("the stream is empty: there is nothing to learn")
        run = None
        if run_dir is not None and not self.fast_dev_run:  # type: ignore[attr-defined]
            run = self._start_run(run_dir, experiences, checkpoint_every_n_steps)
        make = datamodule or _default_datamodule(module, stream, batches)
        evaluation = self._evaluation()
        evaluation.evaluate_unseen |= evaluate_on is not None
        for scored in evaluate_on or ():
            evaluation.add_experience(scored.name, _evaluation_loader(scored, make(scored)), scored.classes)
        baseline = self._baseline() if untrained and not self.fast_dev_run else None  # type: ignore[attr-defined]
        learned = 0 if run is None else run.resume(self, module, experiences)
        clock = self.clock = Clock() if run is None else Clock(run.breakdown)
        datamodules = [make(experience) for experience in experiences]
        loaders = [  # before any training, so that an experience that cannot be scored fails at once
            None if evaluate_on is not None else _evaluation_loader(experience, data)
            for experience, data in zip(experiences, datamodules, strict=True)
        ]
        if baseline is not None and not evaluation.accuracy_matrix:
            tests = [evaluation.loader(scored.name) for scored in evaluate_on or ()]
            tests = tests or [loader for loader in loaders if loader is not None]
            baseline.compare_on(module, datamodules, tests, evaluation.evaluate_unseen)
        with _smoke_test(self):
            for number, (experience, data, loader) in enumerate(zip(experiences, datamodules, loaders, strict=True)):
                if loader is not None:
                    evaluation.add_experience(experience.name, loader, experience.classes)
                if number < learned:
                    continue
                rank_zero_info(f"experience {number + 1} of {len(experiences)}: {experience!r}")
                if run is None:
                    self.fit_experience(module, experience, data)
                else:
                    self.fit_experience(module, experience, data, run.ckpt_path, run.step_size(self, data))
                    run.commit(self, module, number + 1, clock.split)
            spent = clock.split
            return History(
                evaluation.experiences,
                evaluation.accuracy_matrix,
                sum(spent.values()),
                drift=[
                    point
                    for one in self.callbacks
                    if isinstance(one, DriftTrigger)
                    for point in one.history
                    if "score" in point
                ],
                memory=replay.memory.summary() if (replay := Replay.of(self)) is not None else {},
                examples=sum(len(experience.train) for experience in experiences),
                breakdown=spent,
                untrained=_comparable(baseline, evaluation),
            )

    def fit_experience(
        self,
        module: pl.LightningModule,
        experience: Experience,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | Path | None = None,
        step_size: int | None = None,
    ) -> None:
        """Learn one experience: one update, without the evaluation of :meth:`fit_stream`.

        Args:
            module: Any LightningModule; its method ``prepare_experience(experience)`` is called if it has one.
            experience: Experience to learn.
            datamodule: Datamodule with the batches of the experience.
            ckpt_path: Checkpoint of the same update to resume from. On a different number of processes, the examples
                of a step are redistributed, see :func:`evertune.training.elastic.layout`.
            step_size: Examples in an optimizer step over all processes, if it must not depend on their number. By
                default the product of batch size, accumulation and processes.

        Raises:
            ValueError: If the step size is not divisible by the number of processes.
        """
        refuse_other_package(self, [module, datamodule])
        # Callbacks and settings are kept, everything else of the trainer starts from its initial state.
        if self.state.fn is not None:
            super().__init__(**_kept(self._settings))  # a second fit of a Lightning trainer would train 0 steps
        if hasattr(datamodule, "batch_size"):
            accumulation = self._settings.get("accumulate_grad_batches", 1)
            datamodule.batch_size, self.accumulate_grad_batches = layout(
                ckpt_path, self.world_size, datamodule.batch_size, accumulation, step_size=step_size
            )
        prepare = getattr(module, "prepare_experience", None)
        if callable(prepare):
            prepare(experience)
        limit = self.limit_val_batches
        if isinstance(datamodule, ExperienceDataModule) and experience.val is None:
            self.limit_val_batches = 0  # Lightning warns of a loader without batches
        self.experience = experience
        try:
            with _timed_loops(self, self.clock):
                self.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
        finally:
            self.experience, self.limit_val_batches = None, limit

    def copy_with(
        self, callbacks: Sequence[pl.Callback] = (), only: type | None = None, **settings: Any
    ) -> ContinualTrainer:
        """A trainer with the settings of this one, and copies of its callbacks with what they have learned so far.

        Args:
            callbacks: Callbacks to add after the copies of this trainer's callbacks.
            only: Class of the callbacks that are copied. Default: all of them.
            settings: Settings that replace those of this trainer.
        """
        kept = _kept(self._settings)
        copies = [copy.deepcopy(one) for one in kept["callbacks"] if only is None or isinstance(one, only)]
        return ContinualTrainer(**{**kept, **settings, "callbacks": [*copies, *callbacks]})

    def _start_run(self, directory: str | Path, experiences: Sequence[Experience], every_n_steps: int) -> StreamRun:
        """Open the folder of a run, and add its callbacks to this trainer's."""
        from evertune.training.stream_run import StreamRun

        run = StreamRun(directory, experiences, every_n_steps)
        self._settings |= {"callbacks": [*self._settings["callbacks"], *run.callbacks()], "enable_checkpointing": True}
        super().__init__(**_kept(self._settings))
        return run

    def _baseline(self) -> UntrainedBaseline:
        """The baseline among the callbacks, or a new one that is kept for all updates."""
        for callback in self.callbacks:
            if isinstance(callback, UntrainedBaseline):
                return callback
        baseline = UntrainedBaseline()
        self._settings["callbacks"].append(baseline)
        self.callbacks.append(baseline)
        return baseline

    def _evaluation(self) -> ContinualEvaluation:
        """The evaluation among the callbacks, or a new one that is kept for all updates."""
        for callback in self.callbacks:
            if isinstance(callback, ContinualEvaluation):
                return callback
        evaluation = ContinualEvaluation()
        self._settings["callbacks"].append(evaluation)
        self.callbacks.append(evaluation)
        return evaluation


def _comparable(baseline: UntrainedBaseline | None, evaluation: ContinualEvaluation) -> dict[str, Any]:
    """What no training would give on the experiences that were evaluated; empty if it was not measured on them."""
    found = None if baseline is None else baseline.found
    if found is None or len(found.accuracy_matrix) != len(evaluation.accuracy_matrix):
        return {}
    return asdict(found)


@contextmanager
def _timed_loops(trainer: ContinualTrainer, clock: Clock) -> Iterator[None]:
    """Measure the loops of training and validation."""
    loops: list[Any] = [trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop]
    for loop, part in zip(loops, ("training", "evaluation"), strict=True):
        replace_method(loop, "run", clock.measure(part)(loop.run))
    try:
        yield
    finally:
        for loop in loops:
            return_method(loop, "run")


@contextmanager
def _smoke_test(trainer: ContinualTrainer) -> Iterator[None]:
    """With ``fast_dev_run``, put the continual callbacks back at the end of the stream."""
    methods = [one for one in trainer.callbacks if isinstance(one, ContinualCallback)]
    undo = [one.undo_point() for one in methods if trainer.fast_dev_run]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def _precision(precision: str | int | None, strategy: Any, callbacks: list[pl.Callback]) -> str | int | None:
    """The precision for Lightning; ``"auto"`` adds the callback that chooses it."""
    chooses = any(isinstance(one, Fastest) and one.precision == "auto" for one in callbacks)
    if precision is None or precision != "auto":
        if precision is not None and chooses:
            raise ValueError(f'precision={precision!r}, and Fastest chooses one: leave one out, or pass "auto"')
        return precision
    if not chooses:
        callbacks.append(Fastest())
    # DeepSpeed's engine is made for one precision, and FSDP2's shards are not whole, before anything could be measured.
    if isinstance(strategy, str):
        sharded = "deepspeed" in strategy or "fsdp2" in strategy
    else:
        sharded = isinstance(strategy, either("DeepSpeedStrategy") + either("ModelParallelStrategy"))
    return "bf16-mixed" if sharded and computes_in_bf16() else None


def _as_list(value: Any) -> list[Any]:
    """The values of an argument that takes one or several."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for another trainer: objects of one fit are copied, those that live through the stream are shared."""
    callbacks = [one if _is_carried(one) else _fresh(one) for one in _as_list(settings.get("callbacks"))]
    copied: dict[str, Any] = {"callbacks": callbacks}
    if isinstance(settings.get("strategy"), either("Strategy")):
        copied["strategy"] = copy.deepcopy(settings["strategy"])
    return {**settings, **copied}


def _is_carried(callback: pl.Callback) -> bool:
    """Whether a callback lives through the stream. Others, of which nothing is known, get a fresh copy for each fit."""
    return bool(getattr(callback, "across_experiences", False))


def _fresh(callback: pl.Callback) -> pl.Callback:
    try:
        return copy.deepcopy(callback)
    except Exception as error:
        name = type(callback).__name__
        raise TypeError(
            f"{name} cannot be copied for each experience ({error}): set across_experiences = True on the class if one "
            "object can serve the whole stream, or give it a __deepcopy__"
        ) from error


def _announce_copies(callbacks: Sequence[pl.Callback]) -> None:
    """Say which callbacks of the user's own will be copied, unless they state it themselves."""
    names = {
        type(one).__name__
        for one in callbacks
        if not hasattr(one, "across_experiences") and type(one).__module__.partition(".")[0] not in _LIGHTNING
    }
    if names:
        rank_zero_info(
            f"each experience gets its own copy of {', '.join(sorted(names))}; set across_experiences = True on a "
            "callback that must see the whole stream"
        )


def _default_datamodule(
    module: pl.LightningModule, stream: Sequence[Experience] | StreamDataModule, batches: Mapping[str, Any]
) -> Callable[[Experience], pl.LightningDataModule]:
    """The default for the argument ``datamodule`` of :meth:`ContinualTrainer.fit_stream`."""
    tokenizer, task = getattr(module, "tokenizer", None), task_of(module)
    if isinstance(stream, StreamDataModule):
        return lambda experience: stream.datamodule(experience, tokenizer, task)
    settings = dict(batches)
    if isinstance(stream, ExperienceStream):
        settings |= {"text": stream.text, "label": stream.label}
    made: dict[int, ExperienceDataModule] = {}

    def make(experience: Experience) -> ExperienceDataModule:
        if id(experience) not in made:  # tokenize only once, although each is scored after many updates
            made[id(experience)] = ExperienceDataModule(experience, tokenizer, task=task, **settings)
        return made[id(experience)]

    return make


def _evaluation_loader(experience: Experience, data: pl.LightningDataModule) -> DataLoader[Any]:
    """The test batches of an experience, or its validation batches if it has no test data."""
    data.prepare_data()
    data.setup("test")
    for name in ("test_dataloader", "val_dataloader"):
        loader = getattr(data, name)() if is_overridden(name, data) else []
        if isinstance(loader, DataLoader):
            return loader
    raise ValueError(f"experience {experience.name!r} has neither test nor validation data to score it on")
