"""The trainable parameters as this rank holds them: one view for every strategy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor


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

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds every element of the parameter."""
        return self.numel == math.prod(self.shape)

    def slice(self, full: Tensor) -> Tensor:
        """The elements of ``full`` (shaped or flat, as large as the parameter) that belong to this fragment, flat."""
        return full.reshape(-1)[self.offset : self.offset + self.numel]


class ParameterShards(ABC):
    """The trainable parameters of a module as this rank holds them, under any strategy.

    ``values()`` and ``gradients()`` give flat tensors in the order of ``fragments``; they are views of the live
    storage, so an in-place edit of a gradient reaches the optimizer. Nothing here gathers a weight.
    """

    fragments: list[Fragment]
    sharded: bool
    """Whether each rank holds only a part (ZeRO); when False every rank holds everything (one device, DDP)."""

    @abstractmethod
    def values(self) -> list[Tensor]:
        """The fp32 value of every fragment, flat."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradient of every fragment, flat, averaged over ranks and still scaled by ``gradient_scale``."""

    @property
    def gradient_scale(self) -> float:
        """What the gradients are multiplied by at the moment (the loss scale of fp16 training; else 1)."""
        return 1.0

    def zeros(self) -> list[Tensor]:
        """One zero tensor per fragment."""
        return [torch.zeros_like(value) for value in self.values()]
