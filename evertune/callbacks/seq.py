"""SEQ: the transformer learns in the first experience alone, and the rows of known classes stay as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.gradient_method import GradientMethod
from evertune.callbacks.state import load_state, save_state
from evertune.callbacks.training_data import TrainingData, class_counts
from evertune.shards.shards import ParameterShards

_STATE = "seq.json"


@dataclass
class _Saved:
    """The content of the file that :meth:`SEQ.save` writes."""

    experience_index: int
    known: list[int]


class SEQ(GradientMethod):
    """Sequential fine-tuning without its two causes of forgetting (SEQ*), under any strategy of evertune.

    Zheng, Qiu & Ma 2024, "Learn or Recall? Revisiting Incremental Learning with Pre-trained Language Models", found
    that a pretrained transformer hardly forgets: its classifier does. So:

    - the first experience trains everything (the warm-up), and from the second on only the head is trained, at a
      fraction of the cost of a step;
    - in the head, the rows of classes of earlier experiences are not changed: their gradient is 0, and after each step
      they are put back, since momentum and weight decay would move them, too.

    The other parts of SEQ* are settings of the module: ``head="cosine"`` where no examples are kept, whose rows compete
    by direction alone (with a ``Replay``, the paper has a linear head), and rows that are allocated ahead. Rows take
    part in the loss from the start if the module is given the names of all classes at the start (``classes=``). With
    :class:`~evertune.callbacks.Imprinting`, a new row starts as the mean of its class. State: the numbers of the known
    classes.

    Args:
        head: Name of the submodule whose weights have one row per class. Default: ``"head"``.

    Raises:
        ValueError: Before the first step, if there is no such submodule, its weights have different numbers of rows,
            there are several optimizers, the classes of the training data are not known before training, or an
            experience has no new class, so that nothing would be learned. In ``setup``, if the strategy is not
            supported. When a checkpoint of a later experience is resumed without :meth:`load`.

    Example::

        module = SequenceClassificationModule("bert-base-uncased", head="cosine")
        ContinualTrainer(max_epochs=3, callbacks=[SEQ(), Imprinting()]).fit_stream(module, stream)
    """

    moves_weights = True

    def __init__(self, head: str = "head") -> None:
        self.head = head
        self.known: set[int] = set()
        """Numbers of the classes of earlier experiences."""
        self._new: set[int] = set()  # those of this fit
        self._still: dict[int, Tensor] = {}  # which elements of a fragment do not move, by its number
        self._kept: dict[int, Tensor] = {}  # their values

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and freeze everything but the head from the second experience on."""
        super().setup(trainer, pl_module, stage)
        self._still, self._kept, self._new = {}, {}, set()
        if stage != "fit" or self.experience_index == 0:
            return
        if getattr(pl_module, "backbone", self) is None:  # a module of evertune's before its weights are loaded
            pl_module.freeze_layers = -1  # type: ignore[assignment]
        for name, parameter in pl_module.named_parameters():
            if not name.startswith(f"{self.head}."):
                parameter.requires_grad_(False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the rows that stay as they are."""
        super().on_train_start(trainer, pl_module)
        assert self._shards is not None
        present = class_counts(TrainingData(trainer, type(self).__name__).targets()).nonzero().flatten().tolist()
        self._new = set(present) - self.known
        if not self._new:
            raise ValueError(
                f"SEQ learns new classes, and all of this experience's are known: {present}; leave SEQ out of streams "
                "in which classes come again"
            )
        weights = {name: shape for name, shape in self._shards.shapes.items() if name.startswith(f"{self.head}.")}
        if len({shape[0] for shape in weights.values()}) != 1:
            found = {name: list(shape) for name, shape in weights.items()} or f"no trained weight in {self.head!r}"
            raise ValueError(f"SEQ needs a head whose weights have one row per class, and finds {found}; pass head=")
        known = torch.tensor(sorted(self.known), dtype=torch.int64)
        values = self._shards.values()
        for number, fragment in enumerate(self._shards.fragments if self.known else ()):
            if fragment.name in weights:
                elements = torch.arange(fragment.offset, fragment.offset + fragment.numel)
                rows = elements // math.prod(fragment.shape[1:])
                self._still[number] = torch.isin(rows, known).to(values[number].device)

    @property
    def acts(self) -> bool:
        return super().acts and bool(self._still)

    def observe_gradient(self, shards: ParameterShards) -> None:
        """Before the first step, keep the rows: other callbacks may have set them when the fit started."""
        if not self._kept:
            values = shards.values()
            self._kept = {number: values[number][still].clone() for number, still in self._still.items()}

    def project_gradient(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Take the gradient from the rows, so that it has no part in clipping."""
        gradients = shards.gradients()
        for number, still in self._still.items():
            gradients[number].masked_fill_(still, 0)
        shards.write_back()

    def after_step(self, number: int, value: Tensor, learning_rate: float) -> None:
        """Put the rows back."""
        if number in self._still:
            value[self._still[number]] = self._kept[number]

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note the classes of this fit."""
        self.known |= self._new

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {"experience_index": self.experience_index, "known": sorted(self.known)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`.

        Raises:
            ValueError: If the checkpoint is of a later experience than this callback was in when the fit was set up.
        """
        if (index := state_dict["experience_index"]) != self.experience_index:
            raise ValueError(
                f"the checkpoint's SEQ has completed {index} experiences, this one {self.experience_index}, and what "
                "is frozen depends on it: save() the callback after each experience, and load() it before resuming"
            )
        self.known = set(state_dict["known"])

    def save(self, directory: str | Path) -> None:
        """Write the numbers of the known classes to a folder, as JSON. Call on every rank."""
        save_state(Path(directory) / _STATE, _Saved(self.experience_index, sorted(self.known)))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, at any world size.

        Raises:
            FileNotFoundError: If the folder holds no such file.
            ValueError: If the file is corrupt.
        """
        state = load_state(_Saved, Path(directory) / _STATE)
        self.experience_index, self.known = state.experience_index, set(state.known)
