"""Evaluating a module without side effects on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from evertune._lightning import isolate_rng
from evertune.utils.sharding import root_gathered


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule's mode and all random states are restored afterwards.

    The random states are those of Python, NumPy, torch and the GPUs. Under FSDP2, the weights outside of all blocks are
    gathered meanwhile, so that any part of the module can be called: call it on every rank.

    Example:
        >>> module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluation_mode(module):
        ...     [part.training for part in module]
        [False, False]
        >>> [part.training for part in module]
        [True, False]
    """
    modes = [(part, part.training) for part in nn.Module.modules(module)]
    if any(training for _, training in modes):  # to set a mode takes time, and a module that only predicts has it
        module.eval()
    try:
        with isolate_rng(), torch.no_grad(), root_gathered(module):
            yield
    finally:
        for part, training in modes:
            if part.training != training:
                part.training = training


@contextmanager
def trial(what: str, advice: str) -> Iterator[None]:
    """Turn any failure inside the context into an error that says what was tried and what to do.

    Args:
        what: What cannot be done, as in ``"EWC cannot ..."``.
        advice: What to pass instead; left out if the error already says so.

    Raises:
        ValueError: If anything fails, except for lack of GPU memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        known = advice.partition(",")[0] in reason
        raise ValueError(f"{what}: {reason}" if known else f"{what}: {reason}; {advice}") from error
