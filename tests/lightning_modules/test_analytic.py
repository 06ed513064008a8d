"""Heads without training: equal to closed-form oracles, for any order, any parts and any number of ranks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.lightning_modules import AnalyticClassificationModule, AnalyticHead
from evertune.streams import Experience, ExperienceDataModule
from tests.helpers.lightning_modules import TEXTS, loader, tiny_bert

METHODS = {
    "ncm": {"solver": "mean"},
    "slda": {"solver": "lda"},
    "ranpac": {"features": "relu", "solver": "ridge", "n_features": 64},
    "klda": {"features": "rff", "solver": "lda", "n_features": 64},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (120,), generator=generator)
    centres = torch.randn(4, 6, generator=generator)
    return centres[targets] + 0.7 * torch.randn(120, 6, generator=generator), targets


def solved(features, targets, /, n_classes=4, **settings):
    head = AnalyticHead(features.shape[1], n_classes, **settings)
    head.update(features, targets)
    head.solve()
    return head


# --- oracles, in float64


def test_lda_is_that_of_scikit_learn(data):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features, targets = data
    x, y = F.normalize(features, dim=-1).double().numpy(), targets.numpy()
    head = solved(features, targets, shrinkage=0.3)
    priors = np.bincount(y) / len(y)  # also the weights of the classes in the covariance
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3, priors=priors).fit(x, y)
    ratio = head.weight.double().numpy() / oracle.coef_  # the logits are scaled
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    np.testing.assert_allclose(
        head.bias.double().numpy(), ratio[0, 0] * (oracle.intercept_ - np.log(priors)), rtol=1e-6
    )


def test_mean_is_the_nearest_centroid_of_scikit_learn(data):
    from sklearn.neighbors import NearestCentroid

    features, targets = data
    x = F.normalize(features, dim=-1).double().numpy()
    oracle = NearestCentroid().fit(x, targets.numpy())
    head = solved(features, targets, solver="mean")
    assert (head(features).argmax(1).numpy() == oracle.predict(x)).all()
    ratio = head.weight.double().numpy() / oracle.centroids_
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)


@pytest.mark.parametrize("features_", ["identity", "relu"])
def test_ridge_is_that_of_scikit_learn(data, features_):
    from sklearn.linear_model import Ridge

    features, targets = data
    head = solved(features, targets, solver="ridge", penalty=0.5, features=features_, n_features=16)
    x, y = head.map(features).double().numpy(), F.one_hot(targets).double().numpy()
    oracle = Ridge(alpha=0.5, solver="cholesky").fit(x, y)
    ratio = head.weight.double().numpy() / oracle.coef_
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    np.testing.assert_allclose(head.bias.double().numpy() / oracle.intercept_, ratio[0, 0], rtol=1e-5)


def test_the_penalty_has_the_least_cross_validation_error(data):
    features, targets = data
    x, y = F.normalize(features, dim=-1).double(), F.one_hot(targets).double()
    x, y = x - x.mean(0), y - y.mean(0)

    def error(penalty):  # Golub, Heath & Wahba, with the hat matrix
        hat = x @ torch.linalg.solve(x.T @ x + penalty * torch.eye(6, dtype=torch.float64), x.T) + 1 / len(x)
        return (y - hat @ y).square().sum() / (len(x) - hat.trace()) ** 2

    head = solved(features, targets, solver="ridge")
    grid = (x.square().sum() / 6 * 10.0 ** torch.arange(-8, 3, 0.25, dtype=torch.float64)).tolist()
    best = min(grid, key=error)
    assert grid.index(best) not in (0, len(grid) - 1)
    torch.testing.assert_close(head.weight, solved(features, targets, solver="ridge", penalty=best).weight)


def test_random_fourier_features_approximate_the_kernel(data):
    features = F.normalize(data[0], dim=-1)
    mapped = AnalyticHead(6, 2, features="rff", n_features=20_000, bandwidth=0.7).map(features)
    kernel = torch.exp(-torch.cdist(features, features).square() / (2 * 0.7**2))
    torch.testing.assert_close(mapped @ mapped.T, kernel, atol=0.05, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_are_about_right(method):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 20, generator=generator)
    targets = torch.randint(0, 8, (2_000,), generator=generator)
    tails = torch.rand(2_000, 1, generator=generator).reciprocal().sqrt()  # heavier than those of a Gaussian
    features = centres[targets] + 0.3 * tails * torch.randn(2_000, 20, generator=generator)
    head = solved(features[:400], targets[:400], n_classes=8, **METHODS[method])
    sure, answers = head(features[400:]).softmax(-1).max(-1)
    right = (answers == targets[400:]).float().mean().item()
    assert 0.5 < right < 0.999
    assert sure.mean().item() == pytest.approx(right, abs=0.15)


# --- any order, any parts


@pytest.mark.parametrize("method", METHODS)
def test_order_and_parts_do_not_matter(data, method):
    features, targets = data
    settings = METHODS[method]
    expected = solved(features, targets, **settings)(features)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    parts = AnalyticHead(6, 4, **settings)
    for part in order.split(13):
        parts.update(features[part], targets[part])
    parts.solve()
    torch.testing.assert_close(parts(features), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_grows_ends_as_one_that_knew_all_classes(data, method):
    features, targets = data
    settings = METHODS[method]
    head = AnalyticHead(6, 2, **settings)
    first = targets < 2
    head.update(features[first], targets[first])
    head.solve()
    before = head.weight.clone(), head.bias.clone()
    head.grow(4)
    assert torch.equal(head.weight[:2], before[0])
    assert torch.equal(head.bias[:2], before[1])
    assert (head(features).argmax(1) < 2).all()  # a class without examples is never the answer
    head.update(features[~first], targets[~first])
    head.solve()
    torch.testing.assert_close(head(features), solved(features, targets, **settings)(features), rtol=1e-6, atol=1e-5)


def test_several_labels(data):
    features, targets = data
    several = F.one_hot(targets, 4) + F.one_hot((targets + 1) % 4, 4)
    head = solved(features, several, solver="ridge", multi_label=True)
    assert ((head(features) > 0) == several.bool()).float().mean() > 0.8
    one = solved(features, targets, solver="ridge")
    other = solved(features, F.one_hot(targets, 4), solver="ridge")
    torch.testing.assert_close(one(features), other(features), rtol=0, atol=0)


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_few_examples(settings):
    head = AnalyticHead(6, 3, **settings)
    features = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(features), torch.zeros(2, 3))  # nothing is known
    head.update(features[:1], torch.tensor([1]))
    head.solve()
    assert head(features).isfinite().all()
    assert head(features).argmax(1).tolist() == [1, 1]
    head.update(features[1:], torch.tensor([0]))
    head.solve()
    assert head(features).argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize(
    "settings", [{"solver": "mean"}, {"solver": "lda"}, {"solver": "ridge", "penalty": 1.0}], ids=str
)
def test_classes_that_look_the_same_are_equally_likely(settings):
    labels = torch.arange(5).repeat(8)
    for seed in range(20):  # which of the logits is the largest is left to rounding
        torch.manual_seed(seed)
        features = torch.randn(1, 32).expand(40, 32)
        head = AnalyticHead(32, 5, **settings)
        head.update(features, labels)
        head.solve()
        torch.testing.assert_close(head(features[:1]).softmax(1), torch.full((1, 5), 0.2))


def test_the_sums_keep_their_precision(data):
    head = solved(*data)
    before = head.state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(data[0]).dtype == torch.float32
    torch.nn.Sequential(head).bfloat16()
    after = head.state_dict()
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not list(head.parameters())


def test_the_state_holds_everything(data):
    head, other = solved(*data), AnalyticHead(6, 4)
    other.load_state_dict(copy.deepcopy(head.state_dict()))
    assert torch.equal(other(data[0]), head(data[0]))
    other.solve()
    assert torch.equal(other(data[0]), head(data[0]))
    with pytest.raises(RuntimeError, match=r"counts has the shape \[4\], this head \[5\]"):
        AnalyticHead(6, 5).load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*moment"):
        other.load_state_dict({"weight": head.weight, "bias": head.bias})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "tanh"}, "features must be one of .*got 'tanh'"),
        ({"solver": "svm"}, "solver must be one of .*got 'svm'"),
        ({"n_features": 0}, "n_features must be positive, got 0"),
        ({"shrinkage": 1.5}, r"shrinkage must be in \[0, 1\], got 1.5"),
        ({"shrinkage": 0.5, "solver": "ridge"}, "shrinkage=0.5 has no effect with solver='ridge'"),
        ({"penalty": 0, "solver": "ridge"}, "penalty must be positive, got 0"),
        ({"penalty": 1.0}, "penalty=1.0 has no effect with solver='lda'"),
        ({"bandwidth": -1}, "bandwidth must be positive, got -1"),
        ({"multi_label": True}, "multi_label=True needs solver='ridge', got 'lda'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AnalyticClassificationModule("model", **settings)


# --- the module


def trainer(**settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"max_epochs": 3, "accelerator": "cpu", "enable_checkpointing": False}
    return pl.Trainer(**{**quiet, **defaults, **settings})


def datamodule(module, classes, repeat=1, **settings):
    rows = [{"text": text, "label": name} for name in classes for text in TEXTS[name]] * repeat
    experience = Experience("-".join(classes), rows, rows, rows, classes=classes)
    return ExperienceDataModule(experience, module.tokenizer, task=module.task, batch_size=2, **settings)


def fitted(model, *experiences, **settings):
    module = AnalyticClassificationModule(model, **settings)
    for classes in experiences:
        trainer().fit(module, datamodule(module, classes))
    return module


def logits(module):
    texts = [text for name in TEXTS for text in TEXTS[name]]
    with torch.inference_mode():
        found = module.eval()(**module.tokenizer(texts, padding=True, return_tensors="pt")).logits
    return found[:, [module.classes.index(name) for name in TEXTS]]


@pytest.mark.parametrize("method", METHODS)
def test_any_order_of_experiences(model, method):
    settings = METHODS[method]
    together = fitted(model, list(TEXTS), **settings)
    assert together.head.statistics.counts.tolist() == [3, 3, 3]  # three epochs, and each example once
    one_way = fitted(model, ["business", "sport"], ["politics"], **settings)
    other_way = fitted(model, ["politics"], ["sport"], ["business"], **settings)
    torch.testing.assert_close(logits(one_way), logits(together), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(logits(other_way), logits(together), rtol=1e-6, atol=1e-4)


def test_the_encoder_is_frozen(model):
    module = fitted(model, ["business", "sport"])
    fresh = AnalyticClassificationModule(model, classes=["business"])
    fresh.configure_model()
    for name, value in fresh.backbone.state_dict().items():
        assert torch.equal(value, module.backbone.state_dict()[name])
    assert [name for name, value in module.named_parameters() if value.requires_grad] == ["idle.weight"]
    assert torch.equal(module.idle.weight, torch.zeros(1))


def test_what_is_replayed_is_not_counted_again(model):
    module = AnalyticClassificationModule(model)
    replay = Replay(memory_size=4)
    for classes in (["business"], ["sport"]):
        trainer(callbacks=[replay]).fit(module, datamodule(module, classes))
    assert module.head.statistics.counts.tolist() == [3, 3]
    assert len(replay.memory) == 4


def test_methods_on_weights_are_refused(model):
    module = AnalyticClassificationModule(model)
    with pytest.raises(ValueError, match=r"EWC acts on a loss or on weights .* remove it from the callbacks"):
        trainer(callbacks=[EWC(ewc_lambda=1.0)]).fit(module, datamodule(module, ["business"]))


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise RuntimeError("out of luck")


def test_a_fit_that_fails_leaves_the_head_as_it_was(model):
    module = fitted(model, ["business", "sport"])
    before = {name: value.clone() for name, value in module.head.state_dict().items()}
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(callbacks=[Fails()]).fit(module, datamodule(module, ["sport"]))
    assert all(torch.equal(value, before[name]) for name, value in module.head.state_dict().items())
    trainer(fast_dev_run=True).fit(module, datamodule(module, ["sport"]))
    assert all(torch.equal(value, before[name]) for name, value in module.head.state_dict().items())
    trainer().fit(module, datamodule(module, ["sport"]))
    assert module.head.statistics.counts.tolist() == [3, 6]


def test_a_fit_that_resumes_counts_nothing_twice(model, tmp_path):
    expected = fitted(model, ["business"], ["sport", "politics"])
    module = fitted(model, ["business"])
    stop = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(callbacks=[stop, Fails()], enable_checkpointing=True).fit(
            module, datamodule(module, ["sport", "politics"])
        )
    (path,) = tmp_path.glob("*.ckpt")
    resumed = fitted(model, ["business"])
    trainer().fit(resumed, datamodule(resumed, ["sport", "politics"]), ckpt_path=path, weights_only=False)
    assert resumed.head.statistics.counts.tolist() == [3, 3, 3]
    torch.testing.assert_close(logits(resumed), logits(expected), rtol=0, atol=0)
    other = fitted(model, ["business"])
    with pytest.raises(
        ValueError, match=r"was written in the middle of a fit of other data \(6 examples, this fit has 3\)"
    ):
        trainer().fit(other, datamodule(other, ["sport"]), ckpt_path=path, weights_only=False)
    loaded = AnalyticClassificationModule.load_from_checkpoint(path, weights_only=False)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=0, atol=0)


def test_the_checkpoint_of_a_whole_fit_can_start_the_next(model, tmp_path):
    module = AnalyticClassificationModule(model, classes=["business", "sport"])
    last = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer(callbacks=[last], enable_checkpointing=True).fit(module, datamodule(module, ["business"]))
    for classes, counts in ((["business"], [3, 0]), (["sport"], [3, 3])):  # the same data, then other data
        resumed = AnalyticClassificationModule(model, classes=["business", "sport"])
        path = tmp_path / "last.ckpt"
        trainer().fit(resumed, datamodule(resumed, classes), ckpt_path=path, weights_only=False)
        assert resumed.head.statistics.counts.tolist() == counts


def test_limited_batches(model):
    module = AnalyticClassificationModule(model)
    trainer(limit_train_batches=2).fit(module, datamodule(module, list(TEXTS)))
    assert module.head.statistics.n.tolist() == [4]
    assert (module.head.statistics.counts > 0).all()  # spread over the data, which is sorted by class


def test_an_iterable_dataset_is_refused(model):
    class Texts(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(loader(model, ["business"]))

    module = AnalyticClassificationModule(model, classes=["business"])
    with pytest.raises(ValueError, match="reads every training example once, by index, and cannot do so with Texts"):
        trainer().fit(module, torch.utils.data.DataLoader(Texts(), batch_size=None))


@pytest.mark.parametrize("method", METHODS)
def test_round_trip_of_a_folder(model, tmp_path, method):
    module = fitted(model, ["business", "sport"], **METHODS[method])
    module.save_pretrained(tmp_path / "saved")
    loaded = AnalyticClassificationModule.from_pretrained(tmp_path / "saved")
    texts = ["the bank share", "a goal"]
    assert loaded.predict(texts) == module.predict(texts)
    for one in (module, loaded):
        trainer().fit(one, datamodule(one, ["politics"]))
    torch.testing.assert_close(logits(loaded), logits(module), rtol=0, atol=0)
    lazy = AnalyticClassificationModule.from_pretrained(tmp_path / "saved", lazy=True)
    trainer().fit(lazy, datamodule(lazy, ["politics"]))
    torch.testing.assert_close(logits(lazy), logits(module), rtol=0, atol=0)
    assert "learning_rate" not in module.hparams


def test_accuracy_is_logged(model):
    module = AnalyticClassificationModule(model)
    fit = trainer()
    fit.fit(module, datamodule(module, list(TEXTS)))
    assert fit.callback_metrics["val_accuracy"] > 0.8
