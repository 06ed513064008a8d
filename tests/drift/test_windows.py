"""Detectors of windows: exact detection indices, rates that hold, and decisions that batches do not change."""

import io
import math

import pytest
import torch

from evertune.drift.labels import LabelShift
from evertune.drift.lsdd import LSDD
from evertune.drift.marginals import MarginalKS
from evertune.drift.mmd import MMD

SMALL = {"arl": 2_000, "reference_size": 256, "window_size": 16}
DETECTORS = [MMD, LSDD, MarginalKS, LabelShift]
every_detector = pytest.mark.parametrize("kind", DETECTORS, ids=lambda kind: kind.__name__)


def stream(kind, n, change_at=10**9, seed=0, n_features=6):
    """Standard normal features whose mean moves by one; or four classes, of which two are left."""
    generator = torch.Generator().manual_seed(seed)
    if kind is LabelShift:
        records = torch.randint(4, (n, 1), generator=generator).float()
        records[change_at:] %= 2
    else:
        records = torch.randn(n, n_features, generator=generator)
        records[change_at:] += 1
    return records


def decisions(detector, records, cut=1):
    """Where each test was made, its score and p-value; up to the first alarm."""
    found = []
    for batch in records.split(cut):
        tests = detector.n_tests
        detector.update(batch)
        if detector.n_tests > tests:
            found.append((detector.n_seen, detector.score, detector.p_value))
        if detector.drift_detected:
            break
    return found


@pytest.mark.parametrize(("kind", "expected"), [(MMD, 512), (LSDD, 512), (MarginalKS, 512), (LabelShift, 512)])
def test_exact_detection_index(kind, expected):
    detector = kind(**SMALL)
    decisions(detector, stream(kind, 800, change_at=496))
    assert detector.detected_at == expected


@every_detector
def test_no_alarm_without_change(kind):
    detector = kind(**SMALL)
    decisions(detector, stream(kind, 800))
    assert detector.detected_at is None
    assert detector.n_tests == (800 - 256) // 16


@every_detector
def test_p_values_are_uniform_while_nothing_changes(kind):
    p_values = []
    for seed in range(8):
        detector, records = (
            kind(arl=2_000, reference_size=512, window_size=32, seed=seed),
            stream(kind, 2_560, seed=seed),
        )
        for window in records.split(32):
            detector.update(window)
            if detector.n_tests:
                p_values.append(detector.p_value)
    p_values = torch.tensor(p_values)
    assert len(p_values) == 8 * 64
    for share in (0.1, 0.25, 0.5, 0.75):
        assert (p_values <= share).double().mean().item() == pytest.approx(share, abs=0.12)


@every_detector
def test_the_cut_into_batches_changes_nothing(kind):
    records = stream(kind, 700, change_at=496)
    one_by_one = kind(**SMALL)
    decisions(one_by_one, records)
    for cut in (7, 16, 100, 700):
        detector = kind(**SMALL)
        decisions(detector, records, cut)
        assert detector.detected_at == one_by_one.detected_at
        assert detector.score == pytest.approx(one_by_one.score, rel=1e-9)


@every_detector
def test_restart_in_mid_stream_changes_no_decision(kind):
    records = stream(kind, 700, change_at=496)
    expected = decisions(kind(**SMALL), records)
    for stop in (100, 256, 300, 500):
        first, second, file = kind(**SMALL), kind(**SMALL), io.BytesIO()
        before = decisions(first, records[:stop])
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert before + decisions(second, records[stop:]) == expected


@every_detector
def test_two_ranks_add_up_to_one_process(kind):
    records = stream(kind, 700, change_at=496)
    alone, sharded = kind(**SMALL), kind(**SMALL)
    assert sharded.sums(records[:2], torch.arange(2), 4) is None  # the reference needs the records themselves
    for detector in (alone, sharded):
        detector.update(records[:260])
    for batch in records[260:].split(40):
        alone.update(batch)
        positions = torch.arange(len(batch))
        halves = [sharded.sums(batch[rank::2], positions[rank::2], len(batch)) for rank in (0, 1)]
        sharded.update_sums(halves[0] + halves[1], len(batch))
        assert sharded.score == pytest.approx(alone.score, rel=1e-12, nan_ok=True)
        assert (sharded.n_seen, sharded.detected_at) == (alone.n_seen, alone.detected_at)
        if alone.drift_detected:
            break
    assert alone.drift_detected


def rate_of_alarms(kind, records_of, n_references, arl=320, n=3_200):
    """Alarms per test, in units of the level asked for."""
    alarms = tests = 0
    for seed in range(n_references):
        generator = torch.Generator().manual_seed(seed)
        detector = kind(arl=arl, reference_size=256, window_size=16, seed=seed)
        detector.update(records_of(256, generator))
        for window in records_of(n, generator).split(16):
            detector.update(window)
            alarms += detector.drift_detected
            tests += 1
    return alarms / tests / detector.level


@every_detector
def test_false_alarms_come_as_often_as_asked(kind):
    def records_of(n, generator):
        if kind is LabelShift:
            return (torch.rand(n, 1, generator=generator) ** 2 * 10).floor()
        return torch.randn(n, 6, generator=generator)

    assert rate_of_alarms(kind, records_of, n_references=20) == pytest.approx(1, abs=0.35)


def test_copies_of_a_feature_are_not_tests_of_their_own():
    def copies(n, generator):
        return torch.randn(n, 1, generator=generator).expand(-1, 16)

    def different(n, generator):
        return torch.randn(n, 16, generator=generator)

    generator = torch.Generator().manual_seed(0)
    thresholds = []
    for records_of in (lambda n, generator: copies(n, generator)[:, :1], copies, different):
        detector = MarginalKS(arl=320, reference_size=256, window_size=16, n_knots=1)
        detector.update(records_of(256, generator.manual_seed(0)))
        thresholds.append(detector.threshold)
    assert thresholds[1] < thresholds[0] + 1 < thresholds[2] + 1
    assert rate_of_alarms(MarginalKS, copies, n_references=20) == pytest.approx(1, abs=0.35)


def test_marginals_name_the_feature():
    detector = MarginalKS(**SMALL)
    assert detector.feature_scores.numel() == 0
    records = stream(MarginalKS, 400)
    records[320:, 4] += 2
    decisions(detector, records)
    assert detector.drift_detected
    assert detector.feature_scores.shape == (6,)
    assert detector.feature_scores.argmax() == 4
    assert detector.feature_scores.max().item() == pytest.approx(detector.score, rel=1e-5)


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_a_feature_that_was_always_zero_is_seen_to_leave_it(value):
    detector, records = MarginalKS(**SMALL), stream(MarginalKS, 400)
    records[:, 2] = 0
    records[320:, 2] = value
    decisions(detector, records)
    assert detector.detected_at == 336
    assert detector.feature_scores.argmax() == 2


def test_score_of_labels_is_chi_squared():
    detector = LabelShift(arl=2_000, reference_size=256, window_size=16)
    detector.update(torch.arange(256)[:, None] % 4)
    detector.update(torch.tensor([0] * 7 + [1] * 5 + [2] * 2 + [3] * 2)[:, None])
    assert detector.score == pytest.approx((9 + 1 + 4 + 4) / 4, rel=1e-5)


def test_unknown_classes_count_together():
    detector = LabelShift(arl=2_000, n_classes=4, reference_size=256, window_size=16)
    detector.update(torch.arange(256)[:, None] % 4)
    one_new = torch.arange(16) % 4
    one_new[0] = 4
    detector.update(one_new[:, None])
    assert not detector.drift_detected
    detector.update(torch.arange(16)[:, None] + 1_000_000)
    assert detector.drift_detected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[0], [-1]], "classes must be whole numbers from 0, got -1 at record 1"),
        ([[0.5]], "classes must be whole numbers from 0, got 0.5 at record 0"),
        ([1, 2, 3], r"class numbers must have shape \[records, 1\], got \[3\]: unsqueeze\(1\) a vector of them"),
    ],
)
def test_what_is_no_class_is_refused_and_changes_nothing(bad, message):
    detector = LabelShift(**SMALL)
    detector.update([[1], [2]])
    with pytest.raises(ValueError, match=message):
        detector.update(bad)
    assert detector.n_seen == 2


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (LSDD, {"n_centers": 0}, "n_centers must be positive, got 0"),
        (LSDD, {"regularization": -1.0}, r"regularization must be positive, got -1\.0"),
        (LSDD, {"reference_size": 128}, "of which 64 are centres, .* reference_size must be at least 192"),
        (MarginalKS, {"n_knots": 0}, "n_knots must be positive, got 0"),
        (MarginalKS, {"reference_size": 100}, "a reference of 100 records is too small for arl=10000"),
        (LabelShift, {"n_classes": 0}, "n_classes must be positive, got 0"),
        (LabelShift, {"window_size": 0}, "window_size must be positive, got 0"),
    ],
)
def test_settings_out_of_range(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@every_detector
def test_memory_is_bounded(kind):
    def size(detector):
        return sum(value.numel() for value in detector.state_dict().values() if isinstance(value, torch.Tensor))

    detector = kind(**SMALL)
    detector.update(stream(kind, 300))
    before = size(detector)
    detector.update(stream(kind, 3_000))
    assert size(detector) <= before + 6  # the feature scores of the first test
    assert not math.isnan(detector.score)
