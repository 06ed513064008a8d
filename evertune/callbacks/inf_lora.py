"""Interference-free LoRA (InfLoRA): an adapter reads its input only along directions that old data do not use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import pl, rank_zero_warn
from evertune.callbacks.adapter_method import AdapterMethod, summed
from evertune.callbacks.teacher import rounds
from evertune.callbacks.training_data import TrainingData
from evertune.shards.shards import ParameterShards
from evertune.tasks.base import task_of
from evertune.utils.evaluation import evaluation_mode, trial

_ROUNDING = 1e-6
"""Share of the energy of a layer's inputs below which a direction is rounding."""


class InfLoRA(AdapterMethod):
    """Interference-free LoRA (InfLoRA), on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    Liang & Li 2024, "InfLoRA: interference-free low-rank adaptation for continual learning". An adapter adds
    ``scale * B A x`` to the output of a layer (the paper calls PEFT's ``A`` and ``B`` the other way round). Before
    experience ``t`` is learned, ``A_t`` is designed, and then frozen; only ``B_t``, from 0, is trained. Let ``C`` be
    the mean of ``x x^T`` over the inputs ``x`` of the layer for the new data, and the columns of ``M`` an orthonormal
    basis of the directions in which the inputs of all earlier experiences lie::

        rows of A_t = top eigenvectors of (I - M M^T) C (I - M M^T), of length 1 / sqrt(3)

    So ``A_t x = 0`` for inputs of the past within ``M``, whose outputs do not change, while of all such directions,
    these matter most for the new data. (The length is that of the rows that PEFT draws.) When the experience ends,
    ``M`` takes in the fewest eigenvectors of the same matrix, for the inputs by then, with which it holds the share
    ``energy`` of them (gradient projection memory, Saha et al. 2021)::

        tr(M^T C M) >= energy * tr(C)

    The paper raises this share from experience to experience towards 1, for which it must know how many there will be;
    here it is constant. Where fewer than the adapter's rank of directions are left, the other rows of ``A_t`` are 0.

    Both times, ``n_examples`` of the new examples pass through the model in evaluation mode, without padding tokens;
    the ranks share them and add up their ``C``, in float64, ``inputs^2`` numbers per layer. ``A_t`` is held where it
    is: its gradient is 0, and whatever else the optimizer does to it is undone inside the step. Earlier adapters are
    added to the frozen weights. State: ``M`` of every layer.

    Args:
        energy: Share of the energy of an experience's inputs that later ones leave alone, in (0, 1]. Default: 0.95.
        n_examples: Most examples of an experience to compute ``C`` on, over all ranks. Default: 512.
        seed: Seed of their choice. Default: 0.

    Raises:
        ValueError: If an argument is out of range. Before the first step, if the training data cannot be read by index.
            In ``setup`` or before the first step, as for :class:`~evertune.callbacks.OrthogonalLoRA`.

    Example::

        module = SequenceClassificationModule("bert-base-uncased", peft={"method": "lora", "r": 8})
        callbacks = [Replay(memory_size=600), InfLoRA()]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    moves_weights = True

    def __init__(self, energy: float = 0.95, n_examples: int = 512, seed: int = 0) -> None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
        if n_examples < 1:
            raise ValueError(f"n_examples must be positive, got {n_examples}")
        super().__init__(seed)
        self.energy, self.n_examples = energy, n_examples
        self._held: dict[int, Tensor] = {}  # by number, the fragments of A_t

    # --- the design of A_t

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Add the old adapters to the weights, and design the new ones."""
        super().start(trainer, module, shards)  # the inputs are those of the merged model
        designed, full = {}, []
        for name, covariance in self._covariances(trainer, module, shards).items():
            rank = shards.shapes[next(layer.down for layer in self._layers if layer.name == name)][0]
            energies, directions = _directions(covariance, self.kept.get(name))
            known = energies[:rank] > _ROUNDING * covariance.trace()
            designed[name] = (directions[:, :rank] * known).T / math.sqrt(3)
            full += [] if bool(known.any()) else [name]
        if full:
            rank_zero_warn(
                f"InfLoRA: earlier experiences use all directions of the inputs of {len(full)} of {len(designed)} "
                f"layers ({full[0]}, ...), whose adapters can learn nothing: lower energy, here {self.energy}"
            )
        self.restart(shards, _of_rank_0(trainer, shards, designed))

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the directions of the inputs into ``M``."""
        assert self._shards is not None
        bases = {}
        for name, covariance in self._covariances(trainer, module, self._shards).items():
            old = self.kept.get(name, torch.empty(len(covariance), 0)).to(covariance)
            energies, directions = _directions(covariance, old)
            missing = self.energy * covariance.trace() - (old.T @ covariance @ old).trace()
            held = energies.cumsum(0)
            n_new = 0 if missing <= 0 else min(1 + int((held < missing).sum()), len(energies) - old.shape[1])
            n_new = min(n_new, int((energies > _ROUNDING * covariance.trace()).sum()))
            bases[name] = torch.cat([old, directions[:, :n_new]], dim=1)
        self.kept = {name: one.cpu() for name, one in _of_rank_0(trainer, self._shards, bases).items()}
        super().on_experience_end(trainer, module)

    def _covariances(
        self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards
    ) -> dict[str, Tensor]:
        """The mean of ``x x^T`` over the inputs of each layer, float64 ``[inputs, inputs]``, the same on all ranks."""
        name = type(self).__name__
        data = TrainingData(trainer, name, "the inputs of the adapted layers for the training data")
        chance = np.random.default_rng((self.seed, self.experience_index))
        chosen = np.sort(chance.permutation(len(data.dataset))[: self.n_examples]).tolist()
        sums: dict[str, Tensor] = {}
        with (
            trial(f"{name} cannot run {type(module).__name__}", "give the module a task, a Task whose outputs() does"),
            evaluation_mode(module),
            trainer.precision_plugin.val_step_context(),
        ):
            for indices, counts in rounds(chosen, trainer):
                batch = data.batch(indices)
                with self._inputs(module, batch) as inputs:
                    task_of(module).outputs(module, batch)
                for layer, x in inputs.items():
                    rows = x.double() * counts
                    part = torch.cat([(rows.T @ rows).flatten(), rows.new_full((1,), len(rows) * counts)])
                    sums[layer] = part if layer not in sums else sums[layer] + part
        shards.release()
        if absent := [layer.name for layer in self._layers if layer.name not in sums]:
            raise ValueError(f"{name}: the layer {absent[0]!r} has an adapter, and takes no part in the outputs")
        together = summed(shards, sums)
        return {layer: (one[:-1] / one[-1]).view(math.isqrt(len(one) - 1), -1) for layer, one in together.items()}

    @contextmanager
    def _inputs(self, module: pl.LightningModule, batch: Any) -> Iterator[dict[str, Tensor]]:
        """The inputs of every layer with an adapter, ``[tokens, inputs]``, without those of padding."""
        found: dict[str, Tensor] = {}
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

        def note(name: str, x: Tensor) -> None:
            real = mask.bool() if mask is not None and mask.shape == x.shape[:-1] else None
            found[name] = x.flatten(0, -2) if real is None else x[real]

        hooks = [
            module.get_submodule(layer.name).register_forward_pre_hook(
                lambda _, arguments, name=layer.name: note(name, arguments[0])
            )
            for layer in self._layers
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    # --- A_t stays

    def prepare(self, shards: ParameterShards) -> None:
        """Note where the rows are to stay."""
        downs = {layer.down for layer in self._layers}
        numbered = enumerate(zip(shards.fragments, shards.values(), strict=True))
        self._held = {number: value.clone() for number, (fragment, value) in numbered if fragment.name in downs}

    def project_gradient(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Remove the gradient of ``A_t``, so that it takes no part in clipping either."""
        gradients = shards.gradients()
        for number in self._held:
            gradients[number].zero_()
        shards.write_back()

    def after_step(self, number: int, value: Tensor, learning_rate: float) -> None:
        """Put ``A_t`` back."""
        if number in self._held:
            value.copy_(self._held[number])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the strategy's buffers."""
        super().teardown(trainer, pl_module, stage)
        self._held = {}

    def __repr__(self) -> str:
        columns = [one.shape[1] for one in self.kept.values()]
        return f"<InfLoRA: experiences: {self.experience_index} learned, at most {max(columns, default=0)} directions>"


def _directions(covariance: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (columns) of a covariance off the span of ``old``, the largest first.

    The sign of an eigenvector is that which makes its largest element positive.
    """
    if old is not None:
        old = old.to(covariance)
        off = torch.eye(len(covariance)).to(covariance) - old @ old.T
        covariance = off @ covariance @ off
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


def _of_rank_0(trainer: pl.Trainer, shards: ParameterShards, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of rank 0, in the type of the weights, on all ranks: on other hardware, eigenvectors may differ."""
    values = shards.values()
    like = values[0] if values else torch.zeros(())
    return summed(shards, {name: one.to(like) * (trainer.global_rank == 0) for name, one in tensors.items()})
