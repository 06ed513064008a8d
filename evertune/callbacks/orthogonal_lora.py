"""Orthogonal LoRA (O-LoRA): each experience learns in directions that the earlier ones have not used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.adapter_method import AdapterMethod, summed
from evertune.shards.shards import ParameterShards


class OrthogonalLoRA(AdapterMethod):
    """Orthogonal LoRA (O-LoRA): one adapter per experience, orthogonal to those before, on any strategy of evertune.

    Wang et al. 2023, "Orthogonal subspace learning for language model continual learning". Every experience ``t`` has
    its own adapter ``B_t A_t`` on each adapted layer; the earlier ones are frozen. The loss has the further term ::

        strength * sum_{i < t} |A_i A_t^T|^2        (the sum of the squares of all elements, over all layers)

    so that the rows of ``A_t``, along which the layer's input is read, stay orthogonal to those of the earlier
    experiences, and what is learned hardly changes the output for their inputs. Sharded weights are out of the loss's
    reach, so the term acts on the gradient, ``2 * strength * sum_i (A_t A_i^T) A_i``: each rank multiplies the part of
    ``A_t`` that it holds, and one all-reduce of ``rank * rank * (t - 1)`` numbers per layer adds the products up. The
    loss that is logged does not include it.

    When an experience starts, the earlier adapter is added to the frozen weights, and the adapter that PEFT has put
    into the module starts again, so that time and memory do not grow. State: the ``A_i`` of all experiences.

    Args:
        strength: Strength of the term, not negative. Default: 0.5, as in the paper.
        seed: Seed of the initial weights of each adapter. Default: 0.

    Raises:
        ValueError: If an argument is out of range. In ``setup`` or before the first step, if the module has no LoRA
            adapters, or other than plain ones on linear layers with frozen weights; if another callback starts adapters
            or keeps weights of the last experience (``EWC``, ``MAS``, ``SynapticIntelligence``, ``L2SP``,
            ``ShrinkPerturb``, ``OSFT``) or ends experiences within a fit; or if the strategy is not supported.

    Example::

        module = SequenceClassificationModule("bert-base-uncased", peft={"method": "lora", "r": 8})
        callbacks = [Replay(memory_size=600), OrthogonalLoRA()]
        ContinualTrainer(max_epochs=3, callbacks=callbacks).fit_stream(module, stream)
    """

    def __init__(self, strength: float = 0.5, seed: int = 0) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and not negative, got {strength}")
        super().__init__(seed)
        self.strength = strength
        self._earlier: dict[str, Tensor] = {}  # by the name of A_t, the rows of the earlier ones

    def prepare(self, shards: ParameterShards) -> None:
        """Take the rows of the earlier adapters to the device."""
        unknown = [layer.name for layer in self._layers if self.kept and layer.name not in self.kept]
        if unknown:
            raise ValueError(
                f"OrthogonalLoRA has learned adapters of {next(iter(self.kept))!r} and not of {unknown[0]!r}: keep the "
                "adapted layers from fit to fit, or start with a new OrthogonalLoRA"
            )
        device = next((value.device for value in shards.values()), torch.device("cpu"))
        self._earlier = {layer.down: self.kept[layer.name].to(device) for layer in self._layers if self.kept}

    def add_to_gradient(self, shards: ParameterShards) -> None:
        """Add the gradient of the term."""
        if not self._earlier or self.strength == 0:
            return
        products, gradients = self._products(shards), shards.gradients()
        for fragment, gradient in zip(shards.fragments, gradients, strict=True):
            if fragment.name in products:
                pull = products[fragment.name] @ self._earlier[fragment.name]
                gradient.add_(fragment.slice(pull), alpha=2 * self.strength * shards.gradient_scale)
        shards.write_back()

    def _products(self, shards: ParameterShards) -> dict[str, Tensor]:
        """``A_t A_i^T`` of every layer, for all earlier experiences side by side: ``[rank, rank * (t - 1)]``."""
        parts = {name: rows.new_zeros(shards.shapes[name][0], len(rows)) for name, rows in self._earlier.items()}
        for fragment, value in zip(shards.fragments, shards.values(), strict=True):
            if fragment.name in parts:
                own = torch.zeros(fragment.shape, device=value.device)
                fragment.slice(own).copy_(value)
                parts[fragment.name] = own @ self._earlier[fragment.name].T
        return summed(shards, parts) if shards.sharded else parts

    def penalty(self) -> Tensor:
        """The term at the current weights, shape ``[]``. Call on every rank during a fit."""
        if self._shards is None or not self._earlier:
            return torch.zeros(())
        squares = [product.square().sum() for product in self._products(self._shards).values()]
        return self.strength * torch.stack(squares).sum()

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the rows of the adapter."""
        assert self._shards is not None
        rows = self.whole(self._shards, [layer.down for layer in self._layers])
        for layer in self._layers:
            earlier = self.kept.get(layer.name, torch.empty(0, rows[layer.down].shape[1]))
            self.kept[layer.name] = torch.cat([earlier, rows[layer.down].cpu()])
        super().on_experience_end(trainer, module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the strategy's buffers."""
        super().teardown(trainer, pl_module, stage)
        self._earlier = {}

    def __repr__(self) -> str:
        rows = sum(len(one) for one in self.kept.values())
        return f"<OrthogonalLoRA: experiences: {self.experience_index} learned, {rows} rows of adapters>"
