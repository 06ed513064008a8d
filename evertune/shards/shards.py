"""The trainable parameters as this rank holds them: one view for every strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evertune._lightning import pl


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
    them and adds to the gradients; it never gathers a weight, and keeps state only as large as a fragment.

    Example::

        shards = ParameterShards.of(trainer)
        shards.add_to_gradient(weight_decay * value for value in shards.values())

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
        from evertune.shards.support import check_strategy, is_deepspeed

        check_strategy(trainer, "ParameterShards")
        module = trainer.lightning_module
        if not is_deepspeed(trainer):
            return ReplicatedShards(module, scaler=_scaler_until_step(trainer))
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
        """Write edited gradients back where ``gradients()`` returned copies."""

    def add_to_gradient(self, terms: Iterable[Tensor]) -> None:
        """Add one term per fragment to the gradients, multiplied by ``gradient_scale`` as the gradients are.

        Args:
            terms: One flat tensor per fragment. A generator needs room for one of them at a time.
        """
        for gradient, term in zip(self.gradients(), terms, strict=True):
            gradient.add_(term, alpha=self.gradient_scale)
        self.write_back()

    def release(self) -> None:  # noqa: B027  (only ZeRO-3 gathers)
        """Let go of weights that were gathered for passes through the module outside of training steps."""

    @property
    def gradient_scale(self) -> float:
        """What the gradients are multiplied by at the moment: a loss scale in fp16 training, else 1.

        DeepSpeed scales them until its own step, and so does Lightning where a fused optimizer takes the scale off.
        """
        return 1.0

    def zeros(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """One zero tensor per fragment, of the weights' own type by default."""
        return [torch.zeros_like(value, dtype=dtype) for value in self.values()]

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The inner product of two lists of fragments over all ranks, in float64, shape ``[]``."""
        total = sum((torch.dot(a.double(), b.double()) for a, b in zip(left, right, strict=True)), start=_zero(left))
        return self.sum_over_ranks(total) if self.sharded else total

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """All-reduce ``tensor`` in place by summation and return it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            sent = where_ranks_meet(tensor)
            dist.all_reduce(sent)
            if sent is not tensor:
                tensor.copy_(sent)
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

    def __init__(self, module: nn.Module, *, frozen: bool = False, scaler: Any = None) -> None:
        self._scaler = scaler
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad is not frozen}
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

    @property
    def gradient_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    @torch.no_grad()
    def set_values(self, values: list[Tensor]) -> None:
        """Replace the weights."""
        for p, value in zip(self._parameters.values(), values, strict=True):
            p.copy_(value.view(p.shape))


@dataclass
class OptimizerState:
    """What the optimizer of a ZeRO engine holds, by parameter: good for any stage and any number of processes.

    Args:
        scalars: for each trainable parameter, on every rank: what is one number (say ``step``).
        kinds: for each trainable parameter, on every rank: the names of what is as large as the parameter (say
            ``exp_avg``).
        groups: the settings of every parameter group (say ``lr``).
        tensors: for each of those names, one flat tensor per fragment.
    """

    scalars: dict[str, dict[str, Any]]
    kinds: dict[str, list[str]]
    groups: list[dict[str, Any]]
    tensors: dict[str, list[Tensor]]


class ZeroShards(ParameterShards):
    """What the stages of ZeRO share: the fp32 masters of a rank are pieces of a few flat partitions.

    The optimizer steps on the partitions, so its state is that of partitions too.
    """

    sharded = True

    def __init__(self, module: nn.Module, engine: Any, shapes: dict[str, torch.Size], held: list[_Held]) -> None:
        self._optimizer = engine.optimizer
        self._names = {p: name for name, p in module.named_parameters()}
        self._held = [one.parameter for one in held]
        self._places = [one.place for one in held]
        super().__init__(shapes, [one.fragment for one in held])

    @abstractmethod
    def _partitions(self) -> list[tuple[Tensor, list[str]]]:
        """The flat partitions of this rank's masters, and the parameters that each is for, on all ranks together."""

    @abstractmethod
    def _masters_changed(self) -> None:
        """Let the weights that the module computes with follow their masters. Call on every rank."""

    def optimizer_state(self) -> OptimizerState:
        """What the optimizer holds, for :meth:`load`. The tensors are not copies.

        Raises:
            ValueError: when a part of it is neither a number nor as large as the weights.
        """
        states = [(self._optimizer.optimizer.state.get(flat, {}), flat, names) for flat, names in self._partitions()]
        found = OptimizerState({}, {}, [], {})
        for state, flat, names in states:
            kinds = [kind for kind, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape]
            scalars = {kind: value for kind, value in state.items() if kind not in kinds}
            for kind, value in scalars.items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    raise ValueError(
                        f"{type(self._optimizer.optimizer).__name__} holds {kind!r} of shape {list(value.shape)} for "
                        f"{flat.numel()} weights: what is not one value per weight cannot be moved to other ranks"
                    )
            for name in names:
                found.scalars[name], found.kinds[name] = scalars, kinds
        found.groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.optimizer.param_groups
        ]
        for kind in sorted({kind for kinds in found.kinds.values() for kind in kinds}):
            found.tensors[kind] = [
                states[number][0][kind][start : start + fragment.numel].detach()
                if kind in states[number][0]
                else torch.zeros_like(states[number][1][start : start + fragment.numel])
                for (number, start), fragment in zip(self._places, self.fragments, strict=True)
            ]
        return found

    @torch.no_grad()
    def load(self, read: Callable[[str], list[Tensor]], optimizer: OptimizerState) -> None:
        """Replace the masters, the weights that follow from them and the optimizer's state. Call on every rank.

        Args:
            read: gives one flat tensor per fragment: ``read("value")`` the masters, ``read(kind)`` a kind of the
                optimizer's state. Called once for each, so that not more than one of them is in memory twice.
            optimizer: everything but the tensors.

        Raises:
            ValueError: when the optimizer has other parameter groups.
        """
        base, partitions = self._optimizer.optimizer, self._partitions()
        self._copy(read("value"), [flat for flat, _ in partitions])
        with self._lent_to_groups():
            state = base.state_dict()
            if len(state["param_groups"]) != len(optimizer.groups):
                raise ValueError(
                    f"the optimizer has {len(state['param_groups'])} parameter groups, the one that was saved had "
                    f"{len(optimizer.groups)}: configure it as it was"
                )
            for group, saved in zip(state["param_groups"], optimizer.groups, strict=True):
                group.update({key: saved[key] for key in group.keys() & saved.keys()})
            firsts = [names[0] if names else None for _, names in partitions]
            state["state"] = {
                number: {**optimizer.scalars[name], **{kind: torch.zeros_like(flat) for kind in optimizer.kinds[name]}}
                for number, ((flat, _), name) in enumerate(zip(partitions, firsts, strict=True))
                if name is not None and (optimizer.scalars[name] or optimizer.kinds[name])
            }
            for kind in sorted({kind for kinds in optimizer.kinds.values() for kind in kinds}):
                into = [state["state"].get(number, {}).get(kind) for number in range(len(partitions))]
                self._copy(read(kind), into)
            base.load_state_dict(state)
        self._masters_changed()

    @contextmanager
    def _lent_to_groups(self) -> Iterator[None]:
        """Within it, the optimizer's parameter groups hold the partitions."""
        yield

    def _copy(self, pieces: list[Tensor], partitions: Sequence[Tensor | None]) -> None:
        for (number, start), piece in zip(self._places, pieces, strict=True):
            partition = partitions[number]
            if partition is not None:
                partition[start : start + piece.numel()].copy_(piece)

    @property
    def gradient_scale(self) -> float:
        return float(getattr(self._optimizer, "loss_scale", 1.0))


class _Held(NamedTuple):
    """A parameter of which this rank holds a fragment, and where: in which partition, from which element on."""

    parameter: Any
    fragment: Fragment
    place: tuple[int, int]


class Zero12Shards(ZeroShards):
    """ZeRO-1 and ZeRO-2: each rank holds a part of the fp32 masters and of the averaged gradients."""

    def __init__(self, module: nn.Module, engine: Any) -> None:
        trainable: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        held = []
        for name, p in trainable.items():
            if p._hp_mapping is not None:
                here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                fragment = Fragment(name, p.shape, here.start, here.numel)
                held.append(_Held(p, fragment, (p._hp_mapping.param_group_index, there.start)))
        super().__init__(module, engine, {name: p.shape for name, p in trainable.items()}, held)

    def values(self) -> list[Tensor]:
        return [p._hp_mapping.get_hp_fragment().detach() for p in self._held]

    def gradients(self) -> list[Tensor]:
        gradients = []
        for p, fragment in zip(self._held, self.fragments, strict=True):
            gradient = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1)
            gradients.append(gradient if gradient.numel() == fragment.numel else fragment.slice(gradient))
        return gradients

    def _partitions(self) -> list[tuple[Tensor, list[str]]]:
        if hasattr(self._optimizer, "bf16_groups"):  # stage 1 in bf16 that accumulates gradients in fp32
            groups, partitions = self._optimizer.bf16_groups, self._optimizer.fp32_groups_flat_partition
        else:
            groups, partitions = self._optimizer.bit16_groups, self._optimizer.single_partition_of_fp32_groups
        return [(flat, [self._names[p] for p in group]) for flat, group in zip(partitions, groups, strict=True)]

    def _masters_changed(self) -> None:
        self._optimizer.update_lp_params()


class Zero3Shards(ZeroShards):
    """ZeRO-3: each rank holds a part of the weights themselves, of their fp32 masters and of the gradients."""

    def __init__(self, module: nn.Module, engine: Any) -> None:
        self._engine = engine
        trainable: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer, held = engine.optimizer, []
        for name, p in trainable.items():
            fragment = _partition_of(name, p)
            if fragment is not None:
                number, start, _ = optimizer.grad_position[optimizer.get_param_id(p)]
                held.append(_Held(p, fragment, (number, start)))
        self._lent: list[Tensor] = []
        super().__init__(module, engine, {name: p.ds_shape for name, p in trainable.items()}, held)

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

    def release(self) -> None:
        self._engine.empty_partition_cache()

    def _pairs(self) -> Iterable[tuple[Any, Fragment]]:
        return zip(self._held, self.fragments, strict=True)

    def _partitions(self) -> list[tuple[Tensor, list[str]]]:
        groups = [[self._names[p] for p in group] for group in self._optimizer.fp16_groups]
        return list(zip(self._optimizer.fp32_partitioned_groups_flat, groups, strict=True))

    @contextmanager
    def _lent_to_groups(self) -> Iterator[None]:
        self._optimizer._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self._optimizer._clear_fp32_optimizer_param_groups()

    def _masters_changed(self) -> None:
        self._optimizer.checkpoint_event_prologue()
        for number in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self._optimizer.checkpoint_event_epilogue()


class FrozenZero3Shards(ParameterShards):
    """ZeRO-3 shards the weights that are not trained, too; they have no masters and no gradients."""

    sharded = True

    def __init__(self, module: nn.Module, engine: Any) -> None:
        self._optimizer = engine.optimizer
        frozen: dict[str, Any] = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        parts = {name: _partition_of(name, p) for name, p in frozen.items()}
        self._held = [frozen[name] for name, part in parts.items() if part is not None]
        super().__init__({name: p.ds_shape for name, p in frozen.items()}, [p for p in parts.values() if p is not None])

    def values(self) -> list[Tensor]:
        return [p.ds_tensor.detach().view(-1)[: f.numel] for p, f in zip(self._held, self.fragments, strict=True)]

    def gradients(self) -> list[Tensor]:
        raise ValueError("weights that are not trained have no gradients")

    def set_values(self, values: list[Tensor]) -> None:
        """Replace the weights. Call on every rank."""
        self._optimizer.checkpoint_event_prologue()
        for own, value in zip(self.values(), values, strict=True):
            own.copy_(value)
        self._optimizer.checkpoint_event_epilogue()


def _partition_of(name: str, parameter: Any) -> Fragment | None:
    """The part of a ZeRO-3 parameter that this rank holds; the last parts are padded, and may be padding alone."""
    offset = dist.get_rank() * parameter.ds_tensor.ds_numel
    numel = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - offset)
    return Fragment(name, parameter.ds_shape, offset, numel) if numel > 0 else None


def where_ranks_meet(tensor: Tensor) -> Tensor:
    """The tensor, or a copy on the device on which the process group reduces: NCCL knows GPUs only."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def _scaler_until_step(trainer: pl.Trainer) -> Any:
    """Lightning's loss scaler where a fused optimizer takes the scale off in its step, else None."""
    in_step = any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers)
    return getattr(trainer.precision_plugin, "scaler", None) if in_step else None


def _zero(tensors: Sequence[Tensor]) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
