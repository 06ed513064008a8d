"""Base class of methods that train one LoRA adapter per experience."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks.gradient_method import GradientMethod
from evertune.callbacks.osft import OSFT
from evertune.callbacks.quadratic_method import QuadraticMethod
from evertune.callbacks.shrink_perturb import ShrinkPerturb
from evertune.callbacks.state import load_state, save_state
from evertune.shards.opened import frozen_shards_of
from evertune.shards.shards import ParameterShards
from evertune.utils.files import sha256
from evertune.utils.ranks import is_writer

_STATE, _TENSORS = "adapters.json", "adapters.safetensors"


@dataclass(frozen=True)
class LoRALayer:
    """A linear layer with an adapter: its output is that of ``W + scale * B A``.

    Args:
        name: Name of the layer in the module.
        base: Name of the weight ``W [outputs, inputs]``, which is frozen.
        down: Name of the weight ``A [rank, inputs]``.
        up: Name of the weight ``B [outputs, rank]``.
        scale: Factor of the adapter.
        transposed: Whether ``W`` is stored as ``[inputs, outputs]``.
    """

    name: str
    base: str
    down: str
    up: str
    scale: float
    transposed: bool


@dataclass
class _Saved:
    """The content of the JSON file that :meth:`AdapterMethod.save` writes."""

    experience_index: int
    learning: bool
    sha256: str


class AdapterMethod(GradientMethod):
    """Base class of methods with a LoRA adapter for each experience, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2.

    The module has one adapter, added by PEFT. When an experience starts, what the adapter has learned moves into the
    frozen weights, ``W <- W + scale * B A``, each rank changing the part that it holds, and the adapter starts again:
    ``A`` is drawn as PEFT draws it, the same on any number of ranks, and ``B`` is 0. This is what one frozen adapter
    for each earlier experience computes, in the time and memory of one.

    A method says what an experience leaves (:meth:`on_experience_end`) in :attr:`kept`, and acts on the gradient as any
    :class:`~evertune.callbacks.gradient_method.GradientMethod`. An experience whose fit failed continues with its
    adapter.

    Args:
        seed: Seed of the adapters' initial weights.

    Attributes:
        kept: What earlier experiences have left, by name, the same on all ranks, as small as adapters are.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.seed = seed
        self.kept: dict[str, Tensor] = {}
        self._learning = False  # whether the adapter is that of an experience that has started and not ended
        self._layers: list[LoRALayer] = []  # within a fit

    @classmethod
    def bytes_per_weight(cls) -> None:
        """Unknown: it depends on the number of experiences."""

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, shards: ParameterShards) -> None:
        """Start the adapter of a new experience: add the old one to the weights. Called on every rank."""
        self.merge(trainer, shards)
        self.restart(shards, {})

    def prepare(self, shards: ParameterShards) -> None:
        """Build what the steps of this fit need. Called on every rank before the first step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the requirements."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        name = type(self).__name__
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            theirs = type(other).__name__
            if isinstance(other, AdapterMethod) and other is not self:
                raise ValueError(f"{name} and {theirs} in one Trainer: each starts the adapters again; use one")
            if isinstance(other, QuadraticMethod | ShrinkPerturb | OSFT):
                raise ValueError(
                    f"{name} and {theirs} in one Trainer: {theirs} acts on the weights of the last experience, and the "
                    f"adapters of {name} start again with each; use one of them"
                )
            if getattr(other, "splits_fit", False):
                raise ValueError(
                    f"{name} starts the adapters where a fit starts, and {theirs} ends experiences within it; use one "
                    "of them"
                )
        if getattr(pl_module, "peft", True) is None or next(pl_module.parameters(), None) is not None:
            lora_layers(pl_module, name)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the adapter of an experience, unless the fit resumes within one."""
        super().on_train_start(trainer, pl_module)
        assert self._shards is not None
        self._layers = lora_layers(pl_module, type(self).__name__)
        if not self._learning:
            self.start(trainer, pl_module, self._shards)
            self._learning = True
        self.prepare(self._shards)

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note that the adapter is learned."""
        self._learning = False

    # --- the weights

    def whole(self, shards: ParameterShards, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights of adapters by name, in full precision, the same on all ranks. Call on every rank."""
        values = shards.values()
        like = values[0] if values else torch.zeros(())
        full = {name: like.new_zeros(shards.shapes[name]) for name in names}
        for fragment, value in zip(shards.fragments, values, strict=True):
            if fragment.name in full:
                fragment.slice(full[fragment.name]).copy_(value)
        return summed(shards, full) if shards.sharded else full

    def merge(self, trainer: pl.Trainer, shards: ParameterShards) -> None:
        """Add what the adapters have learned to the weights. Call on every rank."""
        weights = self.whole(shards, [name for layer in self._layers for name in (layer.down, layer.up)])
        self.add_to_base(trainer, lambda layer: layer.scale * (weights[layer.up] @ weights[layer.down]))

    def add_to_base(self, trainer: pl.Trainer, change: Callable[[LoRALayer], Tensor]) -> None:
        """Add to the frozen weights of the layers, each rank to the part that it holds, one layer at a time.

        Args:
            trainer: Trainer in training.
            change: What to add to the weight of a layer, ``[outputs, inputs]``, the same on all ranks.
        """
        frozen = frozen_shards_of(trainer)
        layers = {layer.base: layer for layer in self._layers}

        def changed() -> Iterator[Tensor]:
            for fragment, value in zip(frozen.fragments, frozen.values(), strict=True):
                layer = layers.get(fragment.name)
                if layer is None:
                    yield value
                    continue
                added = change(layer)
                yield value + fragment.slice(added.T if layer.transposed else added).to(value.device)

        frozen.set_values(changed())

    def restart(self, shards: ParameterShards, downs: dict[str, Tensor]) -> None:
        """Set every ``B`` to 0 and every ``A`` to that in ``downs``, by the layer's name; by default it is drawn."""
        made = {}
        for number, layer in enumerate(self._layers):
            shape = shards.shapes[layer.down]
            made[layer.down] = downs[layer.name] if layer.name in downs else self._drawn(shape, number)
            made[layer.up] = torch.zeros(shards.shapes[layer.up])
        shards.set_values(
            fragment.slice(made[fragment.name]).to(value) if fragment.name in made else value
            for fragment, value in zip(shards.fragments, shards.values(), strict=True)
        )

    def _drawn(self, shape: torch.Size, number: int) -> Tensor:
        """The initial ``A`` of a layer, uniform within one over the root of the inputs."""
        seed = np.random.SeedSequence([self.seed, self.experience_index, number])
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    # --- what is saved

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, the same on all ranks."""
        return {"experience_index": self.experience_index, "learning": self._learning, "kept": dict(self.kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        self.experience_index, self._learning = state_dict["experience_index"], state_dict["learning"]
        self.kept = dict(state_dict["kept"])

    def save(self, directory: str | Path) -> None:
        """Write what is kept to a folder (safetensors and JSON). Call on every rank."""
        from safetensors.torch import save_file

        directory, digest = Path(directory), ""
        if is_writer():
            directory.mkdir(parents=True, exist_ok=True)
            save_file({name: one.cpu().contiguous() for name, one in self.kept.items()}, directory / _TENSORS)
            digest = sha256(directory / _TENSORS)
        save_state(directory / _STATE, _Saved(self.experience_index, self._learning, digest))

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, at any world size.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is corrupt.
        """
        from safetensors.torch import load_file

        state, tensors = load_state(_Saved, Path(directory) / _STATE), Path(directory) / _TENSORS
        if sha256(tensors) != state.sha256:
            raise ValueError(f"{tensors} is corrupt: its content does not have the digest that {_STATE} states")
        self.experience_index, self._learning = state.experience_index, state.learning
        self.kept = {name: one.clone() for name, one in load_file(tensors).items()}  # else mapped to the file

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the strategy's buffers."""
        super().teardown(trainer, pl_module, stage)
        self._layers = []


def summed(shards: ParameterShards, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all ranks of tensors by name, in one all-reduce."""
    together = shards.sum_over_ranks(torch.cat([part.reshape(-1) for part in parts.values()]))
    split = together.split([part.numel() for part in parts.values()])
    return {name: one.view(part.shape) for (name, part), one in zip(parts.items(), split, strict=True)}


def lora_layers(module: pl.LightningModule, who: str) -> list[LoRALayer]:
    """The layers of a module with a LoRA adapter.

    Raises:
        ValueError: If there are none, or one that is not a linear layer with a single plain adapter and a frozen weight
            in floating point.
    """
    lora: Any = sys.modules.get("peft.tuners.lora")  # heavy, and loaded if there are adapters
    parts = module.named_modules() if lora is not None else ()
    found = [(name, part) for name, part in parts if isinstance(part, lora.LoraLayer)]
    if not found:
        raise ValueError(
            f"{who} trains LoRA adapters, and {type(module).__name__} has none: pass "
            'peft={"method": "lora", "r": 8} to it, or add them with PEFT'
        )
    weights, layers = dict(module.named_parameters()), []
    for name, layer in found:
        if reason := _unsupported(lora, layer, weights.get(f"{name}.base_layer.weight")):
            raise ValueError(f"{who} supports plain LoRA on linear layers with frozen weights, and {name} {reason}")
        [adapter] = layer.lora_A
        layers.append(
            LoRALayer(
                name,
                f"{name}.base_layer.weight",
                f"{name}.lora_A.{adapter}.weight",
                f"{name}.lora_B.{adapter}.weight",
                float(layer.scaling[adapter]),
                bool(layer.fan_in_fan_out),
            )
        )
    return layers


def _unsupported(lora: Any, layer: Any, weight: Tensor | None) -> str:
    """Why the adapter of a layer cannot be merged; empty if it can."""
    if not isinstance(layer, lora.Linear):
        return f"is a {type(layer).__name__} on a {type(layer.get_base_layer()).__name__}"
    if len(layer.lora_A) != 1 or list(layer.active_adapters) != list(layer.lora_A):
        return f"has the adapters {list(layer.lora_A)}, of which {list(layer.active_adapters)} are active: keep one"
    if layer.lora_variant or any(layer.lora_bias.values()):
        return "has another kind of adapter (DoRA, a bias or the like)"
    if layer.merged:
        return "has its adapter merged into the weight: unmerge it"
    if weight is None or not weight.is_floating_point() or weight.itemsize < 4:
        kind = None if weight is None else weight.dtype
        return f"has a weight of {kind}, which would round away what adapters add to it: keep it in float32"
    return "trains its weight, too" if weight.requires_grad else ""
