"""The number of GPUs of this machine, without loading torch if there are none."""

from __future__ import annotations

from pathlib import Path

_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
"""Device files under ``/dev``: of NVIDIA, of AMD, and of Windows in its Linux subsystem."""


def gpu_count() -> int:
    """The number of GPUs that torch may use. Torch, which takes seconds to load, is imported only if needed."""
    if not any(True for pattern in _DEVICES for _ in Path("/dev").glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()
