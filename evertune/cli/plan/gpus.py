"""The GPUs that a plan is for: their memory and number."""

from __future__ import annotations

from typing import Any

GIB = 2**30

GPUS: dict[str, float] = {
    "a10": 22,
    "a100": 79,
    "a100-40": 39,
    "b200": 178,
    "h100": 79,
    "h200": 139,
    "l4": 22,
    "l40s": 44,
    "mi300x": 191,
    "rtx3090": 24,
    "rtx4090": 24,
    "t4": 14.5,
    "v100": 31.5,
    "v100-16": 15.5,
}
"""GPUs by name, with the memory in GiB that a process can use."""


def memory_of(value: str | None) -> float:
    """The memory of a GPU in bytes: given in GiB, by the GPU's name, or else that of the GPU of this machine."""
    if value is None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"there is no GPU here to ask: give --gpu_memory, GiB or one of {', '.join(GPUS)}")
        return float(torch.cuda.get_device_properties(0).total_memory)
    if value.lower() in GPUS:
        return GPUS[value.lower()] * GIB
    try:
        size = float(value)
    except ValueError:
        raise ValueError(f"gpu_memory must be GiB or one of {', '.join(GPUS)}, got {value!r}") from None
    return float(positive("gpu_memory", size) * GIB)


def n_devices(value: Any) -> int:
    """The number of GPUs of a node, from ``devices``: a number, a list of indices, or a string of either."""
    if isinstance(value, list):
        return len(value)
    if isinstance(value, str) and "," in value:
        return len([part for part in value.split(",") if part.strip()])
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number == -1:
        raise ValueError(f"devices={value!r} does not say how many GPUs a node has; give --gpus")
    return int(positive("gpus", number))


def positive(name: str, value: Any) -> Any:
    """A value itself, if it is positive; a ``ValueError`` with its name otherwise."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def in_gib(size: float) -> str:
    """Bytes in GiB, as text."""
    return f"{size / GIB:,.1f} GiB"
