"""The metrics against numbers worked out by hand, and against their own definitions on random matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from evertune import metrics
from evertune.metrics import functional
from tests.helpers.distributed import run_ranks

NAN = math.nan
# Three updates: experience 0 improves, then falls; experience 1 falls by half.
A = [[0.5], [1.0, 1.0], [0.75, 0.5, 0.9]]


def test_values_worked_out_by_hand():
    assert metrics.average_accuracy(A) == pytest.approx((0.75 + 0.5 + 0.9) / 3)
    assert metrics.forgetting(A) == pytest.approx(((1.0 - 0.75) + (1.0 - 0.5)) / 2)
    assert metrics.forgetting_first_minus_last(A) == pytest.approx(((0.5 - 0.75) + (1.0 - 0.5)) / 2)
    assert metrics.backward_transfer(A) == pytest.approx(-0.125)


@pytest.mark.parametrize(
    "same",
    [
        [[0.5, None, None], [1.0, 1.0, None], [0.75, 0.5, 0.9]],
        np.array([[0.5, NAN, NAN], [1.0, 1.0, NAN], [0.75, 0.5, 0.9]]),
        torch.tensor([[0.5, NAN, NAN], [1.0, 1.0, NAN], [0.75, 0.5, 0.9]], dtype=torch.float64, requires_grad=True),
        [torch.tensor([0.5]), (1, 1), np.array([0.75, 0.5, 0.9])],
    ],
)
def test_any_form_of_matrix_gives_the_same(same):
    for metric in ("average_accuracy", "forgetting", "forgetting_first_minus_last", "backward_transfer"):
        assert getattr(metrics, metric)(same) == pytest.approx(getattr(metrics, metric)(A))


def test_one_update_has_forgotten_nothing():
    joint = [[0.9, 0.8, 0.7]]
    assert metrics.average_accuracy(joint) == pytest.approx(0.8)
    assert metrics.forgetting(joint) == metrics.forgetting_first_minus_last(joint) == 0.0
    assert math.copysign(1, metrics.forgetting_first_minus_last(joint)) == 1.0
    assert metrics.backward_transfer(joint) == 0.0


def test_what_was_not_evaluated_is_not_counted():
    only_at_the_end = [[NAN, NAN], [0.5, 1.0]]
    assert metrics.average_accuracy(only_at_the_end) == 0.75
    assert math.isnan(metrics.forgetting(only_at_the_end))
    assert math.isnan(metrics.backward_transfer(only_at_the_end))
    gap = [[1.0], [NAN, 1.0], [0.5, 0.5, 1.0], [0.5, NAN, 1.0, 1.0]]
    assert metrics.forgetting(gap) == pytest.approx((0.5 + 0.0) / 2)


def test_experiences_still_to_be_learned_count_only_when_asked_for():
    midway = [[1.0, 0.2, 0.1], [0.8, 0.9, 0.1]]
    assert metrics.average_accuracy(midway, seen=2) == pytest.approx(0.85)
    assert metrics.average_accuracy(midway) == pytest.approx(0.6)
    assert metrics.forgetting(midway) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="seen must be between 1 and the 3 experiences of the matrix, got 4"):
        metrics.average_accuracy(midway, seen=4)


def test_more_updates_than_experiences():
    a = [[0.5, NAN], [0.5, 1.0], [1.0, 0.5]]
    assert metrics.forgetting(a) == pytest.approx((-0.5 + 0.5) / 2)
    assert metrics.backward_transfer(a) == pytest.approx((0.5 - 0.5) / 2)


def test_forward_transfer():
    a = [[1.0, 0.6, 0.5], [1.0, 1.0, 0.3], [1.0, 1.0, 1.0]]
    assert metrics.forward_transfer(a, [0.5, 0.5, 0.2]) == pytest.approx((0.1 + 0.1) / 2)
    assert metrics.forward_transfer([[1.0]], [0.5]) == 0.0
    with pytest.raises(ValueError, match="evaluate_unseen=True"):
        metrics.forward_transfer(A, [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"baseline must hold one score for each of the 3 experiences, got \[2\]"):
        metrics.forward_transfer(a, [0.5, 0.5])


def test_intransigence():
    assert metrics.intransigence(A, [0.75, 1.0, 1.0]) == pytest.approx((0.25 + 0.0 + 0.1) / 3)
    assert metrics.intransigence([[1.0, 0.0]], torch.tensor([1.0, 0.5])) == 0.0
    with pytest.raises(ValueError, match="joint must hold one score"):
        metrics.intransigence(A, [1.0])


def test_negative_flip_rate():
    old, new = torch.tensor([1, 1, 1, 0]), torch.tensor([1, 0, 0, 1])
    assert metrics.negative_flip_rate(old, new) == 0.5
    assert metrics.negative_flip_rate(new, old) == 0.25
    with pytest.raises(ValueError, match="the same examples, got 4 and 3"):
        metrics.negative_flip_rate(old, new[:3])
    with pytest.raises(ValueError, match="new_correct must hold True or False"):
        metrics.negative_flip_rate(old, torch.tensor([0.0, 0.5, 1.0, 1.0]))
    with pytest.raises(ValueError, match="at least one"):
        metrics.negative_flip_rate([], [])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], r"got \[0, 0\]"),
        ([[]], r"got \[1, 0\]"),
        (torch.zeros(3), r"got \[3\]"),
        ([[0.5], ["0.5", 1.0]], "row 1 of the accuracy matrix must hold numbers"),
        ([0.5, 1.0], "row 0 of the accuracy matrix must hold numbers"),
        ([[0.5, math.inf]], r"must be finite, or NaN where not evaluated; got inf at a\[0, 1\]"),
    ],
)
def test_what_is_no_matrix_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        metrics.average_accuracy(matrix)


@settings(deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_definitions_hold_on_any_matrix(rows):
    n = len(rows)
    last = rows[-1]
    old = range(n - 1)
    expected = sum(max(rows[t][k] for t in old) - last[k] for k in old) / (n - 1) if n > 1 else 0.0
    assert metrics.forgetting(rows) == pytest.approx(expected)
    assert metrics.forgetting_first_minus_last(rows) == pytest.approx(-metrics.backward_transfer(rows))
    assert metrics.forgetting(rows) >= metrics.forgetting_first_minus_last(rows) - 1e-12
    assert metrics.average_accuracy(rows) == pytest.approx(sum(last) / n)


def fill(collection, rank: int = 0, world_size: int = 1) -> None:
    generator = torch.Generator().manual_seed(0)
    for t in range(3):
        for k in range(t + 1):
            right = torch.rand(10, generator=generator) < 0.7
            collection.update(right[rank::world_size], update=t, experience=k)


def all_metrics() -> MetricCollection:
    return MetricCollection(
        {
            "matrix": metrics.AccuracyMatrix(3),
            "average_accuracy": metrics.AverageAccuracy(3),
            "forgetting": metrics.Forgetting(3),
            "first_minus_last": metrics.ForgettingFirstMinusLast(3),
            "backward_transfer": metrics.BackwardTransfer(3),
            "intransigence": metrics.Intransigence([1.0, 1.0, 1.0]),
        }
    )


def test_classes_compute_the_functions():
    collection = all_metrics()
    fill(collection)
    value = collection.compute()
    a = value["matrix"]
    assert a.shape == (3, 3)
    assert a.isnan().tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    assert value["average_accuracy"].item() == pytest.approx(functional.average_accuracy(a))
    assert value["forgetting"].item() == pytest.approx(functional.forgetting(a))
    assert value["first_minus_last"].item() == pytest.approx(functional.forgetting_first_minus_last(a))
    assert value["backward_transfer"].item() == pytest.approx(functional.backward_transfer(a))
    assert value["intransigence"].item() == pytest.approx(functional.intransigence(a, [1.0, 1.0, 1.0]))
    assert len(collection.compute_groups) == 1


def test_classes_compute_midway_and_after_reset():
    metric = metrics.Forgetting(3)
    metric.update(torch.ones(4), update=0, experience=0)
    assert metric.compute() == 0.0
    metric.update(torch.zeros(4), update=1, experience=0)
    assert metric.compute() == 1.0
    metric.reset()
    metric.update(torch.tensor([0.25, 0.75]), update=0, experience=0)
    assert metric.matrix().tolist()[0][0] == 0.5


def test_forward_transfer_class():
    metric = metrics.ForwardTransfer(baseline=[0.25, 0.25])
    metric.update(torch.tensor([True, True]), update=0, experience=0)
    metric.update(torch.tensor([True, False]), update=0, experience=1)
    assert metric.compute().item() == 0.25


def test_negative_flip_rate_class_adds_up_over_batches():
    metric = metrics.NegativeFlipRate()
    metric.update(torch.tensor([True, True, True]), torch.tensor([False, True, True]))
    metric.update(torch.tensor([True]), torch.tensor([False]))
    assert metric.compute().item() == 0.5


def test_classes_refuse_by_message():
    with pytest.raises(ValueError, match="n_experiences must be positive, got 0"):
        metrics.AccuracyMatrix(0)
    metric = metrics.AccuracyMatrix(2)
    with pytest.raises(ValueError, match="experience must be between 0 and 1, got 2"):
        metric.update(torch.ones(1), update=0, experience=2)
    with pytest.raises(ValueError, match=r"scores must be in \[0, 1\], got 55 to 80"):
        metric.update(torch.tensor([55.0, 80.0]), update=0, experience=0)


def compute_on_rank() -> dict[str, float]:
    """What a rank of a process group computes from its share of the examples."""
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    collection = all_metrics()
    fill(collection, rank, world_size)
    value = collection.compute()
    torch.distributed.destroy_process_group()
    value["matrix"] = value["matrix"].nansum()
    return {name: metric.item() for name, metric in value.items()}


def test_two_ranks_compute_what_one_does():
    collection = all_metrics()
    fill(collection)
    expected = collection.compute()
    expected["matrix"] = expected["matrix"].nansum()
    for value in run_ranks("tests.metrics.test_functional:compute_on_rank", 2):
        assert value == pytest.approx({name: metric.item() for name, metric in expected.items()})
