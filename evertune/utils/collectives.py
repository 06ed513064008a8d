"""Collective operations over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from evertune._lightning import pl


def gather_bytes(content: bytes, trainer: pl.Trainer) -> list[bytes]:
    """The bytes of every rank, in the order of ranks. Call on every rank."""
    if trainer.world_size == 1 or trainer.interrupted:  # if interrupted, the other ranks may be gone
        return [content]
    device = trainer.strategy.root_device
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(trainer.world_size)]
    dist.all_gather(sizes, torch.tensor([len(content)], device=device))
    longest = int(max(sizes))
    # Padded to the longest, since all_gather needs equal shapes; one more byte, since frombuffer rejects empty buffers.
    mine = torch.frombuffer(bytearray(content.ljust(longest + 1, b"\0")), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine)
    return [part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
