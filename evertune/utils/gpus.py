"""The GPUs of this machine, without loading torch if there are none."""

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


def computes_in_bf16() -> bool:
    """Whether there is a GPU, and it computes in bf16 itself."""
    if gpu_count() == 0:
        return False
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
