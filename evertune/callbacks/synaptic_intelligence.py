"""Synaptic intelligence: a penalty on weights along whose path the loss fell."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.quadratic_method import Coupling, QuadraticMethod
from evertune.callbacks.weight_method import Tensors
from evertune.shards.shards import ParameterShards


class SynapticIntelligence(QuadraticMethod):
    """Synaptic intelligence, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    Adds to the loss of every later experience the penalty (Zenke, Poole & Ganguli 2017, "Continual learning through
    synaptic intelligence")::

        (strength / 2) * sum_i Omega_i * (theta_i - anchor_i)^2
        Omega_i = sum over experiences of  max(0, omega_i) / (Delta_i^2 + damping)
        omega_i = sum over steps of  -g_i * (change of theta_i in the step)

    ``g`` is the gradient of the training loss before any method adds to it, accumulated, averaged over the ranks and
    not yet clipped; ``Delta`` is how far a weight moved in the experience, and ``anchor`` the weights at its end. (The
    paper writes ``c`` for ``strength / 2``, and ``xi`` for ``damping``.) A weight whose path made the loss rise has a
    negative ``omega``; its importance is 0 here, because a negative one would push the weight away.

    The importance is collected while training: no examples, no targets and no time at the end of an experience. It
    costs four passes over the weights in each step, and five tensors of the weights' size, of which two within a fit.

    Args:
        strength: Strength of the penalty, finite and not negative. Default: 0.1, as for ``EWC``, whose importance has
            the same scale if both are normalized; it has not been tuned.
        damping: What is added to ``Delta_i^2``, positive: weights that moved less than its root have less importance.
            Default: 1e-3, as in the paper, for networks trained from scratch. Fine-tuning moves weights by far less;
            then all of them have about ``omega / damping``.
        normalize: Whether the importance of each experience is divided by its mean over all weights where it is not 0
            (default), so that ``strength`` means the same on a model of any size. False is as published.
        coupling: ``"coupled"`` (default): on the gradient. ``"decoupled"``: a proximal step after that of the
            optimizer, stable at any strength; see :class:`~evertune.callbacks.quadratic_method.QuadraticMethod`.

    Raises:
        ValueError: If an argument is out of range. In ``setup``, if the strategy is not supported; before the first
            step, if there are several optimizers.

    Example::

        trainer = pl.Trainer(max_epochs=3, callbacks=[SynapticIntelligence()])
        trainer.fit(module, first_data)

        trainer = pl.Trainer(max_epochs=3, callbacks=trainer.callbacks)
        trainer.fit(module, second_data)
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("importance", "anchor", "path")

    def __init__(
        self,
        strength: float = 0.1,
        damping: float = 1e-3,
        normalize: bool = True,
        coupling: Coupling = "coupled",
    ) -> None:
        super().__init__(strength, coupling, normalize)
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}")
        self.damping = damping
        self._steps: _Steps | None = None  # within a fit

    @classmethod
    def bytes_per_weight(cls) -> int:
        """Bytes per trainable weight that a rank updates: three tensors that are kept, and two within a fit."""
        return 4 * (len(cls.tensor_names) + 2)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and forget the path of a fit that failed."""
        super().setup(trainer, pl_module, stage)
        self._steps = None
        if stage == "fit":
            for path in self.tensors.get("path", []):
                path.zero_()

    def begin(self, shards: ParameterShards) -> Tensors:
        """Nothing is important yet; the weights move from here."""
        self.notes = {"normalize": self.normalize}
        importance, path = (shards.zeros(torch.float32) for _ in range(2))
        return {"importance": importance, "anchor": shards.values(), "path": path}

    def prepare(self, shards: ParameterShards) -> None:
        """Also anchor where they are the weights that have no importance, such as the rows of new classes.

        No penalty holds them, and ``Delta`` counts from the anchor.
        """
        importances, anchors, paths = (self.tensors[kind] for kind in self.tensor_names)
        for importance, anchor, path, value in zip(importances, anchors, paths, shards.values(), strict=True):
            torch.where((importance == 0) & (path == 0), value.to(anchor.dtype), anchor, out=anchor)
        super().prepare(shards)

    def observe_gradient(self, shards: ParameterShards) -> None:
        """Add the last step to the path, and remember where the next one starts."""
        if self._steps is None:
            self._steps = _Steps(shards)
        self._steps.add_last(self.tensors["path"])
        self._steps.start_next()

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Complete the path, and turn it into importance."""
        self._complete_path()
        self._steps = None
        super().on_experience_end(trainer, module)

    def _complete_path(self) -> None:
        if self._steps is not None:
            self._steps.complete(self.tensors["path"])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, with the path up to now; under ZeRO, they are in the checkpoint's own folder."""
        self._complete_path()
        return super().state_dict()

    def save(self, directory: str | Path) -> None:
        """Write the tensors to a folder, with the path up to now. Call on every rank."""
        self._complete_path()
        super().save(directory)

    def consolidate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> Tensors:
        """Turn the path into importance, and add it to that of the other experiences."""
        anchor = [value.to(torch.float32, copy=True) for value in shards.values()]
        moved = zip(self.tensors["path"], self.tensors["anchor"], anchor, strict=True)
        importance = [path.clamp(min=0) / ((end - start).square_().add_(self.damping)) for path, start, end in moved]
        self.scaled(importance, shards)
        for new, old in zip(importance, self.tensors["importance"], strict=True):
            new.add_(old)
        return {"importance": importance, "anchor": anchor, "path": shards.zeros(torch.float32)}


class _Steps:
    """The gradient of the last step, and the weights before it; allocated once."""

    def __init__(self, shards: ParameterShards) -> None:
        self._shards = shards
        self._gradients = shards.zeros(torch.float32)  # zero until the first step, which then adds nothing
        self._starts = shards.zeros(torch.float32)

    def add_last(self, paths: list[Tensor]) -> None:
        """Add ``-gradient * (weight now - weight before)`` of the last step to the paths."""
        tensors = zip(paths, self._gradients, self._starts, self._shards.values(), strict=True)
        for path, gradient, start, value in tensors:
            path.addcmul_(gradient, start.sub_(value))

    def start_next(self) -> None:
        """Remember the present gradients and weights."""
        scale, gradients = self._shards.gradient_scale, self._shards.gradients()
        tensors = zip(self._gradients, self._starts, gradients, self._shards.values(), strict=True)
        for gradient, start, new, value in tensors:
            gradient.copy_(new)
            if scale != 1:
                gradient.div_(scale)
            # With a loss scale, a step that overflows is skipped: the weights stay, but infinity times 0 is NaN.
            gradient.nan_to_num_(0, 0, 0)
            start.copy_(value)

    def complete(self, paths: list[Tensor]) -> None:
        """Add the last step now, so that nothing is left to add."""
        self.add_last(paths)
        for gradient in self._gradients:
            gradient.zero_()
