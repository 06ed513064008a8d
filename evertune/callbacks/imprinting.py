"""Imprinting: the row of a new class starts as the mean of its examples instead of at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evertune._lightning import n_started, pl
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.replay.features import default_features
from evertune.callbacks.state import load_state, save_state
from evertune.callbacks.teacher import by_length, rounds
from evertune.callbacks.training_data import TrainingData
from evertune.shards.opened import shards_of
from evertune.shards.shards import ParameterShards
from evertune.shards.support import check_strategy
from evertune.utils.evaluation import evaluation_mode, trial

_STATE = "imprinting.json"


@dataclass
class _Saved:
    """The content of the file that :meth:`Imprinting.save` writes."""

    experience_index: int
    imprinted: list[int]


class Imprinting(ContinualCallback):
    """Sets the row of each new class of a cosine head to the mean of the class's features, before the first step.

    The features are those of the encoder as it is when the fit starts, scaled to length 1, and so is their mean (Qi,
    Brown and Lowe 2018, "Low-Shot Learning with Imprinted Weights"). An update then starts from the classifier of the
    nearest class mean, which a cosine head is, instead of from random rows that pull the encoder about.

    It costs one pass without gradients over at most ``examples_per_class`` examples of each new class, shared by the
    ranks. A class is imprinted once, in the first fit that has examples of it; a fit that resumes from a checkpoint
    imprints nothing. State: the numbers of the imprinted classes.

    Args:
        examples_per_class: Most examples whose mean is taken, the first ones of the training data. Default: 64, whose
            mean is known to an eighth of the spread of the class.
        head: Name of the weight with one row per class, in the scale of the features. Default: ``"head.weight"``.
        features: Function ``(module, batch) -> tensor [batch, features]``. By default ``module.features``.

    Raises:
        ValueError: If ``examples_per_class`` is not positive, there is no such weight, the module has a linear head,
            the features do not have the length of its rows, or the classes of the training data are not known before
            training.

    Example::

        module = SequenceClassificationModule("bert-base-uncased", head="cosine")
        callbacks = [Replay(memory_size=600), Imprinting()]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    def __init__(
        self,
        examples_per_class: int = 64,
        head: str = "head.weight",
        features: Callable[[pl.LightningModule, Any], Tensor] | None = None,
    ) -> None:
        if examples_per_class < 1:
            raise ValueError(f"examples_per_class must be positive, got {examples_per_class}")
        self.examples_per_class = examples_per_class
        self.head = head
        self.features = features or default_features
        self.imprinted: set[int] = set()
        """Numbers of the classes whose rows have been set."""
        self._new: set[int] = set()  # those of this fit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_strategy(trainer, type(self).__name__)
            if getattr(pl_module, "head_kind", "cosine") != "cosine":
                raise ValueError(
                    f"Imprinting sets rows of a cosine head, and {type(pl_module).__name__} has "
                    f"head={pl_module.head_kind!r}: pass head='cosine' to the module"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the rows of the classes that are new in this fit."""
        self._new = set()
        if n_started(trainer) > 0:  # resumed: the rows have been trained on since
            return
        data = TrainingData(trainer, type(self).__name__)
        targets = data.targets()
        present = targets if targets.ndim == 2 else F.one_hot(targets)
        new = [c for c in present.any(0).nonzero().flatten().tolist() if c not in self.imprinted]
        self._new = set(new)
        if new:
            # The first examples of each class; one example may have several classes.
            first = (present[:, new].cumsum(0) <= self.examples_per_class) & (present[:, new] > 0)
            shards = shards_of(trainer)
            rows = self._means(trainer, pl_module, data, first, shards)
            self._set_rows(shards, torch.tensor(new), rows)

    def _means(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        data: TrainingData,
        chosen: Tensor,
        shards: ParameterShards,
    ) -> Tensor:
        """The mean feature of each class, of length 1: float32 ``[classes, features]``, the same on all ranks.

        Args:
            chosen: Which examples count for which class, bool ``[examples, classes]``.
        """
        used = by_length(chosen.any(1).nonzero().flatten().tolist(), getattr(data.dataset, "lengths", None))
        sums: Tensor | None = None
        what = f"Imprinting cannot compute the features of {type(module).__name__}"
        with (
            trial(what, "pass features=, a callable (module, batch) -> tensor [batch, d]"),
            evaluation_mode(module),
            trainer.precision_plugin.val_step_context(),
        ):
            for indices, counts in rounds(used, trainer):
                features = F.normalize(self.features(module, data.batch(indices)).detach().double(), dim=-1)
                if features.ndim != 2:
                    raise ValueError(f"features must have the shape [batch, d], got {list(features.shape)}")
                weights = chosen[indices].double().to(features.device) * counts
                part = weights.T @ features
                sums = part if sums is None else sums + part
        shards.release()
        assert sums is not None
        return F.normalize(shards.sum_over_ranks(sums), dim=-1).float()

    def _set_rows(self, shards: ParameterShards, classes: Tensor, rows: Tensor) -> None:
        if self.head not in shards.shapes:
            raise ValueError(
                f"Imprinting: no weight {self.head!r} is trained; pass head=, one of {list(shards.shapes)}"
            )
        shape = shards.shapes[self.head]
        if shape[1:] != rows.shape[1:]:
            raise ValueError(
                f"Imprinting: the features have length {rows.shape[1]}, the rows of {self.head!r} {list(shape[1:])}"
            )
        full, given = torch.zeros(shape, device=rows.device), torch.zeros(shape, dtype=torch.bool, device=rows.device)
        full[classes], given[classes] = rows, True
        values = shards.values()
        for number, fragment in enumerate(shards.fragments):
            if fragment.name == self.head:
                old = values[number]
                new = fragment.slice(full).to(old)
                values[number] = torch.where(fragment.slice(given).to(old.device), new, old)
        shards.set_values(values)

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note the classes of this fit."""
        self.imprinted |= self._new

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """Numbers only; the classes of this fit as well, whose rows a checkpoint holds."""
        return {"experience_index": self.experience_index, "imprinted": sorted(self.imprinted | self._new)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self.experience_index, self.imprinted = state_dict["experience_index"], set(state_dict["imprinted"])

    def save(self, directory: str | Path) -> None:
        """Write the numbers of the imprinted classes to a folder, as JSON. Call on every rank."""
        save_state(Path(directory) / _STATE, _Saved(self.experience_index, sorted(self.imprinted)))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, at any world size.

        Raises:
            FileNotFoundError: If the folder holds no such file.
            ValueError: If the file is corrupt.
        """
        state = load_state(_Saved, Path(directory) / _STATE)
        self.experience_index, self.imprinted = state.experience_index, set(state.imprinted)
