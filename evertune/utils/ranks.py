"""The rank of this process, and synchronisation with the others."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of ranks; ``(0, 1)`` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave() -> None:
    """Leave the process group, if this process is in one. Call it when all work is done.

    If Python exits before a thread of the group has released the last tensor it sent, the process aborts. Destroying
    the group ends its threads, unless weights of ZeRO-3 still refer to the group: a short pause lets such threads
    finish.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)


def barrier() -> None:
    """Wait until every rank has reached this call. No effect without a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def is_writer() -> bool:
    """Whether this process writes replicated state: rank 0 of the process group, or any process without a group.

    Before the process group exists, this is True in every process: see :func:`is_leader`.
    """
    return rank_and_world_size()[0] == 0


def is_leader() -> bool:
    """Whether this process is rank 0 of its launch, read from the environment, before there is a process group.

    Supports torchrun, SLURM, and processes that Lightning starts itself. If torchrun sets a rank, only that counts:
    rank 0 may be on any node.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def started_together() -> bool:
    """Whether a launcher (torchrun) started all ranks at once, so that they can find each other."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def tell_all(message: bytes | None) -> bytes:
    """Send bytes from rank 0 to all ranks before training, over a temporary process group.

    Args:
        message: Bytes on rank 0; None on the other ranks, which wait for them.

    Returns:
        The message, on every rank.
    """
    dist.init_process_group("gloo")
    try:
        # The other ranks must allocate the buffer before they receive the content.
        length = torch.tensor([len(message or b"")])
        dist.broadcast(length, src=0)
        content = torch.zeros(int(length), dtype=torch.uint8)
        if message:
            content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        if len(content):
            dist.broadcast(content, src=0)
        return content.numpy().tobytes()
    finally:
        dist.destroy_process_group()
