"""The fp32 master weights of 16-bit training between two fits: their owner and their lifetime.

A new engine derives its masters from the 16-bit weights, which would round every weight once per update. The strategy
therefore stores them here when a fit ends, by module. They are dropped with the module, or when its next fit under
DeepSpeed leaves newer ones. They only add precision to the module's weights and never replace them: a weight that has
changed since (loaded, trained elsewhere, a grown head) keeps its new value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from evertune.shards.fragments import FragmentState
from evertune.shards.shards import ParameterShards


class Masters(Protocol):
    """Master weights that wait for the next fit."""

    def restore(self, shards: ParameterShards, dtype: torch.dtype) -> None:
        """Write them to a new engine's masters, for all weights that are unchanged. Call on every rank.

        Args:
            shards: Shards of the new engine.
            dtype: Type in which the module holds its weights.
        """


class LiveMasters:
    """A copy of the masters of an engine that is about to be released.

    Args:
        shards: Shards of that engine.
    """

    def __init__(self, shards: ParameterShards) -> None:
        self._state = FragmentState.of(shards, {"master": [value.clone() for value in shards.values()]})

    @property
    def tensors(self) -> list[Tensor]:
        """One flat fp32 tensor per fragment."""
        return self._state.tensors["master"]

    def restore(self, shards: ParameterShards, dtype: torch.dtype) -> None:
        """See :class:`Masters`."""
        _write(self._state.rearranged(shards), shards, dtype)

    def save(self, directory: Path) -> None:
        """Write them to a folder, for :class:`SavedMasters` in another process. Call on every rank."""
        self._state.save(directory)


class SavedMasters:
    """The masters in a folder, for the first fit of a process, on any number of ranks.

    Args:
        directory: Folder that :meth:`LiveMasters.save` wrote.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def restore(self, shards: ParameterShards, dtype: torch.dtype) -> None:
        """See :class:`Masters`."""
        _write(FragmentState.load(self._directory, shards), shards, dtype)


_waiting: WeakKeyDictionary[nn.Module, Masters] = WeakKeyDictionary()


def masters_of(module: nn.Module) -> Masters | None:
    """The masters that wait for the next fit of a module, or None."""
    return _waiting.get(module)


def leave_masters(module: nn.Module, masters: Masters) -> None:
    """Store masters for the next fit of a module, replacing older ones."""
    _waiting[module] = masters


def _write(state: FragmentState, shards: ParameterShards, dtype: torch.dtype) -> None:
    for value, master in zip(shards.values(), state.tensors["master"], strict=True):
        # A master is valid only if it rounds to the weight that the module holds now.
        value.copy_(torch.where(master.to(dtype) == value.to(dtype), master, value))
