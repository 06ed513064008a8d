"""Adversarial training: examples are also learned with the worst small change of their embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from evertune._lightning import isolate_rng, pl
from evertune.callbacks.base import ContinualCallback
from evertune.callbacks.reference_method import training_loss
from evertune.callbacks.step_logits import StepLogits
from evertune.shards.opened import shards_of
from evertune.shards.support import check_strategy, is_deepspeed
from evertune.utils.evaluation import trial

Attack = Literal["fgm", "pgd", "freelb"]
_ADVICE = "pass embedding=, the name of the submodule that turns token ids into vectors"


class AdversarialTraining(ContinualCallback):
    """Every example is also learned with its embeddings moved to where its loss rises, under any strategy of evertune.

    The loss gets ``strength`` times the loss on moved examples. The move ``d`` of an example's embeddings, over all of
    its tokens, has the Euclidean length ``epsilon`` (``"fgm"``) or at most that (the others), and ``g`` is the gradient
    of the loss with respect to the embeddings::

        fgm:     d = epsilon * g / |g|                                          (Miyato et al. 2017)
        pgd:     d <- project(d + step_size * g(d) / |g(d)|), ``steps`` times   (Madry et al. 2018)
        freelb:  the same moves; the loss is the mean over all of them          (Zhu et al. 2020)

    All moves start from zero, so that the result does not depend on the number of processes; FreeLB's authors draw the
    start. ``training_step`` runs once more for each move to find, and once for each to learn: two more passes with FGM,
    which takes about 2.5 times the time of a plain step. The moves are found before the step, with the weights of
    the step, and without gradients of weights. What ``training_step`` logs meanwhile is dropped. In evaluation nothing
    is moved. Replayed examples are moved, too; a memory keeps examples as they are.

    Args:
        attack: ``"fgm"`` (default), ``"pgd"`` or ``"freelb"``.
        epsilon: Length of a move. Default: 1, for embeddings of a norm of about 1 in each token, as those of BERT.
        strength: Factor of the loss on moved examples. Default: 1, as in the papers.
        steps: Number of moves with ``"pgd"`` and ``"freelb"``. Default: 3.
        step_size: Length of each of them. Default: ``epsilon / 2``.
        embedding: Name of the submodule whose output is moved, ``[batch, tokens, features]``. Default: the input
            embeddings of the transformer, or the module's only ``torch.nn.Embedding``.

    Raises:
        ValueError: If a number is not positive and finite, or ``attack`` is unknown. In ``setup``, if optimization is
            manual or the strategy is not supported. On the first batch, if the embedding is not found, or
            ``training_step`` does not use it.

    Example:
        >>> from evertune.callbacks.adversarial_training import AdversarialTraining
        >>> AdversarialTraining("pgd", epsilon=0.5).step_size
        0.25
    """

    keeps_nothing = True

    def __init__(
        self,
        attack: Attack = "fgm",
        epsilon: float = 1.0,
        strength: float = 1.0,
        steps: int = 3,
        step_size: float | None = None,
        embedding: str | None = None,
    ) -> None:
        if attack not in get_args(Attack):
            raise ValueError(f"attack must be one of {list(get_args(Attack))}, got {attack!r}")
        size = epsilon / 2 if step_size is None else step_size
        for name, value in (("epsilon", epsilon), ("strength", strength), ("steps", steps), ("step_size", size)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.attack, self.epsilon, self.strength, self.embedding = attack, epsilon, strength, embedding
        self.steps, self.step_size = (1, epsilon) if attack == "fgm" else (steps, size)
        self._layer: nn.Module | None = None
        self._moves: list[Tensor] = []  # of the batch that is being trained on

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__)
        if not pl_module.automatic_optimization:
            raise ValueError("AdversarialTraining needs automatic optimization: it runs training_step again")
        self._layer = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find the moves of the examples. Runs on every rank."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        with isolate_rng():  # the step's own dropout is that of a step without this callback
            if self._layer is None:
                with trial(f"AdversarialTraining cannot move the embeddings of {type(pl_module).__name__}", _ADVICE):
                    self._layer = _embedding_of(pl_module, self.embedding)
                    self._moves = self._found(trainer, pl_module, batch)
            else:
                self._moves = self._found(trainer, pl_module, batch)
        if is_deepspeed(trainer):
            shards_of(trainer).release()

    def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor | None:
        """The loss on the moved examples."""
        learned = self._moves if self.attack == "freelb" else self._moves[-1:]
        with StepLogits.of(trainer).second_pass():
            losses = [self._loss(trainer, module, batch, move)[0] for move in learned]
        return self.strength * torch.stack(losses).mean()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Release the batch and its moves."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._moves = []

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the module."""
        self._layer, self._moves = None, []

    def _found(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> list[Tensor]:
        """The moves of the embeddings, one after the other."""
        moves: list[Tensor] = []
        move: Tensor | None = None
        for _ in range(self.steps):
            with torch.enable_grad(), StepLogits.of(trainer).second_pass():
                loss, at = self._loss(trainer, module, batch, move)
                [gradient] = torch.autograd.grad(loss, [at])
            further = self.step_size * _directions(gradient.float())
            move = further if move is None else _projected(move + further, self.epsilon)
            moves.append(move)
        return moves

    def _loss(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, move: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss with moved embeddings, and the leaf of the graph that is the move."""
        assert self._layer is not None
        with _moved(self._layer, move) as at:
            loss = training_loss(trainer, module, batch)
        if len(at) != 1:
            raise ValueError(f"training_step used the embedding {len(at)} times, not once")
        return loss, at[0]


@contextmanager
def _moved(layer: nn.Module, move: Tensor | None) -> Iterator[list[Tensor]]:
    """Add a move to what a layer returns; yields the list of the moves that were added, as leaves of the graph."""
    added: list[Tensor] = []

    def add(part: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        leaf = torch.zeros_like(output) if move is None else move.to(output.dtype)
        added.append(leaf.detach().requires_grad_())
        return output + added[-1]

    handle = layer.register_forward_hook(add)
    try:
        yield added
    finally:
        handle.remove()


def _directions(gradient: Tensor) -> Tensor:
    """The gradient of each example divided by its length; 0 where it is 0 or not finite."""
    lengths: Tensor = gradient.flatten(1).norm(dim=1)
    usable = (lengths > 0) & lengths.isfinite()
    directions: Tensor = gradient / lengths[:, None, None]
    return directions.masked_fill(~usable[:, None, None], 0.0)


def _projected(move: Tensor, epsilon: float) -> Tensor:
    """The move of each example, shortened to at most ``epsilon``."""
    lengths: Tensor = move.flatten(1).norm(dim=1).clamp_min(1e-12)
    return move * (lengths.reciprocal() * epsilon).clamp_max(1.0)[:, None, None]


def _embedding_of(module: pl.LightningModule, name: str | None) -> nn.Module:
    """The submodule whose output is moved.

    Raises:
        ValueError: If it is not found.
    """
    parts: dict[str, nn.Module] = dict(module.named_modules())
    if name is not None:
        if name not in parts:
            raise ValueError(f"it has no submodule {name!r}")
        return parts[name]
    for part in parts.values():
        find = getattr(part, "get_input_embeddings", None)
        if callable(find):
            found: nn.Module = find()
            return found
    layers = [part for part in parts.values() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    if len(layers) != 1:
        raise ValueError(f"it has {len(layers)} embeddings, not one")
    return layers[0]
