"""Synaptic intelligence: a penalty on weights along whose path the loss fell."""

from __future__ import annotations

from typing import ClassVar

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

    The importance is collected while training: no examples, no targets and no time at the end of an experience. In each
    step, the gradient and the weights before it are copied where the gradient is not zero, and released when the
    optimizer has moved the weights: what a method whose class name comes later moves is not part of the path.

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
        self.moves_weights = True  # the path is completed where a decoupled penalty acts
        self._steps: list[_Step | None] = []  # within a step of the optimizer, one for each fragment

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements, and forget the path of a fit that failed."""
        super().setup(trainer, pl_module, stage)
        self._steps = []
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
        """Remember where the step starts, and the gradient."""
        pairs, scale = zip(shards.gradients(), shards.values(), strict=True), shards.gradient_scale
        self._steps = [_Step(gradient, value, scale) for gradient, value in pairs]

    def after_step(self, number: int, value: Tensor, learning_rate: float) -> None:
        """Take the proximal step of a decoupled penalty, and add the whole step to the path."""
        if self.coupling == "decoupled":
            super().after_step(number, value, learning_rate)
        step, self._steps[number] = self._steps[number], None
        if step is not None:
            step.add_to(self.tensors["path"][number], value)

    def consolidate(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> Tensors:
        """Turn the path into importance, and add it to that of the other experiences."""
        anchor = [value.to(torch.float32, copy=True) for value in shards.values()]
        moved = zip(self.tensors["path"], self.tensors["anchor"], anchor, strict=True)
        importance = [path.clamp(min=0) / ((end - start).square_().add_(self.damping)) for path, start, end in moved]
        self.scaled(importance, shards)
        for new, old in zip(importance, self.tensors["importance"], strict=True):
            new.add_(old)
        return {"importance": importance, "anchor": anchor, "path": shards.zeros(torch.float32)}


_BLOCK = 128
"""Weights whose gradient is looked at together: those of tokens that are not in the batch have none."""
_LARGE = 1 << 20
"""Elements from which on a fragment may be an embedding, and is looked at for blocks without a gradient."""
_CHUNK = 1 << 16
"""Elements processed at a time, as many as stay in the caches of a CPU between two operations."""


class _Step:
    """The gradient and the weights of a fragment before a step, in the blocks whose gradient is not zero.

    Args:
        gradient: The fragment's gradient, flat.
        value: Its weights.
        scale: The factor of the gradient.
    """

    def __init__(self, gradient: Tensor, value: Tensor, scale: float) -> None:
        n_whole = gradient.numel() // _BLOCK * _BLOCK
        self._blocks: Tensor | None = None
        if n_whole >= _LARGE:
            moving = torch.linalg.vector_norm(gradient[:n_whole].view(-1, _BLOCK), dim=1).nonzero().squeeze(1)
            self._blocks = moving if 2 * _BLOCK * len(moving) < n_whole else None
        is_view = self._blocks is None
        self._gradient = self._of(gradient).to(torch.float32, copy=is_view)
        self._start = self._of(value).to(torch.float32, copy=is_view)
        if scale != 1:
            # A step that overflows leaves the weights where they are, but infinity times 0 is NaN.
            self._gradient.div_(scale).nan_to_num_(0, 0, 0)

    def _of(self, flat: Tensor) -> Tensor:
        """The blocks of a tensor of the fragment's size, and what is left over at its end."""
        if self._blocks is None:
            return flat
        n_whole = flat.numel() // _BLOCK * _BLOCK
        return torch.cat([flat[:n_whole].view(-1, _BLOCK)[self._blocks].view(-1), flat[n_whole:]])

    def add_to(self, path: Tensor, value: Tensor) -> None:
        """Add ``-gradient * (weight now - weight before)`` to the path, in place."""
        if self._blocks is None:
            tensors = (path, self._gradient, self._start, value)
            for total, gradient, start, end in zip(*(one.split(_CHUNK) for one in tensors), strict=True):
                total.addcmul_(gradient, start.sub_(end))
            return
        change = self._start.sub_(self._of(value)).mul_(self._gradient)
        n_whole, n_moved = path.numel() // _BLOCK * _BLOCK, len(self._blocks) * _BLOCK
        path[:n_whole].view(-1, _BLOCK).index_add_(0, self._blocks, change[:n_moved].view(-1, _BLOCK))
        path[n_whole:].add_(change[n_moved:])
