"""The trainable parameters as this rank holds them: one interface for every strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


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

        shards = shards_of(trainer)
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


def where_ranks_meet(tensor: Tensor) -> Tensor:
    """The tensor, or a copy on the device of the process group: NCCL reduces on GPUs only."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def _zero(tensors: Sequence[Tensor]) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
