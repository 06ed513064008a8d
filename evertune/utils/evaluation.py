"""Look at what a module does without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from evertune._lightning import isolate_rng


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each submodule's mode and all random states are what they were.

    The random states are those of Python, NumPy, torch and the GPUs.

    Example:
        >>> module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluation_mode(module):
        ...     [part.training for part in module]
        [False, False]
        >>> [part.training for part in module]
        [True, False]
    """
    modes = [(part, part.training) for part in nn.Module.modules(module)]
    module.eval()
    try:
        with isolate_rng(), torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def trial(what: str, advice: str) -> Iterator[None]:
    """Turn whatever fails inside into a message that says what was tried and what to do.

    Args:
        what: what cannot be done, as in ``"EWC cannot ..."``.
        advice: what to pass instead; left out where the error already says so.

    Raises:
        ValueError: when anything fails but the memory of a GPU.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        known = advice.partition(",")[0] in reason
        raise ValueError(f"{what}: {reason}" if known else f"{what}: {reason}; {advice}") from error
