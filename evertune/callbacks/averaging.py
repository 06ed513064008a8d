"""Averages of weights as the end of an experience: over its steps, or with the version before it."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from evertune._lightning import n_started, pl
from evertune.callbacks.weight_method import Tensors, WeightMethod
from evertune.shards.shards import ParameterShards


class AveragingMethod(WeightMethod):
    """Base class of methods that end an experience on other weights than those of the last step.

    The weights are set in ``on_train_end``, before any method consolidates, so that importance, anchors, features of
    the memory and the evaluation are those of the average. Buffers, such as the statistics of a BatchNorm, are not
    averaged. The tensors belong to one fit: they start with its weights, and a fit that fails leaves the weights where
    they are.
    """

    @abstractmethod
    def final(self, shards: ParameterShards) -> list[Tensor]:
        """The weights to end on, one flat tensor per fragment. Called on every rank after the last step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        name = type(self).__name__
        for other in trainer.callbacks if stage == "fit" else ():  # type: ignore[attr-defined]
            if isinstance(other, AveragingMethod) and other is not self:
                raise ValueError(
                    f"{name} and {type(other).__name__} in one Trainer: each sets the final weights; use one"
                )
            if getattr(other, "splits_fit", False):
                raise ValueError(
                    f"{name} sets the weights where a fit ends, and {type(other).__name__} ends experiences within it; "
                    "use one of them"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with the weights of this fit, unless it resumes from a checkpoint."""
        if trainer.ckpt_path is None:
            self._state = self._saved_in = None
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start again before the first step: other callbacks may have set weights, such as the rows of new classes."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if n_started(trainer) == 0:
            shards = self._shards_now(trainer)
            self._keep(self.begin(shards), "begin", shards)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the weights to the average."""
        if not trainer.interrupted and self.has_state:
            shards = self._shards_now(trainer)
            shards.set_values(self.final(shards))
        super().on_train_end(trainer, pl_module)

    def consolidate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> Tensors:
        """Start again from the weights where the experience ends."""
        return {kind: shards.values() for kind in self.tensor_names}

    def begin(self, shards: ParameterShards) -> Tensors:
        """Start from the weights where the experience starts."""
        return {kind: shards.values() for kind in self.tensor_names}

    def begin_parameter(self, kind: str, value: Tensor) -> Tensor:
        """Weights that were frozen start where they are."""
        return value


class EMA(AveragingMethod):
    """End an experience on the exponential moving average of its weights, on any strategy of evertune.

    After every step (Polyak & Juditsky 1992, with exponential weights)::

        average_i <- decay * average_i + (1 - decay) * theta_i

    starting from the weights of the fit. The training itself is not changed, only where it ends. A short update with a
    ``decay`` near 1 stays near the version before it: the share of the start is ``decay`` to the power of the number of
    steps.

    Args:
        decay: Share of the average that stays in a step, in (0, 1). Default: 0.99.

    Raises:
        ValueError: If ``decay`` is out of range. In ``setup``, if the strategy is not supported, or another callback
            averages, too.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[EMA(decay=0.99)])
        trainer.fit(module, data)  # module has the average
    """

    tensor_names = ("average",)

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        self.decay = decay
        self._started = False  # whether a step has been taken that is not in the average yet

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = False
        super().on_train_start(trainer, pl_module)

    def observe_gradient(self, shards: ParameterShards) -> None:
        """Take in the weights that the last step has left."""
        self._take_in(shards)
        self._started = True

    def _take_in(self, shards: ParameterShards | None) -> None:
        if self._started and shards is not None:
            for average, value in zip(self.tensors["average"], shards.values(), strict=True):
                average.lerp_(value.to(average.dtype), 1 - self.decay)
            self._started = False

    def final(self, shards: ParameterShards) -> list[Tensor]:
        """The average, with the last step."""
        self._take_in(shards)
        return list(self.tensors["average"])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, with the last step; under ZeRO, they are in the checkpoint's own folder."""
        self._take_in(self._shards)
        return super().state_dict()

    def save(self, directory: str | Path) -> None:
        """Write the average to a folder, with the last step. Call on every rank."""
        self._take_in(self._shards)
        super().save(directory)


class VersionAveraging(AveragingMethod):
    """End an experience on an average of its weights and of those before it, on any strategy of evertune.

    ::

        theta_i <- previous * before_i + (1 - previous) * theta_i

    (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", WiSE-FT, with ``1 - previous`` for ``alpha``.) Both
    must be of one training: the fine-tuned weights and those that it started from.

    Args:
        previous: Share of the weights before the experience, in (0, 1). Default: 0.5.

    Raises:
        ValueError: If ``previous`` is out of range. In ``setup``, if the strategy is not supported, or another callback
            averages, too.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[VersionAveraging(previous=0.5)])
        trainer.fit(module, data)  # module is halfway between what it was and what it learned
    """

    tensor_names = ("before",)

    def __init__(self, previous: float = 0.5) -> None:
        if not 0 < previous < 1:
            raise ValueError(f"previous must be between 0 and 1, got {previous}")
        self.previous = previous

    def final(self, shards: ParameterShards) -> list[Tensor]:
        """The average of the weights before the experience and of those after it."""
        pairs = zip(shards.values(), self.tensors["before"], strict=True)
        return [value.to(before.dtype).lerp(before, self.previous) for value, before in pairs]
