"""The weights under FSDP2: a rank holds some rows of each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evertune.shards.optimizer_state import OptimizerState, PortableShards
from evertune.shards.shards import Fragment
from evertune.utils.sharding import is_sharded, reshard


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
