"""Which of the processes this is."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and how many there are; (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave() -> None:
    """Leave the process group, if this process is in one. Call it when all work is done.

    Python may end before a thread of the group has let go of the last tensor it sent, and the process then aborts. Left
    groups end their threads, but not where weights of ZeRO-3 refer to the group: such threads get a moment.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)


def barrier() -> None:
    """Wait until every rank has come here. Without a process group there is nothing to wait for."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def is_writer() -> bool:
    """Whether this process writes what all ranks hold alike: rank 0 of the process group, or alone.

    Before there is a process group, every process is alone: see :func:`is_leader`.
    """
    return rank_and_world_size()[0] == 0


def is_leader() -> bool:
    """Whether this process is rank 0 of its launch, read from the environment: before there is a process group.

    Understands torchrun, SLURM, and the processes that Lightning starts itself. Where torchrun gives a rank, that alone
    counts: rank 0 may be on any node.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def started_together() -> bool:
    """Whether a launcher (torchrun) has started all ranks at once, so that they can find each other."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def tell_all(message: bytes | None) -> bytes:
    """Rank 0 sends the others something before training, by a process group that is gone afterwards.

    Args:
        message: on rank 0; None on the others, which wait for it.

    Returns:
        The message, on every rank.
    """
    dist.init_process_group("gloo")
    try:
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
