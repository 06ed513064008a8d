"""The accuracy without training, to compare a run with: closed-form classifiers over the pretrained encoder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evertune._lightning import pl, rank_zero_info, rank_zero_warn
from evertune.callbacks.base import ContinualCallback
from evertune.lightning_modules.analytic import AnalyticHead, Statistics
from evertune.lightning_modules.analytic_classification import AnalyticClassificationModule
from evertune.lightning_modules.reading import batches_of, read_once
from evertune.metrics.functional import average_accuracy
from evertune.shards.opened import shards_of
from evertune.shards.support import check_strategy, is_deepspeed
from evertune.streams.datamodule import ExperienceDataModule
from evertune.tasks.base import Task, task_of
from evertune.utils.batches import TARGET_KEYS, to_device
from evertune.utils.clock import measured
from evertune.utils.evaluation import evaluation_mode
from evertune.utils.ranks import is_writer
from evertune.utils.typed_json import read_json

_FILE = "untrained.json"
_AT_ONCE = 4096
"""Examples whose random features are in memory at once."""
_METHODS: Mapping[str, Mapping[str, Any]] = {
    "nearest class mean": {"solver": "mean"},
    "LDA": {"solver": "lda"},
    "LDA on random features": {"solver": "lda", "features": "relu", "n_features": 1_000},
    "ridge regression on random features": {"solver": "ridge", "features": "relu", "n_features": 1_000},
}


@dataclass
class Untrained:
    """The scores of the best classifier without training.

    Args:
        method: Its name.
        accuracy_matrix: Row ``t`` holds the accuracy on each experience when the first ``t + 1`` are known; None where
            it was not evaluated.
        seconds: Seconds that it took, over all methods.
    """

    method: str
    accuracy_matrix: list[list[float | None]]
    seconds: float


class UntrainedBaseline(ContinualCallback):
    """Measures what no training would give, in one forward pass over the data before the first step.

    The features of the module before its first update go to four classifiers in closed form
    (:class:`~evertune.lightning_modules.AnalyticHead`): the nearest class mean, linear discriminant analysis, and the
    latter and ridge regression on random features. Each sees the same examples as the module, and is scored on the same
    data after each experience. The one with the best average at the end is kept: what training must beat.

    :meth:`ContinualTrainer.fit_stream <evertune.ContinualTrainer.fit_stream>` adds it. It needs a module with
    ``features(batch)``, which returns a tensor [batch, features], one class for each example, and
    :class:`~evertune.streams.ExperienceDataModule`. Without them, it says so and measures nothing.
    """

    def __init__(self) -> None:
        self.found: Untrained | None = None
        self._data: tuple[list[ExperienceDataModule], list[DataLoader[Any]], bool] | None = None

    def compare_on(
        self, module: Any, experiences: Sequence[Any], loaders: Sequence[DataLoader[Any]], unseen: bool
    ) -> None:
        """Measure at the start of the next fit.

        Args:
            module: Module before its first update.
            experiences: Datamodules of the experiences.
            loaders: Test data, one for each column of the accuracy matrix.
            unseen: Whether experiences are scored before they are learned.
        """
        reason = _unfit(module, experiences)
        if reason is not None:
            rank_zero_info(f"the accuracy without training is not measured: {reason}")
            return
        self._data = list(experiences), list(loaders), unseen

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reject, by name, a strategy that this callback does not support."""
        super().setup(trainer, pl_module, stage)
        check_strategy(trainer, type(self).__name__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, unless it has been done: a fit that resumes no longer has the pretrained weights."""
        if self._data is None or self.found is not None or trainer.ckpt_path is not None:
            return
        start = time.perf_counter()
        context = trainer.precision_plugin.val_step_context()
        try:
            with measured(trainer, "evaluation"), evaluation_mode(pl_module), context:
                matrices = self._measure(trainer, pl_module, *self._data)
        except Exception as error:  # not a reason not to train
            rank_zero_warn(f"the accuracy without training is not measured: {type(error).__name__}: {error}")
            return
        finally:
            self._data = None
            if is_deepspeed(trainer):
                shards_of(trainer).release()
        method = max(matrices, key=lambda one: _final(matrices[one]))
        rows = [[None if math.isnan(score) else score for score in row] for row in matrices[method]]
        self.found = Untrained(method, rows, time.perf_counter() - start)

    def _measure(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        experiences: list[ExperienceDataModule],
        loaders: list[DataLoader[Any]],
        unseen: bool,
    ) -> dict[str, list[list[float]]]:
        """The accuracy matrix of each method."""
        task, numbers = task_of(module), dict[str, int]()
        tests = [
            (*self._read(trainer, module, one.dataset, one.collate_fn, one.batch_size), _labels(one.dataset, task))
            for one in loaders
        ]
        heads: dict[str, AnalyticHead] = {}
        matrices: dict[str, list[list[float]]] = {name: [] for name in _METHODS}
        for t, data in enumerate(experiences):
            data.trainer = trainer  # which knows how many tokens the module takes
            train: Any = data.dataset("train")
            labels = _labels(train, task)
            numbers |= {name: len(numbers) + n for n, name in enumerate(sorted(set(labels) - numbers.keys()))}
            features, places = self._read(trainer, module, train, data.collate_fn, data.eval_batch_size)
            if not heads:
                size = trainer.strategy.broadcast(features.shape[1])
                heads = {name: AnalyticHead(size, len(numbers), **settings) for name, settings in _METHODS.items()}
            targets = torch.tensor([numbers[labels[place]] for place in places], dtype=torch.int64)
            _learn(trainer, list(heads.values()), features, targets, len(numbers))
            for name, head in heads.items():
                columns = [
                    self._score(trainer, head, *test, numbers) if unseen or k <= t else math.nan
                    for k, test in enumerate(tests)
                ]
                matrices[name].append(columns)
        return matrices

    def _read(
        self, trainer: pl.Trainer, module: Any, dataset: Any, collate_fn: Any, size: int | None
    ) -> tuple[Tensor, list[int]]:
        """The features [examples, features] of this rank's examples, on the CPU, and the indices of the examples."""
        found, places = [torch.empty(0, 0)], list[int]()
        for own, collated in read_once(trainer, dataset, batches_of(dataset, size or 64), collate_fn):
            batch = collated
            if isinstance(collated, Mapping):  # the module may not know the classes yet
                batch = {key: value for key, value in collated.items() if key not in TARGET_KEYS}
            features = module.features(to_device(trainer, batch))
            if own:
                found.append(features.float().cpu())
                places += own
        return torch.cat(found[1:]) if len(found) > 1 else found[0], places

    def _score(
        self,
        trainer: pl.Trainer,
        head: AnalyticHead,
        features: Tensor,
        places: list[int],
        labels: Sequence[str],
        numbers: Mapping[str, int],
    ) -> float:
        """The accuracy over all ranks; NaN if a class is not known yet."""
        if not set(labels) <= numbers.keys():
            return math.nan
        right = 0
        if places:
            targets = torch.tensor([numbers[labels[place]] for place in places])
            right = int((head(features).argmax(1) == targets).sum())
        return float(_summed(trainer, torch.tensor(right, dtype=torch.float64))) / len(labels)

    # --- what is kept

    def state_dict(self) -> dict[str, Any]:
        """The result, if there is one."""
        return {"experience_index": self.experience_index, "found": None if self.found is None else asdict(self.found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.experience_index = state_dict["experience_index"]
        self.found = None if state_dict["found"] is None else Untrained(**state_dict["found"])

    def save(self, directory: str | Path) -> None:
        """Write the result to ``untrained.json``, if there is one. Call on every rank."""
        if self.found is not None and is_writer():
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / _FILE).write_text(json.dumps(asdict(self.found), allow_nan=False))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote. Call on every rank.

        Raises:
            ValueError: If the file is not one that :meth:`save` wrote.
        """
        path = Path(directory) / _FILE
        if not path.is_file():
            return
        try:
            self.found = read_json(Untrained, path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a saved UntrainedBaseline: {error}") from error


def _unfit(module: Any, experiences: Sequence[Any]) -> str | None:
    """Why the baseline cannot be measured, or None."""
    if isinstance(module, AnalyticClassificationModule):
        return "the module itself is not trained"
    if not callable(getattr(module, "features", None)):
        return f"{type(module).__name__} has no method features(batch)"
    for data in experiences:
        if not isinstance(data, ExperienceDataModule):
            return f"it needs an ExperienceDataModule, got {type(data).__name__}"
    return None


def _labels(dataset: Any, task: Task) -> list[str]:
    """The class of each example.

    Raises:
        ValueError: If an example has none, or several.
    """
    names = getattr(dataset, "names", None)
    if isinstance(names, Mapping) and "labels" in names:
        labels = list(names["labels"])
    else:
        labels = [task.label(dataset[place]) for place in range(len(dataset))]
    wrong = next((label for label in labels if not isinstance(label, str)), "")
    if wrong != "":
        raise ValueError(f"it needs one class for each example, got {wrong!r:.80}")
    return labels


def _learn(
    trainer: pl.Trainer, heads: Sequence[AnalyticHead], features: Tensor, targets: Tensor, n_classes: int
) -> None:
    """Add the examples of all ranks to the heads. Those with the same features share their sums."""
    shared: dict[str, Statistics] = {}
    for head in heads:
        if n_classes > head.out_features:
            head.grow(n_classes)
        if head.features not in shared:
            new = Statistics.zeros(n_classes, head.n_features)
            for some, theirs in zip(features.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
                if len(some):
                    new.add(head.map(some), theirs)
            for tensor in new.tensors().values():
                tensor.copy_(_summed(trainer, tensor))
            head.statistics.merge(new)
            shared[head.features] = head.statistics
        head.statistics = shared[head.features]
        head.solve()


def _summed(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """The sum over all ranks."""
    if trainer.world_size == 1:
        return values
    there = values.to(trainer.strategy.root_device)
    reduced: Any = trainer.strategy.reduce(there, reduce_op="sum")
    result: Tensor = reduced.cpu()
    return result


def _final(matrix: list[list[float]]) -> float:
    average = average_accuracy(matrix)
    return -1.0 if math.isnan(average) else average
