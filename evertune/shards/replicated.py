"""The weights of one device and of DDP: every rank holds all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from evertune.shards.shards import Fragment, ParameterShards


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
