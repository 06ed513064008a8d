"""L2-SP: a pull to the weights that training started from."""

from __future__ import annotations

from typing import Literal

from evertune._lightning import pl
from evertune.callbacks.quadratic_method import Coupling, QuadraticMethod
from evertune.callbacks.weight_method import Tensors
from evertune.shards.shards import ParameterShards


class L2SP(QuadraticMethod):
    """L2-SP: pull every weight to where it started, on one device, DDP and ZeRO-1, 2 and 3.

    Adds to the loss the penalty (Li, Grandvalet & Davoine 2018, "Explicit inductive bias for transfer learning with
    convolutional networks")::

        (strength / 2) * sum_i (theta_i - anchor_i)^2

    All weights count alike, so it needs no data and no estimation: one number per weight, and no time at the end of an
    experience. Weights that have no start (rows that a head gains later) are pulled to zero, as in the paper; those
    that were frozen, to where they were then.

    Args:
        strength: Strength of the penalty, finite and not negative. Default: 0.01.
        to: What the anchor is. ``"pretrained"`` (default): the weights when this callback's first fit starts, in all
            experiences, the first included. ``"previous"``: the weights at the end of the last experience; it acts
            from the second on.
        coupling: ``"coupled"`` (default): on the gradient. ``"decoupled"``: a proximal step after that of the
            optimizer, stable at any strength; see :class:`~evertune.callbacks.quadratic_method.QuadraticMethod`.

    Raises:
        ValueError: If an argument is out of range. In ``setup``, if the strategy is not supported; before the first
            step, if there are several optimizers.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[L2SP(strength=0.01)])
        trainer.fit(module, data)  # stays near the pretrained weights
    """

    tensor_names = ("anchor",)

    def __init__(
        self,
        strength: float = 0.01,
        to: Literal["pretrained", "previous"] = "pretrained",
        coupling: Coupling = "coupled",
    ) -> None:
        super().__init__(strength, coupling, normalize=False)
        if to not in ("pretrained", "previous"):
            raise ValueError(f"to must be 'pretrained' or 'previous', got {to!r}")
        self.to = to

    def begin(self, shards: ParameterShards) -> Tensors | None:
        """Anchor the pretrained weights."""
        return {"anchor": shards.values()} if self.to == "pretrained" else None

    def consolidate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> Tensors:
        """Anchor the weights where the experience ends, unless the pretrained ones are the anchor."""
        return self.tensors if self.to == "pretrained" else {"anchor": shards.values()}
