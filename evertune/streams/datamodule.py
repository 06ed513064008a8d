"""The batches of an experience: tokenised once, padded to the longest of the batch, dealt evenly to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.utils.data import DataLoader, Dataset

from evertune._lightning import LightningDataModule, RunningStage
from evertune.streams import splits as scenarios
from evertune.streams.experience import Experience, ExperienceStream
from evertune.streams.sampler import BucketSampler, ResumableLoader, longest_first
from evertune.tasks.base import Task, task_of
from evertune.tasks.texts import truncation_length
from evertune.tasks.token_cache import TokenCache


class ExperienceDataModule(LightningDataModule):
    """The batches of one experience.

    Training batches are shuffled by ``(seed, epoch)``, composed of texts of similar length, and dealt to the ranks so
    that an optimizer step uses the same examples on any number of them (see :class:`BucketSampler`). A run that resumes
    in the middle of an epoch continues with the next batch.

    Where a trainer evaluates all validation or test data, those batches hold texts of similar length, too, the longest
    first. With a limit on their number, and in a loader that you take yourself, as for predictions, they are in order.

    Args:
        experience: Experience whose examples are dicts with the columns below; without a tokenizer they may be
            anything.
        tokenizer: Tokenizer of transformers. The texts are tokenised once, on first use, and kept in memory as int32.
            With None (default), the examples are passed to the collate function as they are (images, tensors).
        text: Column with the text, or a pair of columns (premise and hypothesis, question and passage). Default:
            ``"text"``.
        label: Column with the label's name (or list of names), or None for data without labels. Default: ``"label"``.
        batch_size: Training examples per batch and rank. Default: 32.
        eval_batch_size: Validation and test examples per batch; may be larger, since no gradients are kept. Default:
            64.
        max_length: Maximum number of tokens; longer texts are truncated. Default: 128, or what the model takes if that
            is less. More than it takes is an error.
        num_workers: Number of processes that load batches. Default: 0, since tokens are in memory.
        seed: Seed of the order of the training examples, the same on all ranks. Default: 0.
        collate_fn: Function that collates examples into a batch. By default the task's, or torch's without a tokenizer.
        bucketed: Whether to batch texts of similar length together, which saves padding. Default: True.
        balanced: Whether to draw new examples of all classes equally often, however many each has; several labels of an
            example together count as one class. An epoch keeps its length. Default: False.
        drop_last: Whether to leave out the training examples that do not fill a step, instead of filling the step with
            others. Default: False.
        id_column: Column kept in each tokenised example as ``id``, so that a memory can forget it by name. Default:
            None.
        token_cache: Folder in which tokens are kept, for later runs and for the other processes of the machine, which
            then share them in memory. They are found by a hash of texts and tokenizer. Default: None, no folder.
        task: Task that makes the tokenised examples and the collate function; by default labels are kept as they are.
            Pass ``module.task`` for a module that has one.

    Raises:
        ValueError: If a size is not positive, a column is missing, the tokenizer cannot pad, or ``max_length`` is more
            than the module takes. Before training, if an example has no class and ``balanced`` needs one.

    Example:
        >>> import torch
        >>> from evertune.streams import Experience, ExperienceDataModule
        >>> experience = Experience("numbers", [(torch.tensor([float(i)]), i % 2) for i in range(10)])
        >>> inputs, targets = next(iter(ExperienceDataModule(experience, batch_size=4).train_dataloader()))
        >>> inputs.shape, targets.shape
        (torch.Size([4, 1]), torch.Size([4]))
    """

    def __init__(
        self,
        experience: Experience,
        tokenizer: Any = None,
        *,
        text: str | tuple[str, str] = "text",
        label: str | None = "label",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_length: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        bucketed: bool = True,
        balanced: bool = False,
        drop_last: bool = False,
        id_column: str | None = None,
        token_cache: str | Path | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_length": max_length}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        self.experience = experience
        self.tokenizer = tokenizer
        self.text = text
        self.label = label
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.seed = seed
        self.collate_fn = collate_fn
        self.bucketed = bucketed
        self.balanced = balanced
        self.drop_last = drop_last
        self.id_column = id_column
        self.token_cache = token_cache
        self.task = task or Task()
        if tokenizer is not None and collate_fn is None:
            self.collate_fn = self.task.collator(tokenizer)
        self._datasets: dict[str, Dataset[Any]] = {}

    def dataset(self, split: Literal["train", "val", "test"]) -> Dataset[Any] | None:
        """The examples of a split as the collate function gets them, or None if the experience has no such split."""
        data = self.experience.splits()[split]
        if data is None or self.tokenizer is None:
            return cast("Dataset[Any] | None", data)
        if split not in self._datasets:
            texts = [self.text] if isinstance(self.text, str) else self.text
            for column in (*texts, *self.task.fields, self.label, self.id_column):
                columns = getattr(data, "column_names", None) or list(data[0])
                if column is not None and column not in columns:
                    raise ValueError(
                        f"experience {self.experience.name!r}: {split} has no column {column!r}; it has {columns}"
                    )
            make = self.task.training_dataset if split == "train" else self.task.dataset
            self._datasets[split] = make(
                data,
                self.tokenizer,
                text=self.text,
                label=self.label,
                id_column=self.id_column,
                max_length=truncation_length(self.max_length, self.tokenizer, self._module),
                **({} if self.token_cache is None else {"cache": TokenCache(self.token_cache)}),
            )
        return self._datasets[split]

    @property
    def _module(self) -> Any:
        """The module that gets the batches; None outside a trainer."""
        return self.trainer.lightning_module if self.trainer is not None else None

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches, the same number on all ranks."""
        dataset = self.dataset("train")
        assert dataset is not None
        # The sampler deals whole optimizer steps, so it must know the ranks and the accumulation.
        ranks, accumulated = {"num_replicas": 1, "rank": 0}, 1
        if self.trainer is not None:
            ranks = self.trainer.distributed_sampler_kwargs or ranks
            accumulated = self.trainer.accumulate_grad_batches
        sampler = BucketSampler(
            dataset,
            step_size=self.batch_size * ranks["num_replicas"] * accumulated,
            lengths=getattr(dataset, "lengths", None) if self.bucketed else None,
            classes=self._classes_of(dataset) if self.balanced else None,
            seed=self.seed,
            drop_last=self.drop_last,
            num_replicas=ranks["num_replicas"],
            rank=ranks["rank"],
        )
        return ResumableLoader(
            dataset,
            sampler=sampler,
            batch_size=self.batch_size,
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _classes_of(self, dataset: Any) -> list[str]:
        """The class of each example."""
        classes = [self.task.label(dataset[index]) for index in range(len(dataset))]
        if None in classes:
            raise ValueError(
                f"balanced=True draws the classes equally often, and example {classes.index(None)} of "
                f"{self.experience.name!r} has none: leave it out"
            )
        return [str(name) for name in classes]

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Each example once; empty without validation data."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Each example once; empty without test data."""
        return self._eval_loader("test")

    def _eval_loader(self, split: Literal["val", "test"]) -> DataLoader[Any] | list[Any]:
        dataset = self.dataset(split)
        if dataset is None:
            return []
        lengths = getattr(dataset, "lengths", None) if self.bucketed and self._evaluates_all(split) else None
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size,
            sampler=None if lengths is None else longest_first(lengths),
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # does not touch the global random state
        )

    def _evaluates_all(self, split: str) -> bool:
        """Whether a trainer is about to evaluate the whole split, so that the order does not matter."""
        stage = None if self.trainer is None else self.trainer.state.stage
        limit = getattr(self.trainer, f"limit_{split}_batches", 0)
        return stage not in (None, RunningStage.PREDICTING) and isinstance(limit, float) and limit == 1


class StreamDataModule(LightningDataModule):
    """A stream and its batches, described by plain values that a command line or a YAML file can hold.

    Args:
        source: Path, list of paths, dict of paths by split, folder of ``<label>/*.txt``, or name on the Hugging Face
            hub ("name" or "name:configuration").
        scenario: How the source is divided into experiences.
        n_experiences: Number of experiences (class- and data-incremental).
        classes_per_experience: Number of classes of each experience, instead of ``n_experiences`` (class-incremental).
        class_order: Order in which classes arrive (class-incremental). By default shuffled with ``seed``.
        domain: Column with the name of the domain (domain-incremental).
        date: Column with the date (time-incremental).
        period: "year", "quarter", "month", "week" or "day" (time-incremental).
        max_time_jump: How far a date may be in the future, as "30d" (time-incremental). Default: a day.
        label: Column with the label, or null. Default: ``"label"``.
        text: Column with the text, or a pair of columns. Default: ``"text"``.
        splits: Shares of train, validation and test if the source has no splits of its own. Default: (0.6, 0.2, 0.2).
        split_column: Column with the name of the split, if there is one.
        on_bad_row: "raise" (default) at rows that cannot be used, or "skip" and keep them in a side file.
        on_unseen_label: "raise" (default) at validation and test labels that no training data had so far, or "drop"
            their examples.
        batch_size: Training examples per batch and rank. Default: 32.
        eval_batch_size: Validation and test examples per batch. Default: 64.
        max_length: Maximum number of tokens; longer texts are truncated. Default: 128, or what the model takes if that
            is less. More than it takes is an error.
        num_workers: Number of processes that load batches. Default: 0.
        bucketed: Whether to batch texts of similar length together. Default: True.
        balanced: Whether to draw new examples of all classes equally often. Default: False.
        drop_last: Whether to leave out the training examples that do not fill a step. Default: False.
        id_column: Column kept in each example as ``id``. Default: None.
        token_cache: Folder in which tokens are kept for later runs. Default: None.
        seed: Seed of the splits, the order of the classes and the order of the examples. Default: 0.
        task: Task that defines the labels. By default the module's, if ``evertune fit`` or a ContinualTrainer reads the
            stream.

    Raises:
        ValueError: If a setting does not belong to the scenario.

    Example:
        >>> from evertune.streams import StreamDataModule
        >>> data = StreamDataModule("reviews.csv", scenario="domain_incremental", domain="shop", batch_size=16)
        >>> data.scenario
        'domain_incremental'
    """

    _settings: Mapping[str, tuple[str, ...]] = {
        "class_incremental": ("n_experiences", "classes_per_experience", "class_order"),
        "domain_incremental": ("domain",),
        "time_incremental": ("date", "period", "max_time_jump"),
        "data_incremental": ("n_experiences",),
    }

    def __init__(
        self,
        source: str | list[str] | dict[str, str],
        scenario: Literal["class_incremental", "domain_incremental", "time_incremental", "data_incremental"],
        *,
        n_experiences: int | None = None,
        classes_per_experience: list[int] | None = None,
        class_order: list[str] | None = None,
        domain: str | None = None,
        date: str | None = None,
        period: str | None = None,
        max_time_jump: str | None = None,
        label: str | None = "label",
        text: str | tuple[str, str] = "text",
        splits: tuple[float, float, float] = (0.6, 0.2, 0.2),
        split_column: str | None = None,
        on_bad_row: Literal["raise", "skip"] = "raise",
        on_unseen_label: Literal["raise", "drop"] = "raise",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_length: int | None = None,
        num_workers: int = 0,
        bucketed: bool = True,
        balanced: bool = False,
        drop_last: bool = False,
        id_column: str | None = None,
        token_cache: str | None = None,
        seed: int = 0,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        if scenario not in self._settings:
            raise ValueError(f"scenario must be one of {list(self._settings)}, got {scenario!r}")
        given = {
            "n_experiences": n_experiences,
            "classes_per_experience": classes_per_experience,
            "class_order": class_order,
            "domain": domain,
            "date": date,
            "period": period,
            "max_time_jump": max_time_jump,
        }
        given = {name: value for name, value in given.items() if value is not None}
        foreign = [name for name in given if name not in self._settings[scenario]]
        if foreign:
            raise ValueError(
                f"{foreign[0]} does not belong to {scenario}, which has {list(self._settings[scenario])}; leave it out"
            )
        self.source = source
        self.scenario = scenario
        self.task = task
        self._cut = {
            **given,
            "label": label,
            "text": text,
            "splits": splits,
            "split_column": split_column,
            "on_bad_row": on_bad_row,
            "on_unseen_label": on_unseen_label,
            "seed": seed,
        }
        self._batches = {
            "text": text,
            "label": label,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_length": max_length,
            "num_workers": num_workers,
            "bucketed": bucketed,
            "balanced": balanced,
            "drop_last": drop_last,
            "id_column": id_column,
            "token_cache": token_cache,
            "seed": seed,
        }
        self._stream: ExperienceStream | None = None
        self._datamodules: dict[int, tuple[Any, ExperienceDataModule]] = {}

    @property
    def stream(self) -> ExperienceStream:
        """The stream; the source is read on first access."""
        return self._read(self.task)

    def stream_for(self, module: Any) -> ExperienceStream:
        """The stream as a module learns it: read with the module's task, unless ``task`` was given."""
        return self._read(self.task or task_of(module))

    def _read(self, task: Task | None) -> ExperienceStream:
        if self._stream is None:
            self._stream = getattr(scenarios, self.scenario)(self.source, task=task, **self._cut)
        return self._stream

    def datamodule(
        self, experience: Experience, tokenizer: Any = None, task: Task | None = None
    ) -> ExperienceDataModule:
        """The batches of an experience; the same object each time, so that its texts are tokenised once."""
        known, datamodule = self._datamodules.get(id(experience), (None, None))
        if datamodule is None or known is not tokenizer:
            datamodule = ExperienceDataModule(experience, tokenizer, task=self.task or task, **self._batches)  # type: ignore[arg-type]
            self._datamodules[id(experience)] = (tokenizer, datamodule)
        return datamodule
