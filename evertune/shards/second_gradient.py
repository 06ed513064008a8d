"""The gradient of another loss, beside that of the training step, under any strategy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.shards.fsdp2 import FSDP2Shards
from evertune.shards.shards import ParameterShards
from evertune.utils.ranks import rank_and_world_size


def second_gradient(trainer: pl.Trainer, shards: ParameterShards, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The gradient of a loss, averaged over the ranks. Call on every rank, where the gradients are complete.

    The gradients of the training step are left alone, and so are the hooks of DDP and DeepSpeed, which would mix up
    two backward passes in a step. On sharded weights, each parameter's gradient is averaged and cut as soon as it
    arrives, so that the whole gradient never exists.

    Args:
        trainer: Trainer in training.
        shards: The weights.
        loss: Function that runs a forward pass of the module, not of the strategy's wrapper, and returns a scalar. All
            ranks must build the same graph.

    Returns:
        One new flat fp32 tensor per fragment; zero for weights that the loss does not depend on.
    """
    if isinstance(shards, FSDP2Shards):  # gathers and reduces in hooks of its own
        with torch.enable_grad():
            return shards.gradients_of(loss)
    module = trainer.lightning_module
    parameters = {name: p for name, p in module.named_parameters() if name in shards.shapes and p.requires_grad}
    found = shards.zeros(torch.float32)
    held = {fragment.name: (fragment, total) for fragment, total in zip(shards.fragments, found, strict=True)}
    _, world_size = rank_and_world_size()

    def receive(name: str, gradient: Tensor) -> Tensor:
        whole = gradient.detach()
        if shards.sharded:
            whole = shards.sum_over_ranks(whole.to(torch.float32, copy=True))
        if name in held:
            fragment, total = held[name]
            total.copy_(fragment.slice(whole))
        return gradient.new_zeros(()).expand_as(gradient)  # autograd keeps what is returned, so return no memory

    hooks = [p.register_hook(lambda gradient, name=name: receive(name, gradient)) for name, p in parameters.items()]
    try:
        with torch.enable_grad():
            torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
        shards.release()
    for total in found:
        if not shards.sharded:
            shards.sum_over_ranks(total)
        total.div_(world_size)
    return found


_CHUNK = 1 << 20
"""Elements of each gradient that are multiplied at a time."""


def inner_products(shards: ParameterShards, gradients: list[list[Tensor]]) -> Tensor:
    """The inner products of all pairs of gradients over all ranks, float64 ``[gradients, gradients]``, on the CPU.

    Call on every rank; it takes one all-reduce.

    Args:
        shards: The weights.
        gradients: For each gradient, one flat tensor per fragment.
    """
    n, device = len(gradients), gradients[0][0].device if gradients[0] else None
    total = torch.zeros(n, n, dtype=torch.float64, device=device)
    for parts in zip(*gradients, strict=True):
        for start in range(0, parts[0].numel(), _CHUNK):
            rows = torch.stack([part[start : start + _CHUNK].double() for part in parts])
            total.addmm_(rows, rows.T)
    return (shards.sum_over_ranks(total) if shards.sharded else total).cpu()
