"""Detectors and featurisers: exact detection indices, bad input refused, nothing trained is looked at."""

import copy
import io
import math
from functools import partial

import pytest
import torch
from torch import nn

from evertune.drift import MMD, FrozenEncoder, HashedNgrams, check_frozen
from evertune.drift.featurisers import SentenceEncoder

SMALL = {"arl": 2_000, "reference_size": 128, "window_size": 16}


def stream(change_at, n, shift=1.0, n_features=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    records = torch.randn(n, n_features, generator=generator)
    records[change_at:] += shift
    return records


def alarms(detector, records, cut=1):
    """The record numbers of the alarms, with a reset after each."""
    found, start = [], 0
    for batch in records.split(cut):
        detector.update(batch)
        if detector.drift_detected:
            found.append(start + detector.detected_at - 1)
            start += detector.n_seen
            detector.reset()
    return found


@pytest.mark.parametrize(("shift", "expected"), [(1.0, [511]), (0.5, [543]), (0.0, [])])
def test_exact_detection_index(shift, expected):
    assert alarms(MMD(**SMALL), stream(500, 800, shift)) == expected


def test_change_of_spread_alone_is_found():
    records = stream(400, 700, shift=0.0)
    records[400:] *= 2
    assert alarms(MMD(**SMALL), records) == [415]


def test_every_change_of_a_stream_is_found_once():
    records = torch.cat([stream(0, 400, shift, seed=seed) for seed, shift in enumerate((0.0, 1.0, -1.0))])
    assert alarms(MMD(**SMALL), records) == [415, 815]


@pytest.mark.parametrize("cut", [7, 16, 50, 800])
def test_the_cut_into_batches_does_not_matter(cut):
    detector = MMD(**SMALL)
    for batch in stream(500, 800).split(cut):
        detector.update(batch)
        if detector.drift_detected:
            break
    assert detector.detected_at == 512


@pytest.mark.parametrize("stop", [50, 128, 300, 505])
def test_restart_in_mid_stream_changes_no_index(stop):
    records = stream(500, 600)
    undisturbed, first = MMD(**SMALL), MMD(**SMALL)
    undisturbed.update(records[:stop])
    first.update(records[:stop])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = MMD(**SMALL)
    second.load_state_dict(torch.load(file, weights_only=True))
    for record in records[stop:]:
        undisturbed.update(record)
        second.update(record)
        assert undisturbed.drift_detected == second.drift_detected
        assert undisturbed.score == second.score or math.isnan(second.score)
        if second.drift_detected:
            break
    assert second.detected_at == undisturbed.detected_at == 512


def test_state_of_other_settings_is_refused():
    with pytest.raises(ValueError, match="saved with window_size=16, this has 32"):
        MMD(**SMALL | {"window_size": 32}).load_state_dict(MMD(**SMALL).state_dict())


def run_lengths(detector_of, records_of, n_runs, limit):
    lengths = []
    for seed in range(n_runs):
        detector, generator = detector_of(seed), torch.Generator().manual_seed(seed)
        while not detector.drift_detected and detector.n_seen < limit:
            detector.update(records_of(64, generator))
        lengths.append((detector.detected_at or limit) - detector.reference_size)
    return torch.tensor(lengths).float()


def test_false_alarm_rate_is_the_one_asked_for():
    lengths = run_lengths(
        lambda seed: MMD(arl=500, reference_size=256, window_size=16, seed=seed),
        lambda n, generator: torch.randn(n, 8, generator=generator),
        n_runs=150,
        limit=20_000,
    )
    # The standard error of the mean of 150 geometric run lengths is 8%.
    assert 0.8 * 500 < lengths.mean() < 1.4 * 500


def test_blocks_keep_the_rate_on_records_that_come_in_groups():
    def grouped(n, generator):  # records of a group of 8 share half their variance
        groups = torch.randn(n // 8, 1, 8, generator=generator).expand(-1, 8, -1).reshape(n, 8)
        return groups + torch.randn(n, 8, generator=generator)

    def mean_length(block_size):
        settings = {"arl": 500, "reference_size": 512, "window_size": 32, "block_size": block_size}
        return run_lengths(lambda seed: MMD(seed=seed, **settings), grouped, n_runs=60, limit=5_000).mean()

    assert mean_length(1) < 100  # alarms five times too often
    assert mean_length(32) > 350  # blocks start anywhere: one as long as a group would hold parts of two


def test_p_value_threshold_and_score_agree():
    detector = MMD(**SMALL)
    assert math.isnan(detector.score)
    assert math.isnan(detector.threshold)
    detector.update(stream(500, 140))
    assert detector.armed
    assert detector.n_tests == 0
    for batch in stream(500, 640)[140:].split(4):
        detector.update(batch)
        if detector.n_tests:
            assert detector.drift_detected == (detector.score > detector.threshold and detector.n_seen % 16 == 0)
            assert (detector.p_value <= detector.level) == (detector.score > detector.threshold)
    assert 0 < detector.p_value < detector.level


def test_memory_is_bounded():
    detector = MMD(**SMALL)
    detector.update(stream(0, 200))
    size = {name: value.numel() for name, value in detector.state_dict().items() if isinstance(value, torch.Tensor)}
    detector.update(stream(0, 5_000))
    assert size == {
        name: value.numel() for name, value in detector.state_dict().items() if isinstance(value, torch.Tensor)
    }


def test_constant_features_arm_and_detect():
    assert alarms(MMD(**SMALL), torch.cat([torch.ones(200, 3), torch.zeros(50, 3)])) == [207]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.empty(0, 6), r"nothing to look at: the batch of features has shape \[0, 6\]"),
        (torch.empty(0), r"nothing to look at"),
        (torch.zeros(2, 5), "number of features changed from 6 to 5"),
        (torch.tensor([[0.0] * 6, [math.nan] * 6]), "1 of 2 records have NaN or infinite features, first: 1"),
        (torch.full((3, 6), math.inf), "3 of 3 records have NaN or infinite"),
        (torch.zeros(2, 3, 6), r"or \[records, n_features\], got \[2, 3, 6\]"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(bad, message):
    detector = MMD(**SMALL)
    detector.update(stream(0, 150))
    before = detector.state_dict()
    with pytest.raises(ValueError, match=message):
        detector.update(bad)
    after = detector.state_dict()
    assert all(torch.equal(after[k], v) if isinstance(v, torch.Tensor) else True for k, v in before.items())
    assert after["n_seen"] == before["n_seen"] == 150


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference_size": 100, "window_size": 32}, "reference_size must be at least 128"),
        ({"reference_size": 128, "window_size": 32, "block_size": 32}, "reference_size must be at least 9984"),
        ({"reference_size": 130, "block_size": 4}, "block_size must divide"),
        ({"arl": 20, "window_size": 32}, "arl must be above window_size=32"),
        ({"arl": -1}, "got -1"),
        ({"window_size": 0}, "window_size must be positive, got 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        MMD(**settings)


def test_numbers_lists_and_arrays_are_records_too():
    detector = MMD(**SMALL)
    detector.update(0.5)
    detector.update([[1.0], [2.0]])
    detector.update(torch.tensor([3.0]).numpy())
    assert detector.n_seen == 4
    assert detector.n_features == 1


def test_ngrams_do_not_see_padding():
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    features = HashedNgrams(128)({"input_ids": ids, "attention_mask": mask, "labels": ["a", "b"]})
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], HashedNgrams(128)(ids[:1, :3])[0])
    assert torch.allclose(features.norm(dim=1), torch.ones(2))
    assert not torch.equal(features[0], HashedNgrams(128, seed=1)(ids[:1, :3])[0])


def test_ngrams_see_the_order_of_tokens():
    one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 1]])
    assert torch.equal(HashedNgrams(max_order=1)(one), HashedNgrams(max_order=1)(other))
    assert not torch.equal(HashedNgrams(max_order=2)(one), HashedNgrams(max_order=2)(other))


def test_ngrams_of_different_words_are_nearly_orthogonal():
    features = HashedNgrams(256)(torch.arange(200 * 10).reshape(200, 10))
    cosine = features @ features.T - torch.eye(200)
    assert cosine.mean().abs() < 0.01
    assert cosine.std() == pytest.approx(1 / 16, rel=0.2)


def test_ngrams_of_strings():
    features = HashedNgrams(64, key="text")({"text": ["The cat", "the cat", ""]})
    assert torch.equal(features[0], features[1])
    assert features[2].abs().sum() == 0
    with pytest.raises(TypeError, match=r"under 'input_ids', got a batch of \['image'\]"):
        HashedNgrams()({"image": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="n_features must be positive, got 0"):
        HashedNgrams(0)


def test_featurisers_that_learn_are_refused():
    module = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    body = module["body"]

    class Features:
        def __init__(self, net):
            self.net = net

        def __call__(self, batch):
            return self.net(batch)

        def compute(self, batch):
            return self.net(batch)

    def by_default(batch, net=body):
        return net(batch)

    learning = [body, lambda x: body(x).relu(), Features(body), Features(body).compute, partial(by_default), by_default]
    learning += [body.forward, partial(lambda net, x: net(x), body), nn.Sequential(body)]
    for featuriser in learning:
        with pytest.raises(ValueError, match=r"weights that are being trained \(body.weight\)"):
            check_frozen(featuriser, module)
    frozen = copy.deepcopy(body)
    for featuriser in (frozen, lambda x: frozen(x).relu(), Features(frozen), HashedNgrams(), lambda x: x.flatten(1)):
        check_frozen(featuriser, module)
    body.requires_grad_(False)
    check_frozen(body, module)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "fish"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def test_frozen_encoder(encoder_folder):
    featuriser = FrozenEncoder(encoder_folder)
    assert not any(value.requires_grad for value in featuriser.model.parameters())
    texts = ["red fish", "green green fish"]
    from_texts = featuriser({"text": texts})
    tokens = featuriser.tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")
    assert from_texts.shape == (2, 16)
    assert not from_texts.requires_grad
    torch.testing.assert_close(featuriser({**tokens, "labels": ["a", "b"]}), from_texts)
    torch.testing.assert_close(featuriser(texts), from_texts)
    with pytest.raises(TypeError, match="FrozenEncoder needs strings"):
        featuriser(torch.zeros(2, 3))


def test_pooling_and_length_of_a_frozen_encoder(encoder_folder):
    texts = ["red fish", "green green fish"]
    mean, first = (FrozenEncoder(encoder_folder, pooling=pooling) for pooling in ("mean", "cls"))
    tokens = first.tokenizer(texts, padding=True, return_tensors="pt")
    hidden = first.model(**tokens).last_hidden_state
    torch.testing.assert_close(first(texts), hidden[:, 0])
    torch.testing.assert_close(mean(texts)[0], hidden[0, :4].mean(0))  # the padding left out
    sentences = SentenceEncoder(encoder_folder)(texts)
    torch.testing.assert_close(sentences, nn.functional.normalize(mean(texts)))
    with pytest.raises(ValueError, match="pooling must be mean or cls, got 'max'"):
        FrozenEncoder(encoder_folder, pooling="max")


@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_records_that_are_all_alike_but_for_rounding_raise_no_alarm(value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    detector = MMD(arl=1_000, reference_size=200)
    detector.update(torch.full((200, 8), value))
    detector.update(torch.full((640, 8), value) * (1 + 1e-7 * torch.rand(640, 8, generator=generator)))
    assert detector.n_tests == 20
    assert not detector.drift_detected
    detector.update(torch.full((64, 8), 2 * value + 1))
    assert detector.drift_detected
