"""Metrics of learning and forgetting, as pure functions of the accuracy matrix.

``a[t, k]`` is the score on experience ``k`` after update ``t`` (evertune's own scores are in [0, 1]); NaN or None if
not evaluated. Rows may be of unequal length (the rest was not evaluated). There may be fewer updates than experiences
(``joint`` training has one) or more. Every function returns a Python float:

- 0.0 if there is nothing to compare yet (after one update nothing can have been forgotten);
- NaN if there is something to compare, but it was not evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MatrixLike = Tensor | np.ndarray[Any, Any] | Sequence[Sequence[float | None]]
"""An accuracy matrix [updates, experiences]: a tensor, an array or a list of rows."""

VectorLike = Tensor | np.ndarray[Any, Any] | Sequence[float | None]
"""One number for each experience."""


def as_matrix(a: MatrixLike) -> Tensor:
    """The accuracy matrix as a float64 tensor [updates, experiences] on the CPU, NaN where not evaluated.

    Raises:
        ValueError: If ``a`` has no rows or columns, is not two-dimensional, or contains something that is not a number.

    Example:
        >>> as_matrix([[0.5], [0.25, 1.0]])
        tensor([[0.5000,    nan],
                [0.2500, 1.0000]], dtype=torch.float64)
    """
    if isinstance(a, Tensor | np.ndarray):
        matrix = torch.as_tensor(a).detach().to("cpu", torch.float64)
    else:
        rows = [_floats(row, f"row {t} of the accuracy matrix") for t, row in enumerate(a)]
        width = max(map(len, rows), default=0)
        padded = [row + [math.nan] * (width - len(row)) for row in rows]
        matrix = torch.tensor(padded, dtype=torch.float64).reshape(len(rows), width)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"an accuracy matrix has shape [updates, experiences], both at least 1; got {list(matrix.shape)}"
        )
    if matrix.isinf().any():
        t, k = matrix.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"a score must be finite, or NaN where not evaluated; got {matrix[t, k].item()} at a[{t}, {k}]"
        )
    return matrix


def average_accuracy(a: MatrixLike, seen: int | None = None) -> float:
    """Mean score after the last update, over the experiences seen (Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018).

    Args:
        a: The accuracy matrix [updates, experiences].
        seen: Number of experiences (the first columns) that count. By default all that the last row evaluates. Pass it
            if experiences that are not learned yet are evaluated too.

    Raises:
        ValueError: If ``a`` is not a valid accuracy matrix, or ``seen`` is not between 1 and the number of experiences.

    Example:
        >>> average_accuracy([[1.0], [0.5, 0.75]])
        0.625
    """
    matrix = as_matrix(a)
    width = matrix.shape[1]
    if seen is not None and not 1 <= seen <= width:
        raise ValueError(f"seen must be between 1 and the {width} experiences of the matrix, got {seen}")
    return matrix[-1, :seen].nanmean().item()


def forgetting(a: MatrixLike) -> float:
    """The loss against the best earlier score (Chaudhry et al. 2018, "Riemannian Walk").

    The mean over all but the last experience of ``max_{t < T-1} a[t, k] - a[T-1, k]``. Lower is better; negative if old
    experiences improved.

    Raises:
        ValueError: If ``a`` is not a valid accuracy matrix.

    Example:
        >>> forgetting([[0.5], [1.0, 1.0], [0.75, 0.5, 1.0]])   # (1.0 - 0.75 + 1.0 - 0.5) / 2
        0.375
    """
    matrix = as_matrix(a)
    earlier = matrix[:-1]
    # torch has no nan-ignoring maximum: -inf stands for NaN, and becomes NaN again where no earlier score exists.
    best = earlier.nan_to_num(nan=-torch.inf).amax(0) if len(earlier) else matrix[-1]
    best = torch.where(best.isinf(), torch.nan, best)
    return _mean_over_old(best - matrix[-1], matrix)


def forgetting_first_minus_last(a: MatrixLike) -> float:
    """The loss against the score when first learned.

    The mean over all but the last experience of ``a[k, k] - a[T-1, k]``. Several libraries call this forgetting. It is
    the negative backward transfer, and on a fully evaluated matrix never larger than ``forgetting``.

    Raises:
        ValueError: If ``a`` is not a valid accuracy matrix.

    Example:
        >>> forgetting_first_minus_last([[0.5], [1.0, 1.0], [0.75, 0.5, 1.0]])   # (0.5 - 0.75 + 1.0 - 0.5) / 2
        0.125
    """
    # Adding 0.0 turns -0.0 into 0.0.
    return -backward_transfer(a) + 0.0


def backward_transfer(a: MatrixLike) -> float:
    """The effect of later updates on earlier experiences (Lopez-Paz & Ranzato 2017, "Gradient Episodic Memory").

    The mean over all but the last experience of ``a[T-1, k] - a[k, k]``. Higher is better; negative if something was
    forgotten.

    Raises:
        ValueError: If ``a`` is not a valid accuracy matrix.

    Example:
        >>> backward_transfer([[1.0], [0.5, 1.0]])
        -0.5
    """
    matrix = as_matrix(a)
    learned = _pad(matrix.diagonal(), matrix.shape[1])
    return _mean_over_old(matrix[-1] - learned, matrix)


def forward_transfer(a: MatrixLike, baseline: VectorLike) -> float:
    """The effect of earlier updates on experiences before they are learned (Lopez-Paz & Ranzato 2017).

    The mean over all but the first experience of ``a[k-1, k] - baseline[k]``. Higher is better.

    Args:
        a: The accuracy matrix [updates, experiences], with each experience evaluated before it is learned.
        baseline: Score of the untrained model on each experience [experiences].

    Raises:
        ValueError: If ``a`` is not a valid accuracy matrix, ``baseline`` has another length, or no experience was
            evaluated before it was learned.

    Example:
        >>> forward_transfer([[1.0, 0.75], [1.0, 1.0]], baseline=[0.5, 0.5])
        0.25
    """
    matrix = as_matrix(a)
    before = matrix.diagonal(1)
    gain = before - _vector(baseline, matrix.shape[1], "baseline")[1 : len(before) + 1]
    if len(gain) and before.isnan().all():
        raise ValueError(
            "forward transfer needs the score on an experience before it is learned, and a[k-1, k] is NaN for every k; "
            "evaluate with evaluate_unseen=True"
        )
    return gain.nanmean().item() if len(gain) else 0.0


def intransigence(a: MatrixLike, joint: VectorLike) -> float:
    """How much worse each experience is learned than by a model trained jointly on all data (Chaudhry et al. 2018).

    The mean over the learned experiences of ``joint[k] - a[k, k]``. Lower is better; negative if the stream helped.

    Args:
        a: The accuracy matrix [updates, experiences].
        joint: Reference [experiences]: the score on experience ``k`` of a model trained on experiences 0..k at once.

    Raises:
        ValueError: If ``a`` is not a valid accuracy matrix or ``joint`` has another length.

    Example:
        >>> intransigence([[1.0], [0.5, 0.5]], joint=[1.0, 0.75])
        0.125
    """
    matrix = as_matrix(a)
    learned = matrix.diagonal()
    return (_vector(joint, matrix.shape[1], "joint")[: len(learned)] - learned).nanmean().item()


def negative_flip_rate(old_correct: Tensor | Sequence[bool], new_correct: Tensor | Sequence[bool]) -> float:
    """The share of all examples that the old version predicted correctly and the new one does not (Yan et al. 2021).

    Two versions of equal accuracy may differ in many predictions; the flips are what users notice.

    Args:
        old_correct: Whether the old version is correct on each example [examples].
        new_correct: Whether the new version is correct on the same examples, in the same order [examples].

    Raises:
        ValueError: If there are no examples, the lengths differ, or a value is neither true nor false.

    Example:
        >>> negative_flip_rate([True, True, False, False], [True, False, True, False])
        0.25
    """
    flips, total = count_negative_flips(old_correct, new_correct)
    return flips / total


def count_negative_flips(old_correct: Tensor | Sequence[bool], new_correct: Tensor | Sequence[bool]) -> tuple[int, int]:
    """The number of negative flips and the number of examples; see ``negative_flip_rate``.

    Example:
        >>> count_negative_flips([True, True, False, False], [True, False, True, False])
        (1, 4)
    """
    old, new = _booleans(old_correct, "old_correct"), _booleans(new_correct, "new_correct")
    if len(old) != len(new):
        raise ValueError(
            f"old_correct and new_correct must be about the same examples, got {len(old)} and {len(new)} of them"
        )
    return int((old & ~new).sum()), len(old)


def _mean_over_old(values: Tensor, matrix: Tensor) -> float:
    """Mean over the experiences learned before the last update; 0.0 if there are none, NaN if none was evaluated."""
    old = values[: len(matrix) - 1]
    return old.nanmean().item() if len(old) else 0.0


def _floats(values: Sequence[float | None], what: str) -> list[float]:
    try:
        return [math.nan if value is None else float(value + 0) for value in values]  # rejects str
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must hold numbers, or None where not evaluated; got {values!r}") from error


def _pad(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=torch.nan)


def _vector(values: VectorLike, length: int, name: str) -> Tensor:
    vector = (
        torch.as_tensor(values).detach().to("cpu", torch.float64)
        if isinstance(values, Tensor | np.ndarray)
        else torch.tensor(_floats(values, name), dtype=torch.float64)
    )
    if vector.shape != (length,):
        raise ValueError(f"{name} must hold one score for each of the {length} experiences, got {list(vector.shape)}")
    return vector


def _booleans(values: Tensor | Sequence[bool], name: str) -> Tensor:
    tensor = torch.as_tensor(values).detach()
    if tensor.ndim != 1 or len(tensor) == 0:
        raise ValueError(f"{name} must hold one value for each example, at least one; got shape {list(tensor.shape)}")
    if not ((tensor == 0) | (tensor == 1)).all():
        raise ValueError(f"{name} must hold True or False for each example; pass whether each answer is right")
    return tensor.bool()
