"""Base class of methods that pull every weight to an anchor, as strongly as it is important."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.weight_method import WeightMethod
from evertune.shards.penalty import QuadraticPenalty
from evertune.shards.shards import ParameterShards

Coupling = Literal["coupled", "decoupled"]


class QuadraticMethod(WeightMethod):
    """Base class of methods whose penalty is a quadratic in every weight::

        (strength / 2) * sum_i F_i * (theta_i - anchor_i)^2

    A method says what the importance ``F`` and the anchor are (:meth:`consolidate`); without a tensor ``"importance"``,
    ``F`` is 1. The penalty acts in one of two ways:

    - ``coupling="coupled"``: its gradient is added to that of the loss, ``g_i += strength * F_i * (theta_i -
      anchor_i)``. With Adam it is divided by the second moment like the rest, clipping applies to it, and where
      ``strength * F_i`` exceeds ``2 / learning_rate`` plain gradient descent diverges.
    - ``coupling="decoupled"``: after the optimizer's step, each weight takes the proximal step of the penalty, with the
      learning rate ``lr`` of its parameter group at that step::

          theta_i <- (theta_i + lr * strength * F_i * anchor_i) / (1 + lr * strength * F_i)

      This is a weighted mean of the weight and its anchor, so it is stable at any strength, and no optimizer rescales
      it: the relation to the above is that of AdamW's weight decay to L2 regularization (Loshchilov & Hutter 2019),
      taken implicitly (Parikh & Boyd 2014, "Proximal algorithms", section 4.2). Under ZeRO it acts on the fp32 masters
      inside the step; nothing more is sent.

    Args:
        strength: Strength of the penalty, finite and not negative.
        coupling: ``"coupled"`` or ``"decoupled"``.
        normalize: Whether an importance is divided by its mean over all weights where it is not 0, on all ranks
            (:meth:`scaled`), so that ``strength`` means the same on a model of any size. A coupled penalty then pulls
            no weight beyond its anchor in a plain gradient step: ``strength * F_i`` is at most ``1 / learning_rate``.
        name: What the strength is called, for the message.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("importance", "anchor")

    def __init__(self, strength: float, coupling: Coupling, normalize: bool, name: str = "strength") -> None:
        if strength < 0:
            raise ValueError(f"{name} must not be negative, got {strength}")
        if not math.isfinite(strength):
            raise ValueError(f"{name} must be finite, got {strength}")
        if coupling not in get_args(Coupling):
            raise ValueError(f"coupling must be 'coupled' or 'decoupled', got {coupling!r}")
        self.strength = strength
        self.coupling = coupling
        self.normalize = normalize
        self.moves_weights = coupling == "decoupled"
        self._penalty: QuadraticPenalty | None = None
        self._learning_rate = 0.0  # the highest of this fit

    def begin_parameter(self, kind: str, value: Tensor) -> Tensor | None:
        """Anchor weights that were frozen where they are."""
        return value if kind == "anchor" else None

    @property
    def about(self) -> dict[str, Any]:
        """What to note about the importance of the experience that ends, beside ``normalize``."""
        return {}

    def scaled(self, importance: list[Tensor], shards: ParameterShards) -> list[Tensor]:
        """The importance of an experience on the scale that is asked for. In place; call on every rank."""
        if self.normalize:
            sums = [torch.stack((one.sum(dtype=torch.float64), (one > 0).sum().double())) for one in importance]
            total = torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64)
            if shards.sharded:
                shards.sum_over_ranks(total)
            mean = float(total[0] / total[1])
            if mean > 0:  # NaN if no weight has any
                for one in importance:
                    one.div_(mean)
        self.notes = {**self.about, "normalize": self.normalize}
        return importance

    def check_notes(self, notes: Mapping[str, Any], origin: str) -> None:
        """Refuse an importance of another scale: the two cannot be added."""
        found = bool(notes.get("normalize", False))
        if "importance" in self.tensor_names and found != self.normalize:
            name = type(self).__name__
            raise ValueError(
                f"{origin} holds importance that was estimated with normalize={found}, and this {name} has "
                f"normalize={self.normalize}: keep the setting, or start with a new {name}"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._learning_rate = max((float(group.get("initial_lr", group["lr"])) for group in groups), default=0.0)
        super().on_train_start(trainer, pl_module)

    def prepare(self, shards: ParameterShards) -> None:
        """Build the penalty once for all steps, restricted to the weights that have importance."""
        importance = self.tensors.get("importance")
        pull = self.strength * self._learning_rate
        if importance is not None and self.normalize and self.coupling == "coupled" and pull > 0:
            # A stronger pull would overshoot the anchor in a plain gradient step, and a much stronger one diverge.
            importance = [
                one.clamp(max=1 / pull) if one.numel() and one.max() > 1 / pull else one for one in importance
            ]
        self._penalty = QuadraticPenalty(shards, importance, self.tensors["anchor"])

    def add_to_gradient(self, shards: ParameterShards) -> None:
        """Add the gradient of a coupled penalty, in place."""
        if self._penalty is not None and self.coupling == "coupled":
            self._penalty.add_gradient(self.strength)

    def after_step(self, number: int, value: Tensor, learning_rate: float) -> None:
        """Take the proximal step of a decoupled penalty."""
        if self._penalty is not None:
            self._penalty.pull(number, value, learning_rate * self.strength)

    def penalty(self) -> Tensor:
        """The penalty at the current weights, summed over all ranks, shape ``[]``. Call on every rank during a fit."""
        return torch.zeros(()) if self._penalty is None else self._penalty.value(self.strength)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the strategy's buffers."""
        super().teardown(trainer, pl_module, stage)
        self._penalty = None
