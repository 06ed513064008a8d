"""KernelCUSUM and ClassifierTest: exact indices, the same decision however the records come, stated false alarms."""

import io
import math

import pytest
import torch

from evertune.drift.classifier import ClassifierTest
from evertune.drift.kernel_cusum import KernelCUSUM

CUSUM = {"arl": 1_000, "reference_size": 128, "n_frequencies": 32}
LINEAR = CUSUM | {"kernel": "linear"}
CLASSIFIER = {"arl": 1_000, "reference_size": 128, "window_size": 32}
ALL = [(KernelCUSUM, CUSUM), (KernelCUSUM, LINEAR), (ClassifierTest, CLASSIFIER)]
IDS = ["gaussian", "linear", "classifier"]


def stream(change_at, n, shift=1.0, n_features=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    records = torch.randn(n, n_features, generator=generator)
    records[change_at:] += shift
    return records


def alarm(detector, records, cut=1):
    for batch in records.split(cut):
        detector.update(batch)
        if detector.drift_detected:
            return detector.detected_at
    return None


@pytest.mark.parametrize(
    ("make", "settings", "found"),
    [(*ALL[0], [312, 352, None]), (*ALL[1], [312, 328, None]), (*ALL[2], [320, 352, None])],
    ids=IDS,
)
def test_exact_detection_index(make, settings, found):
    assert [alarm(make(**settings), stream(300, 500, shift)) for shift in (1.0, 0.5, 0.0)] == found


@pytest.mark.parametrize("cut", [7, 8, 50, 500])
@pytest.mark.parametrize(("make", "settings"), ALL, ids=IDS)
def test_the_cut_into_batches_does_not_matter(make, settings, cut):
    one, other = make(**settings), make(**settings)
    assert alarm(one, stream(300, 500), cut=1) == alarm(other, stream(300, 500), cut)
    assert other.score == pytest.approx(one.score, rel=1e-9)
    assert other.threshold == one.threshold


@pytest.mark.parametrize("stop", [50, 128, 131, 290, 301])
@pytest.mark.parametrize(("make", "settings"), ALL, ids=IDS)
def test_restart_in_mid_stream_changes_no_index(make, settings, stop):
    records = stream(300, 500)
    undisturbed, first, second = make(**settings), make(**settings), make(**settings)
    undisturbed.update(records[:stop])
    first.update(records[:stop])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for record in records[stop:]:
        undisturbed.update(record)
        second.update(record)
        assert undisturbed.score == second.score or math.isnan(second.score)
        assert undisturbed.drift_detected == second.drift_detected
        if second.drift_detected:
            break
    assert second.detected_at == undisturbed.detected_at is not None


@pytest.mark.parametrize("settings", [CUSUM, LINEAR], ids=["gaussian", "linear"])
def test_sums_of_two_ranks_decide_as_one_process(settings):
    records = stream(300, 500)
    one, ranks = KernelCUSUM(**settings), [KernelCUSUM(**settings) for _ in range(2)]
    assert ranks[0].sums(records[:3], torch.arange(3), 3) is None  # the reference is needed as records
    for batch in records.split(10):
        one.update(batch)
        if not ranks[0].armed:
            for detector in ranks:
                detector.update(batch)
            continue
        positions = torch.arange(len(batch))
        sums = [ranks[i].sums(batch[i::2], positions[i::2], len(batch)) for i in range(2)]
        for detector in ranks:
            detector.update_sums(sums[0] + sums[1], len(batch))
            assert detector.n_tests == one.n_tests
            assert detector.drift_detected == one.drift_detected
            assert detector.score == pytest.approx(one.score, rel=1e-9, nan_ok=True)
    assert ranks[0].detected_at == ranks[1].detected_at == one.detected_at is not None


def test_records_of_a_classifier_are_needed_on_every_rank():
    detector = ClassifierTest(**CLASSIFIER)
    detector.update(stream(300, 200))
    assert detector.sums(stream(0, 4), torch.arange(4), 4) is None


@pytest.mark.parametrize(("make", "settings"), ALL, ids=IDS)
def test_memory_is_bounded(make, settings):
    detector = make(**settings)

    def size():
        tensors = [value for value in detector.state_dict().values() if isinstance(value, torch.Tensor)]
        return sum(value.numel() for value in tensors), sum(value.untyped_storage().nbytes() for value in tensors)

    detector.update(stream(9_999, 224))
    before = size()
    detector.update(stream(9_999, 9_600))
    assert size() == before


def mean_run_length(detector_of, n_features, n_runs, limit):
    lengths = []
    for seed in range(n_runs):
        detector, generator = detector_of(seed), torch.Generator().manual_seed(seed)
        while not detector.drift_detected and detector.n_seen < limit:
            detector.update(torch.randn(256, n_features, generator=generator))
        lengths.append((detector.detected_at or limit) - detector.reference_size)
    return sum(lengths) / n_runs


@pytest.mark.parametrize(
    ("make", "settings", "n_features"),
    [
        (KernelCUSUM, {"n_frequencies": 32}, 8),
        (KernelCUSUM, {"kernel": "linear"}, 1),
        (ClassifierTest, {"window_size": 32}, 8),
    ],
    ids=IDS,
)
def test_false_alarm_rate_is_the_one_asked_for(make, settings, n_features):
    length = mean_run_length(lambda seed: make(300, reference_size=256, seed=seed, **settings), n_features, 60, 5_000)
    assert 0.7 * 300 < length < 1.4 * 300  # the standard error is 13%


def test_a_small_change_takes_the_long_windows():
    settings = {"arl": 2_000, "reference_size": 512, "kernel": "linear"}
    records = stream(600, 1_000, shift=0.5, n_features=1, seed=2)
    assert alarm(KernelCUSUM(**settings), records) == 664
    assert alarm(KernelCUSUM(window_sizes=[8], **settings), records) == 920


def test_change_of_spread_alone_is_found():
    records = stream(300, 500, shift=0.0)
    records[300:] *= 2
    assert alarm(KernelCUSUM(**CUSUM), records) == 312


def test_windows_go_up_to_a_quarter_of_the_reference():
    assert KernelCUSUM(**CUSUM).window_sizes == (16, 32)
    assert KernelCUSUM().window_sizes == (16, 32, 64, 128)


def test_the_weights_of_the_classifier_name_the_feature():
    records = stream(300, 500, shift=0.0, n_features=100)
    records[300:, 17] += 6
    detector = ClassifierTest(**CLASSIFIER)
    assert not detector.weights.numel()
    assert alarm(detector, records) == 320
    assert detector.weights.shape == (100,)
    assert detector.weights.argmax() == 17
    assert 0.5 < detector.threshold < detector.score < 1
    assert detector.p_value < 1.1 * detector.level


@pytest.mark.parametrize(("make", "settings"), ALL, ids=IDS)
def test_constant_features_arm_and_detect(make, settings):
    assert alarm(make(**settings), torch.cat([torch.ones(224, 3), torch.zeros(64, 3)]), 5) in (232, 256)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (KernelCUSUM, {"arl": 8}, "arl must be above stride=8 and at most 800000, got 8"),
        (KernelCUSUM, {"arl": 1e6}, "arl must be above stride=8 and at most 800000, got 1e+06"),
        (KernelCUSUM, {"arl": -1}, "arl must be positive, got -1.0"),
        (KernelCUSUM, {"stride": 0}, "stride must be positive, got 0"),
        (KernelCUSUM, {"n_frequencies": 0}, "n_frequencies must be positive, got 0"),
        (KernelCUSUM, {"kernel": "cubic"}, "kernel must be 'gaussian' or 'linear', got 'cubic'"),
        (KernelCUSUM, {"window_sizes": [16, 20]}, "window_sizes must be multiples of stride=8, got [16, 20]"),
        (KernelCUSUM, {"window_sizes": []}, "window_sizes must be multiples of stride=8, got []"),
        (KernelCUSUM, {"block_size": 12}, "block_size must divide stride=8 or be a multiple of it, got 12"),
        (
            KernelCUSUM,
            {"block_size": 32, "reference_size": 500},
            "block_size must divide reference_size, got 32 for 500",
        ),
        (
            KernelCUSUM,
            {"window_sizes": [256]},
            "a reference of 512 records is too small for arl=10000 with windows of up to 256 and block_size=1: "
            "reference_size must be at least 1024",
        ),
        (ClassifierTest, {"n_folds": 1}, "n_folds must be at least 2 and divide window_size=64, got 1"),
        (ClassifierTest, {"n_folds": 5}, "n_folds must be at least 2 and divide window_size=64, got 5"),
        (ClassifierTest, {"window_size": 0}, "window_size must be positive, got 0"),
        (
            ClassifierTest,
            {"reference_size": 100},
            "a reference of 100 records is too small for arl=10000 with window_size=64 and block_size=1: "
            "reference_size must be at least 256",
        ),
    ],
)
def test_settings_out_of_range(make, settings, message):
    with pytest.raises(ValueError) as error:
        make(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(("make", "settings"), ALL, ids=IDS)
def test_state_of_other_settings_is_refused(make, settings):
    with pytest.raises(ValueError, match="saved with seed=0, this has 1"):
        make(**settings, seed=1).load_state_dict(make(**settings).state_dict())


@pytest.mark.parametrize(("make", "settings"), ALL, ids=IDS)
def test_bad_input_is_refused_and_changes_nothing(make, settings):
    detector = make(**settings)
    detector.update(stream(0, 150))
    before = detector.state_dict()
    with pytest.raises(ValueError, match="2 of 2 records have NaN or infinite features, first: 0"):
        detector.update(torch.full((2, 6), math.nan))
    after = detector.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if isinstance(v, torch.Tensor))
    assert after["n_seen"] == before["n_seen"] == 150


def test_windows_are_longer_than_the_blocks_that_streams_are_put_together_of() -> None:
    assert KernelCUSUM(arl=1_000, reference_size=2_048, block_size=32).window_sizes == (64, 128, 256, 512)
    with pytest.raises(ValueError, match="window_sizes must be at least twice block_size=32, got 16"):
        KernelCUSUM(arl=1_000, reference_size=2_048, block_size=32, window_sizes=[16, 64])


@pytest.mark.parametrize("make", [KernelCUSUM, ClassifierTest])
def test_correlated_records_arm_with_blocks_and_a_change_is_found(make: type) -> None:
    generator = torch.Generator().manual_seed(5)
    records = torch.randn(3_048, 4, generator=generator)
    for i in range(1, len(records)):
        records[i] = 0.5 * records[i - 1] + 0.75**0.5 * records[i]
    records[2_548:] += 1.0
    detector = make(arl=2_000, reference_size=2_048, block_size=16)
    detector.update(records[:2_548])
    assert detector.armed
    assert not detector.drift_detected
    detector.update(records[2_548:])
    assert detector.drift_detected
    assert 2_548 < detector.detected_at < 2_700
