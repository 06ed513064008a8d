"""River's detectors behind one interface: exact indices, exact restarts, and the false-alarm rate asked for."""

import io
import math

import numpy as np
import pytest
import torch

from evertune.drift.paths import inflation
from evertune.drift.scalars import ADWIN, HDDM, PageHinkley

river = pytest.importorskip("river.drift")

KINDS = {
    "PageHinkley": PageHinkley,
    "HDDM": HDDM,
    "ADWIN": ADWIN,
}
SMALL = {"arl": 1_000, "reference_size": 200}


def stream(change_at, n, shift=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    records = 3 + 2 * torch.randn(max(n, 1_000), 1, generator=generator)
    records[change_at:] += 2 * shift
    return records[:n]


def alarms(detector, records, cut=1):
    """Every update with an alarm: the record that raised it and its score."""
    found = []
    for batch in records.split(cut):
        detector.update(batch)
        if detector.drift_detected:
            found.append((detector.detected_at - 1, detector.score))
    return found


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """A class, and a detector of it that is armed, as a state."""
    detector = KINDS[request.param](**SMALL)
    detector.update(stream(400, 200))
    return request.param, detector.state_dict()


def armed(kind):
    detector = KINDS[kind[0]](**SMALL)
    detector.load_state_dict(kind[1])
    return detector


EXPECTED = {
    "PageHinkley": [408, 414, 412],
    "HDDM": [411, 417, 413],
    "ADWIN": [407, 415, 423],
}


@pytest.mark.parametrize(("shift", "which"), [(1.0, 0), (0.5, 1), (-1.0, 2)])
def test_exact_detection_index(kind, shift, which):
    found = alarms(armed(kind), stream(400, 600, shift)[200:])
    assert found[0][0] == EXPECTED[kind[0]][which]


def test_the_threshold_is_the_same_wherever_it_is_found(kind):
    again = KINDS[kind[0]](**SMALL)
    for batch in stream(400, 600).split(150):
        again.update(batch)
    other = armed(kind)
    other.update(stream(400, 600)[200:])
    assert again.threshold == other.threshold
    assert torch.equal(again.state_dict()["numbers"], other.state_dict()["numbers"])


@pytest.mark.parametrize("cut", [7, 32, 400])
def test_the_cut_into_batches_does_not_matter(kind, cut):
    records = stream(400, 600)[200:]
    one, several = armed(kind), armed(kind)
    first = alarms(one, records)[0]
    assert alarms(several, records, cut)[0] == first
    assert (one.n_seen, one.n_tests) == (several.n_seen, several.n_tests)
    assert torch.equal(one.state_dict()["numbers"], several.state_dict()["numbers"])


@pytest.mark.parametrize("stop", [1, 63, 199, 205, 230, 300])
def test_a_restart_changes_no_index(kind, stop):
    """Also after the alarm, when the statistic is high or ADWIN's window has been cut."""
    records = stream(400, 800)[200:]
    expected = alarms(armed(kind), records)
    before = armed(kind)
    found = alarms(before, records[:stop])
    saved = io.BytesIO()
    torch.save(before.state_dict(), saved)
    after = KINDS[kind[0]](**SMALL)
    after.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert found + alarms(after, records[stop:]) == expected


def test_a_restart_within_the_reference():
    records = stream(400, 600)
    whole, before, after = PageHinkley(**SMALL), PageHinkley(**SMALL), PageHinkley(**SMALL)
    before.update(records[:150])
    after.load_state_dict(before.state_dict())
    assert alarms(after, records[150:])[0] == alarms(whole, records)[0]


def test_a_state_of_other_settings_is_refused(kind):
    other = KINDS[kind[0]](**{**SMALL, "arl": 2_000})
    with pytest.raises(ValueError, match=r"the state was saved with arl=1000\.0, this has 2000\.0"):
        other.load_state_dict(kind[1])


def test_memory_is_bounded(kind):
    detector = armed(kind)
    detector.update(stream(20_000, 20_000, seed=1))
    assert detector.state_dict()["numbers"].numel() < 2_500  # ADWIN: bytes
    assert not len(detector.state_dict()["reference"])


def river_statistics(name, values):
    """What River's own objects say after each value; for ADWIN whether it has cut, with ``delta`` of one in ten."""
    detector = KINDS[name](**SMALL)
    detector.threshold = math.log(10)
    detector._river = detector._new()
    for value in values:
        detector._river.update(value)
        yield detector._statistic() if name != "ADWIN" else detector._river.drift_detected
        detector._river._drift_detected = False


@pytest.mark.parametrize("name", KINDS)
def test_simulated_paths_are_those_of_rivers_detector(name):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(1_200, 3, generator=generator).double()
    values[800:] += torch.tensor([0.0, 0.4, -0.4])
    detector = KINDS[name](**SMALL)
    values = detector._transformed(values.numpy())
    paths = detector._paths(3)
    simulated = []
    for i in range(1_200):
        now = np.full(3, -np.inf)
        paths.feed(values[i : i + 1], now if i >= 200 else None)
        simulated.append(now)
    simulated = np.array(simulated)
    for column in range(3):
        real = np.array(list(river_statistics(name, values[:, column].tolist())))
        if name == "ADWIN":  # the same up to the first cut, which is where the two part
            cut = simulated[:, column] > math.log(10)
            assert cut.argmax() == real.argmax()
            assert cut.any() == real.any() == (column > 0)
        else:
            np.testing.assert_allclose(simulated[200:, column], real[200:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_run_length(name):
    """The mean over references and streams is the one asked for (within the error of 64 streams)."""
    generator = torch.Generator().manual_seed(5)
    lengths = []
    for seed in range(16):
        reference = torch.randn(200, 1, generator=generator)
        detector = KINDS[name](300, reference_size=200, seed=seed)
        detector.update(reference)
        state = detector.state_dict()
        for _ in range(4):
            detector.load_state_dict(state)
            detector.detected_at = None
            while detector.detected_at is None and detector.n_seen < 4_000:
                detector.update(torch.randn(100, 1, generator=generator))
            lengths.append((detector.detected_at or detector.n_seen) - 200)
    assert sum(lengths) / len(lengths) == pytest.approx(300, rel=0.35)


def test_correlated_records_have_a_higher_threshold_in_blocks():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1_600, generator=generator)
    records = torch.zeros(1_600)
    for i in range(1, 1_600):
        records[i] = 0.5 * records[i - 1] + noise[i]
    assert inflation(records, 32) == pytest.approx(3, rel=0.25)  # (1 + 0.5) / (1 - 0.5)
    assert inflation(noise, 32) == pytest.approx(1, rel=0.25)
    single, blocks = (PageHinkley(1_600, reference_size=1_600, block_size=size) for size in (1, 32))
    for detector in (single, blocks):
        detector.update(records[:, None])
    assert blocks.threshold > 2 * single.threshold


def test_a_reference_without_variation(kind):
    """Any other value is a change then."""
    detector = KINDS[kind[0]](**SMALL)
    detector.update(torch.full((600, 1), 0.25))
    assert detector.armed and not detector.drift_detected
    detector.update(torch.full((64, 1), 5.0))
    assert detector.drift_detected


def test_numbers_are_taken_one_by_one():
    detector = PageHinkley(**SMALL)
    detector.update(0.5)
    detector.update([0.5])
    detector.update([[0.5], [0.25]])
    detector.update(torch.tensor(0.5))
    assert detector.n_seen == 5
    with pytest.raises(ValueError, match=r"watches one number a record, got shape \[3\]: pass .* as x\.reshape"):
        detector.update([0.5, 0.25, 0.5])
    with pytest.raises(ValueError, match=r"got shape \[8, 2\]"):
        PageHinkley(**SMALL).update(torch.zeros(8, 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        detector.update(math.nan)
    assert detector.n_seen == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PageHinkley(0), "arl must be positive, got 0"),
        (
            lambda: PageHinkley(300, block_size=50, reference_size=2_500),
            "arl must be at least 500 with block_size=50, got 300",
        ),
        (lambda: PageHinkley(reference_size=40), "reference of 40 records is too small .* at least 50"),
        (lambda: ADWIN(reference_size=512, block_size=32), "reference_size must be at least 1600"),
        (lambda: PageHinkley(delta=-1), "delta must be 0 or more, .* got -1"),
        (lambda: ADWIN(clock=0), "clock must be positive, got 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_river(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "river.drift", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "evertune\[drift\]"'):
        PageHinkley()
