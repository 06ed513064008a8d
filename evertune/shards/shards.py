"""The trainable parameters as this rank holds them: one interface for every strategy."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from evertune._lightning import pl
from evertune.utils.sharding import is_sharded, reshard


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of one parameter's elements, held by this rank.

    Args:
        name: Name of the parameter in ``module.named_parameters()``.
        shape: Shape of the whole parameter.
        offset: Index in the flattened parameter at which the run starts.
        numel: Number of elements in the run.
    """

    name: str
    shape: torch.Size
    offset: int
    numel: int

    def slice(self, full: Tensor) -> Tensor:
        """The elements of ``full`` (of the parameter's size, in any shape) that belong to this fragment, flat."""
        return full.reshape(-1)[self.offset : self.offset + self.numel]


class ParameterShards(ABC):
    """The trainable parameters of a module as this rank holds them, under any strategy.

    ``values()`` and ``gradients()`` return one flat tensor per entry of ``fragments``. A method in weight space reads
    them and adds to the gradients; it never gathers a weight, and its state is only as large as the fragments.

    Example::

        shards = ParameterShards.of(trainer)
        shards.add_to_gradient(weight_decay * value for value in shards.values())

    Attributes:
        fragments: Elements that this rank holds, in the order of ``named_parameters()``. A parameter of which it holds
            nothing has no entry.
        shapes: Name to full shape of every trainable parameter, the same on all ranks.
        sharded: Whether each rank holds only a part (ZeRO, FSDP2). If False, every rank holds all (one device, DDP).
    """

    sharded: bool

    def __init__(self, shapes: dict[str, torch.Size], fragments: list[Fragment]) -> None:
        self.shapes = shapes
        self.fragments = fragments

    @staticmethod
    def of(trainer: pl.Trainer, also: Collection[str] = ()) -> ParameterShards:
        """The shards for the trainer's strategy, which must be set up (from ``on_fit_start`` on).

        Args:
            trainer: Trainer in training.
            also: Names of parameters to include although they are frozen at present; what is added to their gradient is
                discarded. Not under ZeRO, whose engine holds nothing for them.

        Raises:
            ValueError: If evertune does not support the strategy.
        """
        from evertune.shards.support import check_strategy, is_deepspeed, is_fsdp2

        check_strategy(trainer, "ParameterShards")
        module = trainer.lightning_module
        if is_fsdp2(trainer):
            return FSDP2Shards(module, trainer.optimizers, also=also)
        if not is_deepspeed(trainer):
            return ReplicatedShards(module, scaler=_scaler_until_step(trainer), also=also)
        engine: Any = trainer.strategy.model
        return Zero3Shards(module, engine) if engine.zero_optimization_stage() == 3 else Zero12Shards(module, engine)

    @staticmethod
    def frozen(trainer: pl.Trainer) -> ParameterShards:
        """The weights that are not trained: sharded under FSDP2 and ZeRO-3, replicated elsewhere. No gradients."""
        from evertune.shards.support import is_deepspeed, is_fsdp2

        module = trainer.lightning_module
        if is_fsdp2(trainer):
            return FSDP2Shards(module, frozen=True)
        engine: Any = trainer.strategy.model
        if is_deepspeed(trainer) and engine.zero_optimization_stage() == 3:
            return FrozenZero3Shards(module, engine)
        return ReplicatedShards(module, frozen=True)

    @abstractmethod
    def values(self) -> list[Tensor]:
        """The value of every fragment in full precision (the fp32 masters in mixed precision), flat. Do not modify."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradient of every fragment, flat, averaged over the ranks and multiplied by ``gradient_scale``.

        Valid only between the backward pass that completes an accumulation and the optimizer's step.
        """

    @abstractmethod
    def set_values(self, values: Iterable[Tensor]) -> None:
        """Overwrite the weights, one flat tensor per fragment. Call on every rank, between two steps.

        With a generator, only one of the tensors is in memory at a time.
        """

    def write_back(self) -> None:  # noqa: B027  (most strategies hand out the live storage)
        """Write edited gradients back where ``gradients()`` returned copies."""

    def add_to_gradient(self, terms: Iterable[Tensor]) -> None:
        """Add one term per fragment to the gradients, multiplied by ``gradient_scale`` like the gradients.

        Args:
            terms: One flat tensor per fragment. With a generator, only one of them is in memory at a time.
        """
        for gradient, term in zip(self.gradients(), terms, strict=True):
            gradient.add_(term, alpha=self.gradient_scale)
        self.write_back()

    def after_step(self, optimizer: Optimizer, edit: Callable[[int, Tensor, float], None]) -> RemovableHandle:
        """Edit the weights inside every step of the optimizer, right after it has updated them.

        Under ZeRO these are the fp32 masters, before the weights of the module are derived from them, so that nothing
        is sent a second time. A step that the loss scaler skips calls nothing.

        Args:
            optimizer: The trainer's optimizer.
            edit: Function called with the number of a fragment, its value (flat; changed in place) and the learning
                rate of its parameter group.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: If the optimizer does not offer hooks.
        """

        def edit_each(_: list[str], updated: dict[int, tuple[Tensor, float]]) -> None:
            for number, (value, learning_rate) in updated.items():
                edit(number, value, learning_rate)

        return self._after_step(optimizer, edit_each)

    def after_whole_step(
        self, optimizer: Optimizer, edit: Callable[[list[str], dict[int, Tensor]], None]
    ) -> RemovableHandle:
        """Edit all weights together inside every step of the optimizer, in a way that may send something.

        Args:
            optimizer: The trainer's optimizer.
            edit: Function called on every rank with the names of the parameters that were updated on any rank, in the
                same order on all of them, and the values of this rank's fragments by number (flat; changed in place).
                Under ZeRO a step may be divided into several, each of which updates some of the parameters.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: If the optimizer does not offer hooks.
        """

        def edit_all(names: list[str], updated: dict[int, tuple[Tensor, float]]) -> None:
            edit(names, {number: value for number, (value, _) in updated.items()})

        return self._after_step(optimizer, edit_all)

    def _after_step(
        self, optimizer: Optimizer, edit: Callable[[list[str], dict[int, tuple[Tensor, float]]], None]
    ) -> RemovableHandle:
        """Call a function with what a step has updated: names on all ranks, values and learning rates on this one."""
        base = self._base(optimizer)
        if not isinstance(base, Optimizer):
            raise ValueError(
                f"{type(base).__name__} is not a torch.optim.Optimizer, so that nothing can act inside its step"
            )

        def edit_stepped(stepped: Optimizer, *_: Any) -> None:
            # Under ZeRO, a step may be divided into several, each of which sees only its own parameters.
            rates = {id(p): float(group["lr"]) for group in stepped.param_groups for p in group["params"]}
            updated = {
                number: (value, rates[id(parameter)])
                for number, (parameter, value) in enumerate(self._live())
                if parameter is not None and id(parameter) in rates
            }
            with torch.no_grad():
                edit([name for name, parameter in self._stepped() if id(parameter) in rates], updated)
                for number in updated:
                    self._edited(number, updated[number][0])

        return base.register_step_post_hook(edit_stepped)

    def only(self, names: Collection[str]) -> ParameterShards:
        """The same view of some of the parameters; names that are not there do not matter."""
        return SelectedShards(self, names)

    def _base(self, optimizer: Optimizer) -> Any:
        """The optimizer that updates the weights in full precision."""
        return optimizer

    def _live(self) -> list[tuple[Tensor | None, Tensor]]:
        """For each fragment, the tensor in the optimizer's parameter groups that holds it, and its own elements, flat.

        None if it is not to be updated.
        """
        raise ValueError(f"{type(self).__name__} does not say where the optimizer has its weights")

    def _stepped(self) -> Iterable[tuple[str, Tensor]]:
        """For each parameter, on all ranks alike, the tensor in the optimizer's parameter groups that holds it."""
        raise ValueError(f"{type(self).__name__} does not say where the optimizer has its weights")

    def _edited(self, number: int, value: Tensor) -> None:  # noqa: B027  (most strategies hand out the live storage)
        """Write an edited fragment back where :meth:`_live` returned a copy."""

    def optimizer_tensors(self, optimizer: Optimizer, kind: str) -> list[Tensor] | None:
        """A kind of optimizer state, such as ``exp_avg_sq``: one flat tensor per fragment, not a copy.

        Zero where the optimizer has none; None if it has none at all. Call on every rank.
        """
        raise ValueError(f"{type(self).__name__} does not say where the optimizer has its state")

    def release(self) -> None:  # noqa: B027  (only ZeRO-3 gathers)
        """Release weights that were gathered for passes through the module outside of training steps."""

    @property
    def gradient_scale(self) -> float:
        """The current factor of the gradients: the loss scale in fp16 training, else 1.

        With DeepSpeed the gradients are scaled until its own step, and in Lightning until a fused optimizer unscales
        them.
        """
        return 1.0

    def zeros(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """One zero tensor per fragment, by default of the weights' type."""
        return [torch.zeros_like(value, dtype=dtype) for value in self.values()]

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The inner product of two lists of fragments over all ranks, in float64, shape ``[]``."""
        total = sum((torch.dot(a.double(), b.double()) for a, b in zip(left, right, strict=True)), start=_zero(left))
        return self.sum_over_ranks(total) if self.sharded else total

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """All-reduce ``tensor`` in place by summation, and return it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            sent = where_ranks_meet(tensor)
            dist.all_reduce(sent)
            if sent is not tensor:
                tensor.copy_(sent)
        return tensor

    def rearrange(self, old: Mapping[str, tuple[int, Tensor]], *, old_sharded: bool) -> list[Tensor]:
        """Move tensors kept for other fragments to the current ones. Call on every rank.

        Fragments change when the head grows, and when the strategy changes between two fits. Elements are matched by
        parameter name and position; a parameter that grew at its end keeps its old elements, and the new ones are zero.
        Parameters are summed over the ranks one at a time, so nothing larger than the largest parameter is allocated.

        Args:
            old: For each parameter of which this rank held a fragment, its offset and values.
            old_sharded: Whether the ranks held different parts of them.
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
            # Every rank reaches this all-reduce for every parameter, also for those of which it held nothing.
            if old_sharded:
                self.sum_over_ranks(full)
            if name in here:
                moved.append(here[name].slice(full).clone())
        return moved


class SelectedShards(ParameterShards):
    """Some of the parameters of another view.

    Args:
        shards: The view.
        names: Names of the parameters.
    """

    def __init__(self, shards: ParameterShards, names: Collection[str]) -> None:
        self._all = shards
        self._numbers = [number for number, one in enumerate(shards.fragments) if one.name in names]
        self.sharded = shards.sharded
        shapes = {name: shape for name, shape in shards.shapes.items() if name in names}
        super().__init__(shapes, self._of(shards.fragments))

    def _of(self, everything: Sequence[Any]) -> list[Any]:
        return [everything[number] for number in self._numbers]

    def values(self) -> list[Tensor]:
        return self._of(self._all.values())

    def gradients(self) -> list[Tensor]:
        return self._of(self._all.gradients())

    def write_back(self) -> None:
        self._all.write_back()

    def set_values(self, values: Iterable[Tensor]) -> None:
        everything = self._all.values()
        for number, value in zip(self._numbers, values, strict=True):
            everything[number] = value
        self._all.set_values(everything)

    def optimizer_tensors(self, optimizer: Optimizer, kind: str) -> list[Tensor] | None:
        found = self._all.optimizer_tensors(optimizer, kind)
        return None if found is None else self._of(found)

    def release(self) -> None:
        self._all.release()

    @property
    def gradient_scale(self) -> float:
        return self._all.gradient_scale

    def _base(self, optimizer: Optimizer) -> Any:
        return self._all._base(optimizer)

    def _live(self) -> list[tuple[Tensor | None, Tensor]]:
        return self._of(self._all._live())

    def _stepped(self) -> Iterable[tuple[str, Tensor]]:
        return [(name, parameter) for name, parameter in self._all._stepped() if name in self.shapes]

    def _edited(self, number: int, value: Tensor) -> None:
        self._all._edited(self._numbers[number], value)


class ReplicatedShards(ParameterShards):
    """Every rank holds every weight: one device, or DDP."""

    sharded = False

    def __init__(
        self, module: nn.Module, *, frozen: bool = False, scaler: Any = None, also: Collection[str] = ()
    ) -> None:
        self._scaler = scaler
        self._parameters = {
            name: p for name, p in module.named_parameters() if p.requires_grad is not frozen or name in also
        }
        fragments = [Fragment(name, p.shape, 0, p.numel()) for name, p in self._parameters.items()]
        super().__init__({name: p.shape for name, p in self._parameters.items()}, fragments)

    def values(self) -> list[Tensor]:
        return [p.detach().reshape(-1) for p in self._parameters.values()]

    def gradients(self) -> list[Tensor]:
        # One buffer for all frozen weights: an optimizer would decay a weight that has a gradient.
        frozen = [p for p in self._parameters.values() if not p.requires_grad]
        largest = {p.dtype: p for p in sorted(frozen, key=Tensor.numel)}
        discarded = {dtype: torch.zeros_like(p).reshape(-1) for dtype, p in largest.items()}
        gradients = []
        for p in self._parameters.values():
            if not p.requires_grad:
                gradients.append(discarded[p.dtype][: p.numel()])
                continue
            # A weight that took no part in the loss must still receive the penalty; view(-1) below needs contiguous
            # storage, since a copy would lose the added terms.
            if p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
            elif not p.grad.is_contiguous():
                p.grad = p.grad.contiguous()
            gradients.append(p.grad.view(-1))
        return gradients

    @property
    def gradient_scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def _live(self) -> list[tuple[Tensor | None, Tensor]]:
        parameters = (p if p.requires_grad else None for p in self._parameters.values())
        return list(zip(parameters, self.values(), strict=True))

    def _stepped(self) -> Iterable[tuple[str, Tensor]]:
        return [(name, p) for name, p in self._parameters.items() if p.requires_grad]

    def _edited(self, number: int, value: Tensor) -> None:
        parameter = list(self._parameters.values())[number]
        if not parameter.is_contiguous():
            parameter.copy_(value.view(parameter.shape))

    def optimizer_tensors(self, optimizer: Optimizer, kind: str) -> list[Tensor] | None:
        states = [optimizer.state.get(p, {}).get(kind) for p in self._parameters.values()]
        if all(state is None for state in states):
            return None
        return [
            torch.zeros_like(value) if state is None else state.reshape(-1)
            for state, value in zip(states, self.values(), strict=True)
        ]

    @torch.no_grad()
    def set_values(self, values: Iterable[Tensor]) -> None:
        for p, value in zip(self._parameters.values(), values, strict=True):
            p.copy_(value.view(p.shape))


@dataclass
class OptimizerState:
    """The state of an optimizer by parameter, valid under ZeRO and FSDP2 and for any number of processes.

    Args:
        scalars: For each trainable parameter, on every rank, the state that is a single number (such as ``step``).
        kinds: For each trainable parameter, on every rank, the names of the state tensors of the parameter's size (such
            as ``exp_avg``).
        groups: Settings of every parameter group (such as ``lr``).
        tensors: For each name in ``kinds``, one flat tensor per fragment.
    """

    scalars: dict[str, dict[str, Any]]
    kinds: dict[str, list[str]]
    groups: list[dict[str, Any]]
    tensors: dict[str, list[Tensor]]


class PortableShards(ParameterShards):
    """Sharded weights whose checkpoints any number of processes can read: with the optimizer's state, by parameter."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The state of the optimizer, for :meth:`load`. The tensors are not copies.

        Raises:
            ValueError: If a part of the state is neither a number nor a tensor of the weights' size.
        """

    def optimizer_tensors(self, optimizer: Optimizer, kind: str) -> list[Tensor] | None:
        return self.optimizer_state().tensors.get(kind)

    @abstractmethod
    def load(self, read: Callable[[str], list[Tensor]], optimizer: OptimizerState) -> None:
        """Overwrite the masters, the weights derived from them and the optimizer's state. Call on every rank.

        Args:
            read: Function that returns one flat tensor per fragment: ``read("value")`` the masters, ``read(kind)`` a
                kind of optimizer state. Called once for each, so that at most one of them is in memory twice.
            optimizer: Everything but the tensors.

        Raises:
            ValueError: If the optimizer has a different number of parameter groups.
        """


class ZeroShards(PortableShards):
    """Common base of the ZeRO stages: the fp32 masters of a rank are slices of a few flat partitions.

    The optimizer updates the partitions, so its state belongs to partitions as well.
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
        """The flat partitions of this rank's masters, each with the parameters that it covers on all ranks together."""

    def _base(self, optimizer: Optimizer) -> Any:
        return self._optimizer.optimizer

    def _live(self) -> list[tuple[Tensor | None, Tensor]]:
        flats = [flat for flat, _ in self._partitions()]
        return [
            (flats[number], flats[number][start : start + fragment.numel])
            for (number, start), fragment in zip(self._places, self.fragments, strict=True)
        ]

    def _stepped(self) -> Iterable[tuple[str, Tensor]]:
        return [(name, flat) for flat, names in self._partitions() for name in names]

    @abstractmethod
    def _masters_changed(self) -> None:
        """Update the weights that the module computes with from their masters. Call on every rank."""

    @torch.no_grad()
    def set_values(self, values: Iterable[Tensor]) -> None:
        self._copy(values, [flat for flat, _ in self._partitions()])
        self._masters_changed()

    def optimizer_state(self) -> OptimizerState:
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
                # One kind at a time, so that only one of them is in memory twice.
                into = [state["state"].get(number, {}).get(kind) for number in range(len(partitions))]
                self._copy(read(kind), into)
            base.load_state_dict(state)
        self._masters_changed()

    @contextmanager
    def _lent_to_groups(self) -> Iterator[None]:
        """Within this context, the optimizer's parameter groups hold the partitions."""
        yield

    def _copy(self, pieces: Iterable[Tensor], partitions: Sequence[Tensor | None]) -> None:
        for (number, start), piece in zip(self._places, pieces, strict=True):
            partition = partitions[number]
            if partition is not None:
                partition[start : start + piece.numel()].copy_(piece)

    @property
    def gradient_scale(self) -> float:
        return float(getattr(self._optimizer, "loss_scale", 1.0))


class _Held(NamedTuple):
    """A parameter of which this rank holds a fragment, and its place: number of the partition, first element."""

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
        if hasattr(self._optimizer, "bf16_groups"):  # stage 1 in bf16, with gradients accumulated in fp32
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

        # safe_get_local_grad may return copies, so keep them until write_back.
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
    """The frozen weights under ZeRO-3, which shards them too; they have no masters and no gradients."""

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

    def set_values(self, values: Iterable[Tensor]) -> None:
        self._optimizer.checkpoint_event_prologue()
        for own, value in zip(self.values(), values, strict=True):
            own.copy_(value)
        self._optimizer.checkpoint_event_epilogue()


def _partition_of(name: str, parameter: Any) -> Fragment | None:
    """This rank's part of a ZeRO-3 parameter; the last parts are padded, and may consist of padding alone."""
    offset = dist.get_rank() * parameter.ds_tensor.ds_numel
    numel = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - offset)
    return Fragment(name, parameter.ds_shape, offset, numel) if numel > 0 else None


class FSDP2Shards(PortableShards):
    """FSDP2: each rank holds some rows of every weight (a DTensor), of its gradient and of the optimizer's state.

    Args:
        module: The module, sharded by its strategy.
        optimizers: The optimizers of the fit; none outside of one.
        frozen: Whether to take the frozen weights instead of the trainable ones. Default: False.
        also: Names of frozen weights to take all the same; what is added to their gradient is discarded.
    """

    sharded = True

    def __init__(
        self,
        module: nn.Module,
        optimizers: Collection[Optimizer] = (),
        *,
        frozen: bool = False,
        also: Collection[str] = (),
    ) -> None:
        self._module, self._optimizers = module, list(optimizers)
        reshard(module)  # a pass without gradients may have left some weights gathered
        weights: dict[str, Any] = {
            name: p for name, p in module.named_parameters() if p.requires_grad is not frozen or name in also
        }
        if whole := [name for name, p in weights.items() if not is_sharded(p)]:
            raise ValueError(f"{whole[0]!r} is not sharded: FSDP2 does not manage it, so the ranks would hold it apart")
        self._parameters = weights
        fragments = [_rows_of(name, p) for name, p in weights.items()]
        self._held = [weights[f.name] for f in fragments if f.numel]
        super().__init__({name: p.shape for name, p in weights.items()}, [f for f in fragments if f.numel])

    def values(self) -> list[Tensor]:
        return [p.detach().to_local().view(-1) for p in self._held]

    def gradients(self) -> list[Tensor]:
        gradients = []
        for p in self._held:
            if not p.requires_grad:  # an optimizer would decay a weight that has a gradient
                gradients.append(torch.zeros_like(p.to_local()).view(-1))
                continue
            if p.grad is None:  # a weight that took no part in the loss must still receive a penalty
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad.to_local().view(-1))
        return gradients

    def gradients_of(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """The gradient of another loss, averaged over the ranks: one new flat fp32 tensor per fragment."""
        kept = {name: p.grad for name, p in self._parameters.items()}
        for p in self._parameters.values():
            p.grad = None
        try:
            loss().backward()
            return [gradient.to(torch.float32, copy=True) for gradient in self.gradients()]
        finally:
            for name, p in self._parameters.items():
                p.grad = kept[name]

    def _live(self) -> list[tuple[Tensor | None, Tensor]]:
        return [(p if p.requires_grad else None, own) for p, own in zip(self._held, self.values(), strict=True)]

    def _stepped(self) -> Iterable[tuple[str, Tensor]]:
        return [(name, p) for name, p in self._parameters.items() if p.requires_grad]

    @torch.no_grad()
    def set_values(self, values: Iterable[Tensor]) -> None:
        reshard(self._module)  # gathered weights would be those of before
        for own, value in zip(self.values(), values, strict=True):
            own.copy_(value)

    # --- what a checkpoint holds

    def optimizer_state(self) -> OptimizerState:
        optimizer = self._optimizer()
        found = OptimizerState({}, {}, [], {})
        for name, p in self._parameters.items():
            state = optimizer.state.get(p, {})
            kinds = [kind for kind, value in state.items() if isinstance(value, Tensor) and is_sharded(value)]
            found.kinds[name] = kinds
            found.scalars[name] = {kind: value for kind, value in state.items() if kind not in kinds}
            for kind, value in found.scalars[name].items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    raise ValueError(
                        f"{type(optimizer).__name__} holds {kind!r} of shape {list(value.shape)} for {name}: what is "
                        "not one value per weight cannot be moved to other ranks"
                    )
        found.groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        for kind in sorted({kind for kinds in found.kinds.values() for kind in kinds}):
            found.tensors[kind] = [
                optimizer.state[p][kind].to_local().view(-1)
                if kind in optimizer.state.get(p, {})
                else torch.zeros_like(value)
                for p, value in zip(self._held, self.values(), strict=True)
            ]
        return found

    @torch.no_grad()
    def load(self, read: Callable[[str], list[Tensor]], optimizer: OptimizerState) -> None:
        self.set_values(read("value"))
        if not self._optimizers:
            return
        own = self._optimizer()
        state = own.state_dict()
        if len(state["param_groups"]) != len(optimizer.groups):
            raise ValueError(
                f"the optimizer has {len(state['param_groups'])} parameter groups, the one that was saved had "
                f"{len(optimizer.groups)}: configure it as it was"
            )
        for group, saved in zip(state["param_groups"], optimizer.groups, strict=True):
            group.update({key: saved[key] for key in group.keys() & saved.keys() if key != "params"})
        names = {p: name for name, p in self._parameters.items()}
        of_name: dict[str, dict[str, Any]] = {}
        state["state"] = {}
        for number, p in enumerate(p for group in own.param_groups for p in group["params"]):
            name = names.get(p, "")
            if optimizer.scalars.get(name) or optimizer.kinds.get(name):
                # Copies: ZeRO has one number for many parameters, which each of them would count up.
                made = copy.deepcopy(optimizer.scalars[name])
                made |= {kind: torch.zeros_like(p) for kind in optimizer.kinds[name]}
                of_name[name] = state["state"][number] = made
        for kind in sorted({kind for kinds in optimizer.kinds.values() for kind in kinds}):
            for fragment, value in zip(self.fragments, read(kind), strict=True):
                into = of_name.get(fragment.name, {}).get(kind)
                if into is not None:
                    into.to_local().view(-1).copy_(value)
        own.load_state_dict(state)

    def _optimizer(self) -> Optimizer:
        if len(self._optimizers) != 1:
            raise ValueError(f"checkpoints under FSDP2 hold one optimizer, got {len(self._optimizers)}")
        return self._optimizers[0]


def _rows_of(name: str, parameter: Any) -> Fragment:
    """This rank's rows of a weight, which are dealt to the ranks in order, equally many to each but the last."""
    rows = math.ceil(parameter.shape[0] / parameter.device_mesh.size())
    start = min(rows * parameter.device_mesh.get_local_rank(), parameter.shape[0])
    width = math.prod(parameter.shape[1:])
    return Fragment(name, parameter.shape, start * width, parameter.to_local().numel())


def where_ranks_meet(tensor: Tensor) -> Tensor:
    """The tensor, or a copy on the device of the process group: NCCL reduces on GPUs only."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def _scaler_until_step(trainer: pl.Trainer) -> Any:
    """Lightning's loss scaler if a fused optimizer unscales the gradients inside its step, else None."""
    in_step = any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers)
    return getattr(trainer.precision_plugin, "scaler", None) if in_step else None


def _zero(tensors: Sequence[Tensor]) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
