"""Focal loss and weights of classes: the formulas, what they count, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import MIR, LogitAdjustment, Replay
from evertune.lightning_modules import SequenceClassificationModule
from evertune.lightning_modules.imbalance import balanced_weights, weighted_losses
from evertune.streams import Experience, ExperienceDataModule
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import TEXTS, loader, tiny_bert
from tests.lightning_modules.test_modules import build, trainer

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.5, -2.0]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("model"))


class Sums(pl.Callback):
    """Notes the weights of the classes in each fit."""

    def __init__(self) -> None:
        self.weights: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.weights.append([] if pl_module._weights is None else pl_module._weights.tolist())


def learn(module: Any, counts: dict[str, int], *callbacks: pl.Callback, devices: int = 1, **settings: Any) -> None:
    """One fit on so many texts of each class."""
    names = [name for name, count in counts.items() for _ in range(count)]
    rows = [{"text": TEXTS[name][number % 3], "label": name} for number, name in enumerate(names)]
    data = ExperienceDataModule(
        Experience("one", rows, classes=list(counts)), module.tokenizer, task=module.task, batch_size=4 // devices
    )
    trainer(callbacks=list(callbacks), devices=devices, **settings).fit(module, data)


# --- the formulas


def test_focal_loss_of_one_label() -> None:
    targets, weights = torch.tensor([0, 2, 1]), torch.tensor([0.5, 2.0, 4.0])
    p = LOGITS.softmax(-1)[torch.arange(3), targets]
    expected = weights[targets] * (1 - p) ** 1.5 * -p.log()
    torch.testing.assert_close(weighted_losses(LOGITS, targets, weights=weights, gamma=1.5), expected)
    plain = F.cross_entropy(LOGITS, targets, label_smoothing=0.1)
    torch.testing.assert_close(weighted_losses(LOGITS, targets, label_smoothing=0.1).mean(), plain)


def test_focal_loss_of_several_labels() -> None:
    targets, weights = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1]]), torch.tensor([0.5, 2.0, 4.0])
    p = torch.where(targets > 0, LOGITS.sigmoid(), 1 - LOGITS.sigmoid())
    each = torch.where(targets > 0, weights, 1.0) * (1 - p) ** 2 * -p.log()
    torch.testing.assert_close(weighted_losses(LOGITS, targets, weights=weights, gamma=2.0), each.mean(1))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_certain_answer_has_a_finite_gradient(gamma: float) -> None:
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], requires_grad=True)
    weighted_losses(logits, torch.tensor([0, 0]), gamma=gamma).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_with_balanced_weights_all_classes_count_alike() -> None:
    shares = torch.tensor([0.7, 0.0, 0.2, 0.1], dtype=torch.float64)
    weights = balanced_weights(shares)
    assert (shares * weights).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    several = balanced_weights(torch.tensor([0.2, 0.0, 1.0]), multi_label=True)
    assert several.tolist() == pytest.approx([4, 1, 1])


# --- in a fit


def test_balanced_weights_count_new_and_replayed_examples(model: str) -> None:
    module, sums = SequenceClassificationModule(model, class_weights="balanced", dropout=0.0), Sums()
    callbacks = [Replay(4, "class_balanced", replay_ratio=0.5), sums]
    learn(module, {"business": 9, "sport": 3}, *callbacks)
    learn(module, {"politics": 6}, *callbacks)
    first, second = sums.weights
    assert first == pytest.approx([1 / (2 * 0.75), 1 / (2 * 0.25)])
    assert second == pytest.approx([2, 2, 1 / 2])  # a sixth, a sixth, and two thirds of a batch


def test_the_training_loss_is_weighted_and_that_of_the_validation_is_not(model: str) -> None:
    module = build(model, class_weights={"sport": 5.0}, loss="focal", dropout=0.0, learning_rate=1e-9)
    batches = loader(model, ["business", "sport"], batch_size=6)
    fitted = trainer(max_steps=1, limit_val_batches=1)
    fitted.fit(module, batches, batches)
    batch = next(iter(batches))
    logits, targets = module(**{**batch, "labels": None}).logits, module.encode_labels(batch["labels"])
    focal = weighted_losses(logits, targets, weights=torch.tensor([1.0, 5.0]), gamma=2.0).mean().detach()
    assert float(fitted.callback_metrics["train_loss"]) == pytest.approx(focal.item(), rel=1e-4)
    plain = float(F.cross_entropy(logits, targets))
    assert float(fitted.callback_metrics["val_loss"]) == pytest.approx(plain, rel=1e-4)
    assert abs(focal.item() - plain) > 0.1


def test_a_rare_class_is_learned(model: str) -> None:
    """Of a class with the same texts as one that has nine times as many, plain cross-entropy keeps a tenth."""

    def answer(**settings: Any) -> float:
        torch.manual_seed(0)
        module = SequenceClassificationModule(model, dropout=0.0, learning_rate=1e-2, freeze_layers=-1, **settings)
        rows = [{"text": "a law", "label": name} for name in ["often"] * 18 + ["rare"] * 2]
        one = Experience("one", rows, classes=["often", "rare"])
        data = ExperienceDataModule(one, module.tokenizer, task=module.task, batch_size=20)
        trainer(max_epochs=150).fit(module, data)
        return module.predict(["a law"])[0]["rare"]

    assert answer() == pytest.approx(0.1, abs=0.03)
    assert answer(class_weights="balanced") == pytest.approx(0.5, abs=0.03)


def test_it_is_saved_with_the_module(model: str, tmp_path: Path) -> None:
    module = build(model, class_weights={"sport": 2.0}, loss="focal", focal_gamma=1.0)
    module.save_pretrained(tmp_path)
    again = SequenceClassificationModule.from_pretrained(tmp_path)
    assert (again.loss_kind, again.focal_gamma, again.class_weights) == ("focal", 1.0, {"sport": 2.0})


def learn_weighted(folder: str, devices: int) -> list[float]:
    """The head after two updates, with a class that comes later."""
    pl.seed_everything(3)
    module = SequenceClassificationModule(
        folder, dropout=0.0, learning_rate=1e-3, class_weights="balanced", loss="focal"
    )
    replay = Replay(4, seed=0)
    strategy = "ddp" if devices > 1 else "auto"
    learn(module, {"business": 6, "sport": 2}, replay, devices=devices, strategy=strategy)
    learn(module, {"politics": 8}, replay, devices=devices, strategy=strategy)
    return module.head.weight.flatten().tolist()


def test_two_ranks_learn_what_one_process_learns(model: str) -> None:
    expected = learn_weighted(model, 1)
    for found in run_ranks(f"{__name__}:learn_weighted", 2, folder=model, devices=2):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, r"loss must be one of \['cross_entropy', 'focal'\], got 'hinge'"),
        ({"focal_gamma": 0}, "focal_gamma must be positive and finite, got 0"),
        ({"class_weights": "even"}, "class_weights must be 'balanced', a mapping of names to weights, or None"),
        ({"class_weights": {"sport": 0}}, "the weight of 'sport' must be a positive number, got 0"),
        ({"class_weights": {"sport": float("nan")}}, "the weight of 'sport' must be a positive number, got nan"),
    ],
)
def test_bad_settings_are_named(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassificationModule(model, **settings)


@pytest.mark.parametrize("weights", ["balanced", {"sport": 2.0}])
def test_nothing_is_corrected_twice(model: str, weights: Any) -> None:
    module = SequenceClassificationModule(model, class_weights=weights)
    with pytest.raises(ValueError, match="class_weights and LogitAdjustment both correct"):
        learn(module, {"business": 2, "sport": 2}, LogitAdjustment())


def test_examples_that_are_not_counted_are_refused(model: str) -> None:
    module = SequenceClassificationModule(model, class_weights="balanced")
    with pytest.raises(ValueError, match="class_weights='balanced' needs to know how often each class is replayed"):
        learn(module, {"business": 2, "sport": 2}, MIR(memory_size=4))
    with pytest.raises(ValueError, match="class_weights='balanced' counts the new and the replayed examples"):
        learn(module, {"business": 2, "sport": 2}, Replay(4, extra=DataLoader([{"text": "a"}]).dataset))


def test_names_that_are_not_classes_are_reported(model: str) -> None:
    module = SequenceClassificationModule(model, class_weights={"sports": 2.0})
    with pytest.warns(UserWarning, match=r"class_weights has \['sports'\], which are not among the classes yet"):
        learn(module, {"business": 2, "sport": 2})
