"""Logit adjustment: a class is not favoured because it fills the batches of this update."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.state import load_state, save_state
from evertune.callbacks.training_data import TrainingData, class_counts, same_length

_STATE = "logit_adjustment.json"
_ABSENT = -50.0
"""Added to the logit of a class that no batch of the update has: so it takes no part in the softmax."""


@dataclass
class _Saved:
    """The content of the file that :meth:`LogitAdjustment.save` writes."""

    experience_index: int
    counts: list[float]
    n_seen: int


class LogitAdjustment(ContinualCallback):
    """Trains on logits adjusted by how much more often a class is in the batches than in all data seen so far.

    In an update, new classes fill half of every batch and the replayed ones share the rest, so plain cross-entropy
    learns that old classes are rare. While training, and only then, the logit of class ``c`` becomes::

        logit_c + log p_batch(c) - log p_seen(c)

    where ``p_batch`` is the expected share of the class in a batch (new and replayed examples together) and ``p_seen``
    its share in all data seen so far, this update included. The model then learns the logits that fit ``p_seen``. On
    balanced data this is logit adjustment (Menon et al. 2021), in the form for continual learning of Huang et al.
    (2024). A class that no batch of the update has takes no part in the loss. Without :class:`Replay`, these are all
    classes but the new ones.

    With several labels per example (a sigmoid for each class), log-odds take the place of the logarithms.

    The adjustment is one addition per step to the output of the head; evaluation and predictions are not adjusted. The
    module's logged training loss is that of the adjusted logits. Before the first step, the training data and the
    memory are read once without the model, to count the classes. State: one number per class.

    Args:
        head: Name of the submodule that returns the logits ``[batch, classes]``. Default: ``"head"``.

    Raises:
        ValueError: If ``head`` names no submodule, or the classes of the training data are not known before training
            (an iterable dataset, targets that are not classes).

    Example::

        callbacks = [Replay(memory_size=600, policy="class_balanced"), LogitAdjustment()]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    adjusts_logits = True

    def __init__(self, head: str = "head") -> None:
        self.head = head
        self.counts = torch.zeros(0, dtype=torch.float64)
        """Number of examples seen of each class, in the order of the logits."""
        self.n_seen = 0
        self._new = torch.zeros(0, dtype=torch.float64)  # those of this fit
        self._n_new = 0
        self._hook: RemovableHandle | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the classes, and adjust the head's output from here on."""
        try:
            head = pl_module.get_submodule(self.head)
        except AttributeError:
            raise ValueError(
                f"LogitAdjustment: {type(pl_module).__name__} has no submodule {self.head!r}; pass head=, the name of "
                "the one that returns the logits"
            ) from None
        data = TrainingData(trainer, type(self).__name__)
        targets = data.targets()
        self._new, self._n_new = class_counts(targets), len(targets)
        adjustment = self._adjustment(data, several=targets.ndim == 2)
        self._hook = head.register_forward_hook(_Adjust(adjustment.float().to(pl_module.device)))

    def _adjustment(self, data: TrainingData, several: bool) -> Tensor:
        """What is added to the logit of each class, float64 ``[classes]``."""
        in_batch, seen, new = same_length(data.class_shares(), self.counts, self._new)
        in_all = (seen + new) / (self.n_seen + self._n_new)
        shift = torch.logit(in_batch) - torch.logit(in_all) if several else in_batch.log() - in_all.log()
        # nan_to_num: a class of every example has infinite odds in both.
        return torch.where(in_batch > 0, shift.nan_to_num(0.0).clamp(_ABSENT, -_ABSENT), _ABSENT)

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Add the classes of this fit to those seen."""
        seen, new = same_length(self.counts, self._new)
        self.counts, self.n_seen = seen + new, self.n_seen + self._n_new

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the head as it was."""
        self._detach()
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the head as it was."""
        self._detach()

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """The counts, as a tensor."""
        return {"experience_index": self.experience_index, "counts": self.counts, "n_seen": self.n_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self.experience_index, self.counts = state_dict["experience_index"], state_dict["counts"]
        self.n_seen = state_dict["n_seen"]

    def save(self, directory: str | Path) -> None:
        """Write the counts to a folder, as JSON. Call on every rank."""
        save_state(Path(directory) / _STATE, _Saved(self.experience_index, self.counts.tolist(), self.n_seen))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, at any world size.

        Raises:
            FileNotFoundError: If the folder holds no such file.
            ValueError: If the file is corrupt.
        """
        state = load_state(_Saved, Path(directory) / _STATE)
        self.experience_index, self.n_seen = state.experience_index, state.n_seen
        self.counts = torch.tensor(state.counts, dtype=torch.float64)


class _Adjust:
    """A forward hook that adds to the logits of a head in training mode."""

    def __init__(self, adjustment: Tensor) -> None:
        self._adjustment = adjustment

    def __call__(self, head: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        if not head.training:
            return logits
        n_ahead = logits.shape[-1] - len(self._adjustment)
        if n_ahead:
            self._adjustment = nn.functional.pad(self._adjustment, (0, n_ahead), value=_ABSENT)
        return logits + self._adjustment.to(logits.dtype)
