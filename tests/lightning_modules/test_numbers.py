"""Regression and classes with an order: the formulas, what is logged, on one process and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.export.formats import merged
from evertune.export.graph import traced
from evertune.lightning_modules import OrdinalClassificationModule, OrdinalHead, SequenceRegressionModule
from evertune.tasks import RegressionTask
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.lightning_modules.test_modules import batch_of, trainer

EXAMPLES = [text for texts in TEXTS.values() for text in texts]  # nine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("model"))


def batches(module: Any, labels: list[Any], batch_size: int = 9) -> DataLoader[Any]:
    def collate(examples: list[tuple[str, Any]]) -> dict[str, Any]:
        texts, found = zip(*examples, strict=True)
        return {**module.tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": list(found)}

    return DataLoader(list(zip(EXAMPLES, labels, strict=True)), batch_size=batch_size, collate_fn=collate)


# --- classes with an order


def test_the_probabilities_are_differences_of_sigmoids() -> None:
    torch.manual_seed(0)
    head, features = OrdinalHead(5, 4), 3 * torch.randn(7, 5)
    torch.nn.init.normal_(head.weight)
    with torch.no_grad():
        head.steps.copy_(torch.tensor([-0.5, 0.3, -2.0]))
    score = features @ head.weight.T
    thresholds = torch.tensor([-0.5, -0.5 + 1.3499 + 1e-3, 0]).double()
    thresholds[1] = -0.5 + torch.nn.functional.softplus(torch.tensor(0.3)) + 1e-3
    thresholds[2] = thresholds[1] + torch.nn.functional.softplus(torch.tensor(-2.0)) + 1e-3
    at_most = torch.cat([(thresholds - score.double()).sigmoid(), torch.ones(7, 1).double()], 1)
    expected = torch.cat([at_most[:, :1], at_most.diff(dim=1)], 1)
    torch.testing.assert_close(head(features).exp().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_all_classes_are_equally_likely_at_first(n_classes: int) -> None:
    probabilities = OrdinalHead(3, n_classes)(torch.zeros(2, 3)).exp()
    torch.testing.assert_close(probabilities, torch.full((2, n_classes), 1 / n_classes), rtol=0.0, atol=2e-3)


def test_far_scores_have_finite_log_probabilities_and_gradients() -> None:
    head = OrdinalHead(1, 5)
    torch.nn.init.ones_(head.weight)
    logs = head(torch.tensor([[-1e4], [1e4]]))
    assert logs.isfinite().all() and logs.argmax(1).tolist() == [0, 4]
    logs[:, 2].sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in head.parameters())


def test_an_order_is_learned_and_reported(model: str, tmp_path: Path) -> None:
    pl.seed_everything(0)
    names = ["low", "middle", "high"]
    module = OrdinalClassificationModule(model, classes=names, learning_rate=5e-3, dropout=0.0)
    labels = [names[len(text) % 3] for text in EXAMPLES]
    trainer(max_epochs=25).fit(module, batches(module, labels, 3))
    found = trainer().validate(module, batches(module, labels, 4), verbose=False)[0]
    ranks = [names.index(next(iter(answer))) for answer in module.predict(EXAMPLES)]
    truth = [names.index(label) for label in labels]
    assert found["val_accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(ranks, truth, strict=True)]))
    assert found["val_accuracy"] > 0.8
    assert found["val_mae"] == pytest.approx(np.abs(np.subtract(ranks, truth)).mean())
    table = np.zeros((3, 3))
    np.add.at(table, (ranks, truth), 1)
    weight = np.subtract.outer(range(3), range(3)) ** 2
    chance = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert found["val_kappa"] == pytest.approx(1 - (weight * table).sum() / (weight * chance).sum(), abs=1e-5)

    module.save_pretrained(tmp_path)
    exported = merged(tmp_path)
    batch = batch_of(exported, EXAMPLES)
    program = traced(exported).module()
    torch.testing.assert_close(
        program(*(batch[name] for name in exported.tokenizer.model_input_names)), exported(**batch).logits
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["a"]}, r"classes must be at least two, lowest first, got \['a'\]"),
        ({"classes": ["a", "b"], "multi_label": True}, "multi_label=True is not for classes with an order"),
        ({"classes": ["a", "b"], "head": "cosine"}, "head='cosine' is not for classes with an order"),
        ({"classes": ["a", "b"], "n_classes_ahead": 4}, "n_classes_ahead=4 is not for classes with an order"),
    ],
)
def test_what_has_no_order_is_refused(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrdinalClassificationModule(model, **settings)


def test_no_class_comes_later(model: str) -> None:
    module = OrdinalClassificationModule(model, classes=["a", "b"])
    module.add_classes(["b"])
    with pytest.raises(ValueError, match=r"have an order, in which \['c'\] have no place"):
        module.add_classes(["a", "c"])


# --- numbers


def regression(model: str, **settings: Any) -> SequenceRegressionModule:
    torch.manual_seed(0)
    return SequenceRegressionModule(model, dropout=0.0, learning_rate=5e-3, **settings)


def test_numbers_are_learned_and_reported(model: str) -> None:
    labels = [float(len(text)) for text in EXAMPLES]
    module = regression(model, mean=float(np.mean(labels)), scale=float(np.std(labels)))
    trainer(max_epochs=30).fit(module, batches(module, labels, 3))
    found = trainer().validate(module, batches(module, labels, 4), verbose=False)[0]
    said = module.predict(EXAMPLES)
    assert found["val_mae"] == pytest.approx(np.abs(np.subtract(said, labels)).mean(), rel=1e-4)
    assert found["val_rmse"] == pytest.approx(np.sqrt(np.square(np.subtract(said, labels)).mean()), rel=1e-4)
    assert found["val_pearson"] == pytest.approx(pearsonr(said, labels).statistic, abs=1e-4)
    assert found["val_spearman"] == pytest.approx(spearmanr(said, labels).statistic, abs=1e-4)
    assert found["val_pearson"] > 0.9


def test_the_unit_of_the_labels_does_not_matter(model: str) -> None:
    labels = [float(len(text)) for text in EXAMPLES]
    small, large = regression(model, mean=12.0, scale=8.0), regression(model, mean=12e3 + 5, scale=8e3)
    trainer(max_epochs=2).fit(small, batches(small, labels))
    trainer(max_epochs=2).fit(large, batches(large, [1e3 * label + 5 for label in labels]))
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, large.state_dict()[name], rtol=1e-4, atol=1e-5)
    scaled = [1e3 * one + 5 for one in small.predict(EXAMPLES)]
    assert large.predict(EXAMPLES) == pytest.approx(scaled, rel=1e-3)


def test_several_numbers(model: str) -> None:
    module = regression(model, n_targets=2, mean=[1.0, -1.0], scale=3.0)
    assert module.encode_labels([[4.0, -1.0], [1.0, 2.0]]).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert module.numbers(torch.tensor([[1.0, 0.0]])).tolist() == [[4.0, -1.0]]
    labels = [[float(len(text)), 1.0 * text.count("a")] for text in EXAMPLES]
    found = trainer()
    found.fit(module, batches(module, labels), batches(module, labels))
    said = np.array(module.predict(EXAMPLES))
    assert float(found.callback_metrics["val_mae"]) == pytest.approx(np.abs(said - labels).mean(), rel=1e-3)
    with pytest.raises(ValueError, match=r"labels must be of shape \[batch, 2\], got \[1, 1\]"):
        module.encode_labels([1.0])


def test_the_score_is_one_half_at_an_error_of_one_scale(model: str) -> None:
    module = regression(model, mean=1.0, scale=4.0)
    module.configure_model()
    said = module.eval().predict(EXAMPLES[:2])
    batch = next(iter(batches(module, [said[0], said[1] + 4.0, *[0.0] * 7])))
    scores = module.task.score(module, module.on_before_batch_transfer(batch, 0))
    assert scores[:2].tolist() == pytest.approx([1.0, 0.5], abs=1e-4)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("good", "the label 'good' is not a number"),
        (True, "the label True is not a number"),
        ([1.0], r"the label \[1.0\] is not a number"),
        ("", "the label '' is not a number"),
        (None, "no label, or a number that is not finite"),
        (float("nan"), "no label, or a number that is not finite"),
        ("nan", "the label 'nan' is not a finite number"),
        (float("-inf"), "the label -inf is not a finite number"),
        (10**400, "is not a number"),
    ],
)
def test_labels_that_are_not_numbers(label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegressionTask().check_label(label)


def test_numbers_of_other_libraries() -> None:
    assert RegressionTask().check_label(np.float32(2.5)) == 2.5
    assert RegressionTask().check_label(torch.tensor(2.5)) == 2.5
    assert RegressionTask(2).check_label(np.array([1, 2])) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_targets": 0}, "n_targets must be positive, got 0"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        (
            {"n_targets": 2, "mean": [1.0]},
            r"mean must be a finite number, or a list of n_targets=2 of them, got \[1.0\]",
        ),
        ({"mean": float("nan")}, "mean must be a finite number"),
    ],
)
def test_bad_settings_are_named(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceRegressionModule(model, **settings)


# --- two ranks


def learn(folder: str, devices: int) -> dict[str, Any]:
    """Learn nine texts with both modules, and what a validation in other batches says."""
    found: dict[str, Any] = {}
    numbers = [float(len(text)) for text in EXAMPLES] + [3.0]
    for module, labels in (
        (SequenceRegressionModule(folder, dropout=0.0, mean=12.0, scale=8.0, learning_rate=1e-3), numbers),
        (
            OrdinalClassificationModule(folder, dropout=0.0, classes=["0", "1", "2"], learning_rate=1e-3),
            [str(int(number) % 3) for number in numbers],
        ),
    ):
        texts = [*EXAMPLES, "a law of the bank"]

        def collate(examples: list[tuple[str, Any]], module: Any = module) -> dict[str, Any]:
            some, known = zip(*examples, strict=True)
            return {**module.tokenizer(list(some), padding=True, return_tensors="pt"), "labels": list(known)}

        data = list(zip(texts, labels, strict=True))
        settings = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
        pl.seed_everything(0)
        trainer(max_epochs=3, **settings).fit(module, DataLoader(data, 10 // devices, collate_fn=collate))
        scores = trainer(**settings).validate(
            module, DataLoader(data, 10 // devices, collate_fn=collate), verbose=False
        )
        found |= {f"{type(module).__name__} {name}": value for name, value in scores[0].items()}
    return found


def test_two_ranks_learn_and_report_what_one_process_does(model: str) -> None:
    torch.manual_seed(0)
    expected = learn(model, 1)
    assert len(expected) == 5 + 4
    for found in run_ranks(f"{__name__}:learn", 2, folder=model, devices=2):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
