"""Evaluation over all experiences: the accuracy matrix, one row after each update."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from evertune._lightning import RunningStage, is_overridden, pl
from evertune.callbacks.base import ContinualCallback
from evertune.shards.opened import shards_of
from evertune.shards.support import check_strategy, is_deepspeed
from evertune.streams.sampler import longest_first
from evertune.tasks.base import task_of
from evertune.utils.batches import to_device
from evertune.utils.clock import measured
from evertune.utils.evaluation import evaluation_mode, trial
from evertune.utils.typed_json import read_json

Score = Callable[[pl.LightningModule, Any], Tensor]
_FILE = "evaluation.json"


@dataclass
class _Saved:
    """The content of the file that :meth:`ContinualEvaluation.save` writes."""

    experience_index: int
    experiences: list[str]
    accuracy_matrix: list[list[float | None]]


class ContinualEvaluation(ContinualCallback):
    """Fills the accuracy matrix: after each experience, the score on every experience seen so far.

    ``accuracy_matrix[t][k]`` is the mean score on experience k after update t. The value does not depend on the number
    of processes: each rank scores its share of the examples, and the sums are added.

    Experience k is the k-th one added with :meth:`add_experience`. If experience t ends and no loader was added for it,
    the loader of the current ``fit`` is kept as experience t: the test loader of the datamodule or module, or else the
    validation loader. Training is not affected: no random number is drawn from the global generators, and the mode of
    every submodule is restored.

    Example::

        >>> import pytorch_lightning as pl
        >>> from evertune.training.evaluation import ContinualEvaluation
        >>> evaluation = ContinualEvaluation(split="val")
        >>> trainer = pl.Trainer(callbacks=[evaluation], logger=False, enable_model_summary=False, accelerator="cpu")
        >>> evaluation.accuracy_matrix  # filled by trainer.fit
        []

    Args:
        score: Function ``(module, batch) -> tensor [batch]`` that returns each example's score in [0, 1]. By default
            the score of the module's task (:meth:`evertune.tasks.Task.score`): the share of an example's positions that
            are correct, or its negative loss if there are no logits. An example without positions that count (NaN) is
            left out.
        split: Loader of the ``fit`` to keep if none was added: ``"test"`` (default; the validation loader if there is
            no test loader) or ``"val"``.
        evaluate_unseen: Whether to score experiences that were added but not learned yet (for forward transfer).
            Default: False.

    Raises:
        ValueError: When ``fit`` starts, if there is nothing to evaluate on, a loader cannot be evaluated, or its first
            examples cannot be scored.
    """

    time_part = "evaluation"

    def __init__(
        self, score: Score | None = None, split: Literal["test", "val"] = "test", evaluate_unseen: bool = False
    ) -> None:
        if split not in ("test", "val"):
            raise ValueError(f'split must be "test" or "val", got {split!r}')
        self.score = score
        self.split = split
        self.evaluate_unseen = evaluate_unseen
        self.experiences: list[str] = []
        """Names of the experiences: the columns of the matrix."""
        self._rows: list[list[float]] = []
        self._loaders: dict[str, DataLoader[Any]] = {}
        self._classes: dict[str, set[str]] = {}
        self._fit_loader: DataLoader[Any] | None = None

    @property
    def accuracy_matrix(self) -> list[list[float]]:
        """One row per update, one column per experience; NaN where there was no evaluation."""
        return [row + [math.nan] * (len(self.experiences) - len(row)) for row in self._rows]

    def add_experience(self, name: str, loader: DataLoader[Any], classes: Sequence[str] = ()) -> None:
        """Add the next experience, or set the loader of a known one (after a restart).

        Args:
            name: Unique name of the experience; the name of its column.
            loader: ``DataLoader`` over a map-style dataset. Only its dataset, batch size and ``collate_fn`` are used:
                each example is read exactly once, in order, or by length if the dataset has ``lengths``.
            classes: Names of its classes. While a module with its own ``classes`` lacks one of them (because its head
                has not grown yet), the score is NaN.

        Raises:
            ValueError: If the loader is of another kind, or empty.
        """
        _check_loader(name, loader)
        if name not in self.experiences:
            self.experiences.append(name)
        self._loaders[name] = loader
        self._classes[name] = set(classes)

    def loader(self, name: str) -> DataLoader[Any]:
        """The loader of an experience.

        Raises:
            KeyError: If none was added for it.
        """
        return self._loaders[name]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reject, by name, a strategy that this callback does not support."""
        super().setup(trainer, pl_module, stage)
        check_strategy(trainer, "ContinualEvaluation")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discard the previous fit's loader."""
        self._fit_loader = None
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reject, before the first step, a fit after which nothing could be evaluated."""
        # No loader was added for the experience that is about to be learned.
        if len(self.experiences) <= len(self._rows):
            self._fit_loader = self._find_loader(trainer)
            if self._fit_loader is None and not self.experiences:
                raise ValueError(
                    "ContinualEvaluation has nothing to evaluate on: this fit has no test loader, and no "
                    "validation loader with a validation_step; give it one, or call add_experience(name, loader) first"
                )
        self._try_to_score(trainer, pl_module)
        lost = [name for name in self.experiences if name not in self._loaders]
        if lost:
            rank_zero_warn(
                f"ContinualEvaluation has no data for {lost}, learned before a restart: their scores will be NaN; "
                "call add_experience(name, loader) with the same names to evaluate on them"
            )

    def _try_to_score(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Score the first examples of this experience, so that nothing fails after hours of training."""
        name = next(iter(self.experiences[len(self._rows) :]), None)
        loader = self._fit_loader if name is None else self._loaders.get(name)
        if loader is None or (name is not None and not self._knows(module, name)):
            return
        advice = "pass score=, a callable (module, batch) -> tensor [batch]"
        with (
            measured(trainer, "evaluation"),
            trial(f"ContinualEvaluation cannot score {type(module).__name__}", advice),
            _evaluating(trainer, module),
        ):
            batch = next(iter(_share(loader, trainer, at_most=2 * trainer.world_size)[0]))
            self._score(trainer, module, to_device(trainer, batch))
        if is_deepspeed(trainer):
            shards_of(trainer).release()

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Score the module on the experiences seen, add a row to the matrix and log it."""
        update = len(self._rows)
        if len(self.experiences) <= update:
            self._fit_loader = self._fit_loader or self._find_loader(trainer)
            if self._fit_loader is not None:
                self.add_experience(self._free_name(trainer), self._fit_loader)
        names = self.experiences if self.evaluate_unseen else self.experiences[: update + 1]
        self._rows.append(self._evaluate(trainer, module, names))
        self._log(trainer)

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule, names: list[str]) -> list[float]:
        scores: dict[int, float] = {}  # by loader: experiences split by a drift trigger share one
        row = []
        with _evaluating(trainer, module):
            for name in names:
                loader = self._loaders.get(name) if self._knows(module, name) else None
                if loader is not None and id(loader) not in scores:
                    scores[id(loader)] = self._mean_score(trainer, module, loader)
                row.append(math.nan if loader is None else scores[id(loader)])
        return row

    def _knows(self, module: pl.LightningModule, name: str) -> bool:
        """Whether the module has a score for every class of an experience, as far as both declare their classes."""
        known = getattr(module, "classes", None)
        return known is None or self._classes.get(name, set()) <= set(known)

    def _mean_score(self, trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader[Any]) -> float:
        share, n_real = _share(loader, trainer)
        total, n_scored, seen = 0.0, 0, 0
        for batch in share:
            scores = self._score(trainer, module, to_device(trainer, batch))
            # The share is padded at its end; the padding is scored but not counted.
            own = scores[: max(n_real - seen, 0)].double()
            total += own.nansum().item()
            n_scored += int((~own.isnan()).sum())
            seen += len(scores)
        sums = torch.tensor([total, n_scored], dtype=torch.float64)
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").cpu()
        return (sums[0] / sums[1]).item()

    def _score(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor:
        """The validated scores of a batch."""
        score = self.score or task_of(module).score
        with trainer.precision_plugin.val_step_context():
            scores = score(module, batch)
        if not isinstance(scores, Tensor) or scores.ndim != 1:
            shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"score must return a tensor of shape [batch], got {shape}")
        if self.score is not None and not ((scores >= 0) & (scores <= 1)).all():
            low, high = scores.min().item(), scores.max().item()
            raise ValueError(f"score must return values in [0, 1], got {low:g} to {high:g}")
        return scores

    def _log(self, trainer: pl.Trainer) -> None:
        from evertune.metrics.functional import average_accuracy, forgetting

        matrix = torch.tensor(self.accuracy_matrix, dtype=torch.float64)
        metrics = {f"accuracy/{name}": x for name, x in zip(self.experiences, self._rows[-1], strict=False)}
        # Unseen experiences are columns of the matrix, too, but must not enter the average.
        metrics["average_accuracy"] = average_accuracy(matrix, seen=min(matrix.shape))
        metrics["forgetting"] = forgetting(matrix)
        metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _find_loader(self, trainer: pl.Trainer) -> DataLoader[Any] | None:
        """The only loader of this fit to evaluate on, or None."""
        if self.split == "test":
            for owner in (_datamodule(trainer), trainer.lightning_module):
                if owner is not None and is_overridden("test_dataloader", owner):
                    owner.setup("test")
                    loader = _only_one(owner.test_dataloader(), "test")
                    if loader is not None:
                        return loader
        return _only_one(trainer.val_dataloaders, "validation")

    def _free_name(self, trainer: pl.Trainer) -> str:
        name = getattr(getattr(_datamodule(trainer), "experience", None), "name", None)
        if isinstance(name, str) and name not in self.experiences:
            return name
        return f"experience_{len(self.experiences)}"

    def state_dict(self) -> dict[str, Any]:
        """The matrix and its names; the loaders are not saved."""
        return {
            "experience_index": self.experience_index,
            "experiences": list(self.experiences),
            "accuracy_matrix": [list(row) for row in self._rows],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; loaders added under other names come after the restored ones."""
        restored = list(state_dict["experiences"])
        self.experience_index = state_dict["experience_index"]
        self.experiences = restored + [name for name in self.experiences if name not in restored]
        self._rows = [list(row) for row in state_dict["accuracy_matrix"]]

    def save(self, directory: str | Path) -> None:
        """Write the matrix to ``evaluation.json``. Call on every rank."""
        state = self.state_dict()
        state["accuracy_matrix"] = [[None if math.isnan(x) else x for x in row] for row in self._rows]
        if getattr(rank_zero_only, "rank", 0) == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / _FILE).write_text(json.dumps(state, indent=1, allow_nan=False))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote. Call on every rank.

        Raises:
            ValueError: If the file is not a JSON file that :meth:`save` wrote.
        """
        path = Path(directory) / _FILE
        try:
            state = read_json(_Saved, path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a saved ContinualEvaluation: {error}") from error
        rows = [[math.nan if score is None else score for score in row] for row in state.accuracy_matrix]
        self.load_state_dict({**vars(state), "accuracy_matrix": rows})


@contextmanager
def _evaluating(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Evaluation mode for the module and for the trainer's state; both are restored afterwards."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING  # `trainer.training` is False for user hooks (augmentation)
    try:
        with evaluation_mode(module):
            yield
    finally:
        trainer.state.stage = stage


def _share(loader: DataLoader[Any], trainer: pl.Trainer, at_most: int | None = None) -> tuple[DataLoader[Any], int]:
    """This rank's examples and how many of them count. Padded, so that all ranks run the same number of batches."""
    batch_size = _batch_size(loader)
    assert batch_size is not None
    n_examples = len(loader.dataset)  # type: ignore[arg-type]
    n_debug_batches = int(getattr(trainer, "fast_dev_run", 0))
    if n_debug_batches:
        n_examples = min(n_examples, n_debug_batches * batch_size * trainer.world_size)
    if at_most is not None:
        n_examples = min(n_examples, at_most)
    lengths = getattr(loader.dataset, "lengths", None)
    order: Sequence[int] = range(n_examples)
    if lengths is not None:  # each batch of one length, so that it needs little padding
        order = longest_first(lengths[:n_examples])
    indices = list(order[trainer.global_rank :: trainer.world_size])
    n_real = len(indices)
    indices += [0] * (math.ceil(n_examples / trainer.world_size) - n_real)
    return DataLoader(loader.dataset, batch_size=batch_size, sampler=indices, collate_fn=loader.collate_fn), n_real


def _datamodule(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    return getattr(trainer, "datamodule", None)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def _check_loader(name: str, loader: DataLoader[Any]) -> None:
    if not isinstance(loader, DataLoader):
        raise ValueError(f"experience {name!r}: the loader must be a DataLoader, got {type(loader).__name__}")
    if not hasattr(loader.dataset, "__len__") or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        kind = type(loader.dataset).__name__
        raise ValueError(f"experience {name!r}: evaluation needs a map-style dataset with a length, got {kind}")
    if _batch_size(loader) is None:
        raise ValueError(f"experience {name!r}: evaluation needs a loader with a batch_size, got batch_size=None")
    if len(loader.dataset) == 0:
        raise ValueError(f"experience {name!r}: there are no examples to evaluate on")


def _only_one(loaders: Any, kind: str) -> DataLoader[Any] | None:
    leaves = tree_leaves(loaders, is_leaf=lambda leaf: isinstance(leaf, DataLoader)) if loaders is not None else []
    if len(leaves) > 1:
        raise ValueError(
            f"ContinualEvaluation found {len(leaves)} {kind} loaders and cannot tell which one is the experience's: "
            "call add_experience(name, loader) with it"
        )
    if not leaves:
        return None
    _check_loader(f"the {kind} loader", leaves[0])
    loader: DataLoader[Any] = leaves[0]
    return loader
