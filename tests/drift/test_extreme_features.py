"""Features that are all equal, very large, very small or rare: no false alarm, no missed change, honest p-values."""

import math

import pytest
import torch

from evertune.drift import ADWIN, HDDM, LSDD, MMD, ClassifierTest, KernelCUSUM, MarginalKS, PageHinkley

SMALL = {"arl": 2_000, "reference_size": 512}
VECTORS = [MMD, LSDD, MarginalKS, ClassifierTest, KernelCUSUM]


def records(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", VECTORS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, 1e-30])
def test_equal_records_raise_no_alarm_and_their_p_value_says_so(make, value):
    detector = make(**SMALL)
    detector.update(torch.full((512, 4), value))
    detector.update(torch.full((128, 4), value))
    assert detector.n_tests and not detector.drift_detected
    assert math.isnan(detector.p_value) or detector.p_value > 0.5


@pytest.mark.parametrize("make", VECTORS)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_scale_of_the_features_changes_no_decision(make, scale):
    found = []
    for unit in (1.0, scale):
        detector = make(**SMALL)
        detector.update(records(512) * unit)
        detector.update(records(256, seed=1) * unit)
        assert not detector.drift_detected
        detector.update((records(256, seed=2) + 1.5) * unit)
        found.append((detector.drift_detected, detector.detected_at, detector.score))
    assert found[0][:2] == found[1][:2] and found[0][0]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-3)


@pytest.mark.parametrize("make", [PageHinkley, HDDM, ADWIN])
def test_rare_events_need_a_reference_that_holds_some(make):
    def events(n: int, every: int) -> torch.Tensor:
        return (torch.arange(n) % every == every // 2).float()[:, None]

    with pytest.raises(ValueError, match=r"only 3 of the 600 records .* differ from 0, .* must be about 2000"):
        make(arl=1_000, reference_size=600).update(events(600, 200))
    detector = make(arl=1_000, reference_size=2_000)
    detector.update(events(2_000, 200))
    assert detector.armed and not detector.drift_detected
    detector.update(events(400, 3))
    assert detector.drift_detected
    make(arl=1_000, reference_size=600).update(torch.zeros(600, 1))


def test_rare_events_raise_no_more_alarms_than_asked_for():
    runs = []
    for seed in range(8):
        records = (torch.rand(4_800, 1, generator=torch.Generator().manual_seed(seed)) < 0.015).float()
        detector = HDDM(arl=1_000, reference_size=1_800)
        for batch in records.split(50):
            detector.update(batch)
            if detector.drift_detected:
                break
        runs.append((detector.detected_at or 4_800) - 1_800)
    assert sum(runs) / len(runs) > 500, runs
