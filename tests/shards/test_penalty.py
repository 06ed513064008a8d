"""The pull towards an anchor, on fragments that begin and end anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evertune.shards.penalty import QuadraticPenalty
from evertune.shards.shards import Fragment, ParameterShards


class Held(ParameterShards):
    """Fragments of a table with 50 rows of 4, and of a vector, as some rank might hold them."""

    sharded = False

    def __init__(self, offset: int, numel: int, dtype: torch.dtype) -> None:
        table, vector = torch.Size([50, 4]), torch.Size([7])
        super().__init__(
            {"table": table, "vector": vector},
            [Fragment("table", table, offset, numel), Fragment("vector", vector, 2, 5)],
        )
        generator = torch.Generator().manual_seed(0)
        self._values = [torch.randn(f.numel, generator=generator) for f in self.fragments]
        self._gradients = [torch.randn(f.numel, generator=generator).to(dtype) for f in self.fragments]

    def values(self) -> list[Tensor]:
        return self._values

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def set_values(self, values: list[Tensor]) -> None:
        self._values = values

    @property
    def gradient_scale(self) -> float:
        return 8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("important_rows", [[], [3, 20, 21], list(range(40))])
@pytest.mark.parametrize(("offset", "numel"), [(0, 200), (6, 150), (8, 192), (3, 2), (9, 3)])
def test_equals_the_formula(offset: int, numel: int, important_rows: list[int], dtype: torch.dtype) -> None:
    shards = Held(offset, numel, dtype)
    generator = torch.Generator().manual_seed(1)
    whole = torch.zeros(50, 4)
    whole[important_rows] = torch.rand(len(important_rows), 4, generator=generator)
    importance = [shards.fragments[0].slice(whole), torch.rand(5, generator=generator)]
    anchor = [torch.randn(value.numel(), generator=generator) for value in shards.values()]
    expected = [
        g.float() + 8.0 * 0.5 * f * (v - a)
        for g, f, v, a in zip(shards.gradients(), importance, shards.values(), anchor, strict=True)
    ]
    penalty = QuadraticPenalty(shards, importance, anchor)
    penalty.add_gradient(0.5)
    for found, wanted in zip(shards.gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    terms = [(f * (v - a) ** 2).double().sum() for f, v, a in zip(importance, shards.values(), anchor, strict=True)]
    torch.testing.assert_close(penalty.value(0.5), 0.25 * torch.stack(terms).sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.5, 1e38])
@pytest.mark.parametrize("important_rows", [[], [3, 20, 21], list(range(40))])
@pytest.mark.parametrize(("offset", "numel"), [(0, 200), (6, 150), (9, 3)])
def test_pulls_by_the_formula(
    offset: int, numel: int, important_rows: list[int], scale: float, dtype: torch.dtype
) -> None:
    shards = Held(offset, numel, torch.float32)
    generator = torch.Generator().manual_seed(1)
    whole = torch.zeros(50, 4)
    whole[important_rows] = 20 * torch.rand(len(important_rows), 4, generator=generator)
    importance = [shards.fragments[0].slice(whole), torch.rand(5, generator=generator)]
    anchor = [torch.randn(value.numel(), generator=generator) for value in shards.values()]
    penalty = QuadraticPenalty(shards, importance, anchor)
    for number, (f, a) in enumerate(zip(importance, anchor, strict=True)):
        value = shards.values()[number].to(dtype)
        c = scale * f.double()
        expected = ((value.double() + c * a) / (1 + c)).to(dtype)
        penalty.pull(number, value, scale)
        torch.testing.assert_close(value, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
        assert torch.equal(value[f == 0], shards.values()[number].to(dtype)[f == 0])


def test_a_table_with_few_important_rows_is_worked_on_by_those() -> None:
    shards = Held(6, 150, torch.float32)
    importance = [torch.zeros(150), torch.zeros(5)]
    importance[0][2 + 4 * 10] = 1.0
    rows = QuadraticPenalty(shards, importance, [torch.zeros(150), torch.zeros(5)])._rows
    assert rows[0] is not None
    assert [part.tolist() for part in rows[0]._parts] == [[10]]
    assert rows[1] is None
