"""Which of the processes this is."""

from __future__ import annotations

import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and how many there are; (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_writer() -> bool:
    """Whether this process is the one that writes what all of them hold alike (rank 0)."""
    return rank_and_world_size()[0] == 0
