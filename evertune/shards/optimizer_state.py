"""Sharded weights with the optimizer's state by parameter, which any number of processes can read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from evertune.shards.shards import ParameterShards


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
