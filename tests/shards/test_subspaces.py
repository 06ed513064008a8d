"""Changes of matrices without their protected directions, on matrices that no rank holds whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from evertune.shards.subspaces import Subspaces, top_directions
from tests.helpers.distributed import run_ranks
from tests.helpers.osft_worker import RANKS, SHAPES, STARTS, Cut, matrices


def expected(name: str, sides: str) -> Tensor:
    """By the definition, in float64."""
    weight, change = matrices(0)[name].double(), matrices(1)[name].double()
    left, values, right = torch.linalg.svd(weight)
    rank = min(RANKS[name], int((values > 1e-4).sum()))
    u, v = left[:, :rank] @ left[:, :rank].T, right[:rank].T @ right[:rank]
    if sides == "both":
        return change - u @ change @ v
    return (torch.eye(len(u)) - u) @ change @ (torch.eye(len(v)) - v)


CASES = list(itertools.product(("either", "both"), (None, 30)))


@pytest.fixture(scope="module")
def on_three_ranks() -> list[list[dict[str, Any]]]:
    return run_ranks("tests.helpers.osft_worker:in_group", 3, cases=CASES)


@pytest.mark.parametrize(("sides", "bucket"), CASES)
def test_wherever_the_matrices_are_cut(sides: str, bucket: int | None, on_three_ranks: Any) -> None:
    """Rows of several ranks, a rank that holds nothing of a matrix, each matrix in a collective or all in one."""
    ranks = [told[CASES.index((sides, bucket))] for told in on_three_ranks]
    for told in ranks:
        for name in SHAPES:
            found = torch.tensor(told["changes"][name]).double()
            torch.testing.assert_close(found, expected(name, sides), atol=1e-6, rtol=0)
    everything = sum((m + n) * RANKS[name] for name, (m, n) in SHAPES.items())
    shared_rows = {"tall": 2, "wide": 1, "zero": 2, "row": 1, "low": 0}
    assert sum(told["kept"] for told in ranks) == everything + sum(n * RANKS[name] for name, n in shared_rows.items())


@pytest.mark.parametrize("sides", ["either", "both"])
def test_on_one_process(sides: Any) -> None:
    weights, changes = Cut(matrices(0), STARTS), Cut(matrices(1), STARTS)
    Subspaces(weights, weights.values(), RANKS, sides).remove(list(SHAPES), dict(enumerate(changes.values())))
    for name, change in zip(SHAPES, changes.values(), strict=True):
        torch.testing.assert_close(change.view(SHAPES[name]).double(), expected(name, sides), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_directions_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    for found, basis in zip(top_directions(matrix, 3), (left[:, :3], right[:3].T), strict=True):
        torch.testing.assert_close(found.double() @ found.double().T, basis @ basis.T, atol=1e-6, rtol=0)


def test_small_directions_are_found_in_float64() -> None:
    """Their squares are below what fp32 resolves beside that of the largest."""
    left, right = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for _ in range(2))
    values = torch.logspace(0, -5, 8, dtype=torch.float64)
    found = top_directions((left * values @ right).float(), 6)
    for basis, one in zip(found, (left[:, :6], right[:6].T), strict=True):
        torch.testing.assert_close(basis.T.double() @ basis.double(), torch.eye(6).double(), atol=1e-6, rtol=0)
        assert (one - basis.double() @ (basis.T.double() @ one)).norm() < 1e-2


def test_the_precision_of_the_training_is_neither_used_nor_changed() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        test_on_one_process("either")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_matrix_with_nan() -> None:
    weights = Cut(matrices(1), STARTS)
    weights.values()[1][3] = torch.nan
    with pytest.raises(ValueError, match="wide has no singular directions: it holds NaN or infinity"):
        Subspaces(weights, weights.values(), RANKS, "either")
