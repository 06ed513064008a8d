"""The trainable parameters as this rank holds them: one view for every strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one parameter's elements, held by this rank.

    Args:
        name: the parameter's name in ``module.named_parameters()``.
        shape: the shape of the whole parameter.
        offset: where the run starts in the flattened parameter.
        numel: how many elements it has.
    """

    name: str
    shape: torch.Size
    offset: int
    numel: int

    def slice(self, full: Tensor) -> Tensor:
        """The elements of ``full`` (as large as the parameter, of any shape) that belong to this fragment, flat."""
        return full.reshape(-1)[self.offset : self.offset + self.numel]


class ParameterShards(ABC):
    """The trainable parameters of a module as this rank holds them, under any strategy.

    ``values()`` and ``gradients()`` give one flat tensor per entry of ``fragments``. A method in weight space reads
    them, adds to the gradients in place and calls ``write_back()``; it never gathers a weight, and keeps state only as
    large as a fragment.

    Example::

        shards = ParameterShards.of(trainer)
        for value, gradient in zip(shards.values(), shards.gradients()):
            gradient.add_(value, alpha=weight_decay)
        shards.write_back()

    Attributes:
        fragments: what this rank holds, in the order of ``named_parameters()``; a parameter of which it holds nothing
            has no entry.
        shapes: name to whole shape of every trainable parameter, the same on every rank.
        sharded: whether each rank holds only a part (ZeRO). When False every rank holds everything (one device, DDP).
    """

    sharded: bool

    def __init__(self, shapes: dict[str, torch.Size], fragments: list[Fragment]) -> None:
        self.shapes = shapes
        self.fragments = fragments

    @staticmethod
    def of(trainer: pl.Trainer) -> ParameterShards:
        """The view that fits the trainer's strategy, which must be set up (from ``on_fit_start`` on).

        Raises:
            ValueError: for a strategy evertune does not support.
        """
        from evertune.strategies.support import check_strategy, is_deepspeed

        check_strategy(trainer, "ParameterShards")
        module = trainer.lightning_module
        if not is_deepspeed(trainer):
            return ReplicatedShards(module)
        engine: Any = trainer.strategy.model
        return Zero3Shards(module, engine) if engine.zero_optimization_stage() == 3 else Zero12Shards(module, engine)

    @abstractmethod
    def values(self) -> list[Tensor]:
        """The value of every fragment in full precision (the fp32 masters of mixed precision), flat. Do not edit."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradient of every fragment, flat, averaged over ranks and times ``gradient_scale``.

        Only between the backward pass that completes an accumulation and the optimizer's step.
        """

    def write_back(self) -> None:  # noqa: B027  (most strategies hand out the live storage)
        """Make edits of the tensors that ``gradients()`` gave out count, where they are not the live storage."""

    def release(self) -> None:  # noqa: B027  (only ZeRO-3 gathers)
        """Let go of weights that were gathered for passes through the module outside of training steps."""

    @property
    def gradient_scale(self) -> float:
        """What the gradients are multiplied by at the moment: the loss scale of DeepSpeed's fp16 training, else 1."""
        return 1.0

    def zeros(self) -> list[Tensor]:
        """One zero tensor per fragment."""
        return [torch.zeros_like(value) for value in self.values()]

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The inner product of two lists of fragments over all ranks, in float64, shape ``[]``."""
        total = sum((torch.dot(a.double(), b.double()) for a, b in zip(left, right, strict=True)), start=_zero(left))
        return self.sum_over_ranks(total) if self.sharded else total

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """All-reduce ``tensor`` in place by summation and return it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(tensor)
        return tensor

    def rearrange(self, old: Mapping[str, tuple[int, Tensor]], *, old_sharded: bool) -> list[Tensor]:
        """Fit tensors that were kept for other fragments to the present ones. Call on every rank.

        Fragments move when the head grows, and when the strategy changes between two fits. Elements are matched by
        parameter name and position; a parameter that grew at its end keeps its old elements, the new ones are zero.
        One parameter at a time is summed over the ranks, so nothing larger than the largest parameter is allocated.

        Args:
            old: for each parameter of which this rank held a fragment, its offset and values.
            old_sharded: whether the ranks held different parts of them.
        """
        here = {fragment.name: fragment for fragment in self.fragments}
        device = self.values()[0].device if self.fragments else torch.device("cpu")
        moved = []
        for name, shape in self.shapes.items():
            full = torch.zeros(shape.numel(), device=device)
            if name in old:
                offset, values = old[name]
                kept = values[: max(0, shape.numel() - offset)]
                full[offset : offset + kept.numel()] = kept.to(device)
            if old_sharded:
                self.sum_over_ranks(full)
            if name in here:
                moved.append(here[name].slice(full).clone())
        return moved


class ReplicatedShards(ParameterShards):
    """Every rank holds every weight: one device and DDP."""

    sharded = False

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        fragments = [Fragment(name, p.shape, 0, p.numel()) for name, p in self._parameters.items()]
        super().__init__({name: p.shape for name, p in self._parameters.items()}, fragments)

    def values(self) -> list[Tensor]:
        return [p.detach().reshape(-1) for p in self._parameters.values()]

    def gradients(self) -> list[Tensor]:
        for p in self._parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
            elif not p.grad.is_contiguous():
                p.grad = p.grad.contiguous()
        return [p.grad.view(-1) for p in self._parameters.values() if p.grad is not None]


class Zero12Shards(ParameterShards):
    """ZeRO-1 and ZeRO-2: each rank holds a part of the fp32 masters and of the averaged gradients."""

    sharded = True

    def __init__(self, module: nn.Module, engine: Any) -> None:
        self._optimizer = engine.optimizer
        trainable: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        held = {name: p for name, p in trainable.items() if p._hp_mapping is not None}
        fragments = []
        for name, p in held.items():
            address = p._hp_mapping.lp_fragment_address
            fragments.append(Fragment(name, p.shape, address.start, address.numel))
        self._held: list[Any] = list(held.values())
        super().__init__({name: p.shape for name, p in trainable.items()}, fragments)

    def values(self) -> list[Tensor]:
        return [p._hp_mapping.get_hp_fragment().detach() for p in self._held]

    def gradients(self) -> list[Tensor]:
        gradients = []
        for p, fragment in zip(self._held, self.fragments, strict=True):
            gradient = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1)
            gradients.append(gradient if gradient.numel() == fragment.numel else fragment.slice(gradient))
        return gradients

    @property
    def gradient_scale(self) -> float:
        return float(getattr(self._optimizer, "loss_scale", 1.0))


class Zero3Shards(ParameterShards):
    """ZeRO-3: each rank holds a part of the weights themselves, of their fp32 masters and of the gradients."""

    sharded = True

    def __init__(self, module: nn.Module, engine: Any) -> None:
        self._engine = engine
        trainable: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        fragments = []
        self._held: list[Any] = []
        rank = dist.get_rank()
        for name, p in trainable.items():
            offset = rank * p.ds_tensor.ds_numel
            numel = min(p.ds_tensor.ds_numel, p.ds_numel - offset)  # the last parts are padded
            if numel > 0:
                fragments.append(Fragment(name, p.ds_shape, offset, numel))
                self._held.append(p)
        self._lent: list[Tensor] = []
        super().__init__({name: p.ds_shape for name, p in trainable.items()}, fragments)

    def values(self) -> list[Tensor]:
        from deepspeed.utils import safe_get_local_fp32_param

        return [safe_get_local_fp32_param(p).detach()[: f.numel] for p, f in self._pairs()]

    def gradients(self) -> list[Tensor]:
        from deepspeed.utils import safe_get_local_grad

        self._lent = [safe_get_local_grad(p).view(-1) for p in self._held]
        return [gradient[: fragment.numel] for gradient, (_, fragment) in zip(self._lent, self._pairs(), strict=True)]

    def write_back(self) -> None:
        from deepspeed.utils import safe_set_local_grad

        for p, gradient in zip(self._held, self._lent, strict=True):
            safe_set_local_grad(p, gradient)
        self._lent = []

    @property
    def gradient_scale(self) -> float:
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def release(self) -> None:
        self._engine.empty_partition_cache()

    def _pairs(self) -> Iterable[tuple[Any, Fragment]]:
        return zip(self._held, self.fragments, strict=True)


def _zero(tensors: Sequence[Tensor]) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
