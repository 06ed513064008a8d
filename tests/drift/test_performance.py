"""Accuracy without labels: it follows shifts of the inputs at once, and changes of the concept with the labels."""

import io
import math

import pytest
import torch

from evertune.drift.performance import PerformanceEstimator


def classified(n, hard, seed, too_sure=0.0):
    """A classifier of two classes on records of which a share is hard: its confidences, and whether it is right.

    It is miscalibrated (the log-odds are 1.5 times what they should be); ``too_sure`` of its right answers turn wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = torch.where(torch.rand(n, generator=generator) < hard, 0.5, 3.0)
    odds = spread * torch.randn(n, generator=generator).abs()
    right = torch.rand(n, generator=generator) < torch.sigmoid(odds)
    right &= torch.rand(n, generator=generator) >= too_sure
    return torch.sigmoid(1.5 * odds), right


def learned(**settings):
    estimator = PerformanceEstimator(**settings)
    confidences, right = classified(4_000, hard=0.3, seed=0)
    estimator.update(range(4_000), confidences)
    estimator.labels(range(4_000), right)
    return estimator


@pytest.mark.parametrize("hard", [0.0, 0.3, 0.6, 1.0])
def test_it_tracks_the_accuracy_when_the_inputs_change(hard):
    """With no label of the new inputs. The mean of raw confidences is 6 to 9 points too high."""
    estimator = learned()
    confidences, right = classified(10_000, hard, seed=1)
    estimator.update(range(10_000, 20_000), confidences)
    accuracy = right.double().mean().item()
    assert estimator.estimate == pytest.approx(accuracy, abs=0.02)
    low, high = estimator.interval
    assert low < estimator.estimate < high
    assert high - low < 0.1


def test_the_interval_covers_the_accuracy_as_often_as_it_says():
    """It is the accuracy of recent records, weighted as the estimate weights them."""
    covered = 0
    weights = 0.5 ** (torch.arange(2_999, -1, -1) / 1_000)
    for seed in range(100):
        estimator = PerformanceEstimator()
        confidences, right = classified(6_000, hard=0.3, seed=seed)
        estimator.update(range(3_000), confidences[:3_000])
        estimator.labels(range(3_000), right[:3_000])
        new, new_right = classified(3_000, hard=0.7, seed=1_000 + seed)
        estimator._seen.zero_(), estimator._seen_squares.zero_()  # the new inputs alone
        estimator.update(range(3_000, 6_000), new)
        low, high = estimator.interval
        covered += low <= (weights * new_right).sum() / weights.sum() <= high
    assert 88 <= covered <= 100


def test_it_follows_a_change_of_the_concept_with_the_labels():
    """Confidences stay, a quarter of the right answers turns wrong: nothing to see until labels come."""
    estimator = learned()
    before = estimator.estimate
    confidences, right = classified(4_000, hard=0.3, seed=2, too_sure=0.25)
    estimator.update(range(10_000, 14_000), confidences)
    assert estimator.estimate == pytest.approx(before, abs=0.01)
    estimates = []
    for start in range(0, 4_000, 1_000):
        estimator.labels(range(10_000 + start, 11_000 + start), right[start : start + 1_000])
        estimates.append(estimator.estimate)
    assert max(estimates) < before - 0.04
    assert estimates[-1] == pytest.approx(right.double().mean().item(), abs=0.03)
    assert before - estimates[-1] > 0.1


def test_the_map_never_decreases_and_pools_adjacent_violators():
    estimator = PerformanceEstimator(min_labels=1, label_half_life=1e12)
    confidences = [0.505] * 4 + [0.605] * 4 + [0.705] * 2 + [0.905] * 4
    right = [1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
    estimator.update(range(14), confidences)
    estimator.labels(range(14), right)
    expected = torch.tensor([0.25, 0.25, 4 / 6, 4 / 6, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(estimator.calibrated([0.1, 0.505, 0.605, 0.705, 0.905, 1.0]), expected)
    assert estimator.estimate == pytest.approx(sum(right) / 14, abs=1e-3)  # isotonic regression keeps the mean
    grid = learned().calibrated(torch.linspace(0, 1, 1_001))
    assert (grid.diff() >= 0).all()
    assert grid[950] == pytest.approx(0.95 ** (1 / 1.5) / (0.95 ** (1 / 1.5) + 0.05 ** (1 / 1.5)), abs=0.03)


def test_neither_the_cut_into_batches_nor_a_restart_changes_it():
    confidences, right = classified(3_000, hard=0.3, seed=0)
    ids = [f"r{i}" for i in range(3_000)]
    whole, parts = PerformanceEstimator(), PerformanceEstimator()
    whole.update(ids, confidences)
    whole.labels(ids[:2_000], right[:2_000])
    for start in range(0, 3_000, 250):
        parts.update(ids[start : start + 250], confidences[start : start + 250])
    for start in range(0, 2_000, 125):
        saved = io.BytesIO()
        torch.save(parts.state_dict(), saved)
        parts = PerformanceEstimator()
        parts.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
        parts.labels(ids[start : start + 125], right[start : start + 125])
    assert parts.estimate == pytest.approx(whole.estimate, rel=1e-9)
    assert parts.interval == pytest.approx(whole.interval, rel=1e-9)
    with pytest.raises(ValueError, match=r"saved with half_life=1000\.0, this has 10\.0"):
        PerformanceEstimator(half_life=10).load_state_dict(whole.state_dict())


def test_unknown_repeated_and_expired_ids_are_counted():
    estimator = PerformanceEstimator(max_pending=5, min_labels=1)
    estimator.update(["a", "b", "c", "a"], [0.5, 0.6, 0.7, 0.9])
    assert (estimator.n_seen, estimator.n_repeated, estimator.n_expired) == (4, 1, 0)
    estimator.update(["d", "b", "e", "f", "g"], [0.5] * 5)
    assert (estimator.n_seen, estimator.n_repeated, estimator.n_expired) == (9, 2, 2)
    estimator.labels(["a", "c", "c", "never"], [True, True, True, False])  # a is set aside, c comes twice
    assert (estimator.n_labelled, estimator.n_unknown) == (1, 3)
    assert estimator.state_dict()["pending_ids"] == ["d", "e", "f", "g"]


def test_nothing_is_claimed_before_there_are_labels():
    estimator = PerformanceEstimator(min_labels=10)
    estimator.update(range(20), [0.8] * 20)
    estimator.labels(range(9), [True] * 9)
    assert math.isnan(estimator.estimate) and all(map(math.isnan, estimator.interval))
    estimator.labels([9], [True])
    assert estimator.estimate == 1
    assert estimator.interval[0] < 0.95 and estimator.interval[1] == 1
    with pytest.raises(ValueError, match="no label has come yet"):
        PerformanceEstimator().calibrated([0.5])


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5, math.inf])
def test_bad_confidences_are_refused_and_change_nothing(bad):
    estimator = PerformanceEstimator()
    with pytest.raises(ValueError, match=r"1 of 3 confidences are NaN or outside \[0, 1\], first: .* of record 'b'"):
        estimator.update(["a", "b", "c"], [0.5, bad, 0.5])
    assert estimator.n_seen == 0
    assert estimator.state_dict()["pending_ids"] == []


def test_bad_labels_and_settings():
    estimator = PerformanceEstimator()
    estimator.update(["a", "b"], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"got 3\.0 for record 'b': compare the predicted class"):
        estimator.labels(["a", "b"], [1, 3])
    with pytest.raises(ValueError, match="there are 2 ids for 1 labels"):
        estimator.labels(["a", "b"], [1])
    with pytest.raises(ValueError, match="there are 1 ids for 2 confidences"):
        estimator.update(["c"], [0.5, 0.5])
    assert estimator.n_labelled == 0 and len(estimator.state_dict()["pending_ids"]) == 2
    for setting in ("half_life", "label_half_life", "min_labels", "max_pending", "level"):
        with pytest.raises(ValueError, match=f"{setting} must be positive, got 0"):
            PerformanceEstimator(**{setting: 0})
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95"):
        PerformanceEstimator(level=95)
