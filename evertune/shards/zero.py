"""The weights under DeepSpeed's ZeRO: a rank holds slices of a few flat partitions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from evertune.shards.optimizer_state import OptimizerState, PortableShards
from evertune.shards.shards import Fragment, ParameterShards


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
