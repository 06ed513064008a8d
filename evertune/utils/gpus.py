"""How many GPUs this machine has, without loading torch where there are none."""

from __future__ import annotations

from pathlib import Path

_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
"""Under ``/dev``: those of NVIDIA and AMD, and those of Windows in its Linux subsystem."""


def gpu_count() -> int:
    """The number of GPUs that torch may use. Torch, which takes seconds to load, is asked only if there is a device."""
    if not any(True for pattern in _DEVICES for _ in Path("/dev").glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()
