"""Logit adjustment: the formula, what it composes with, what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from evertune._lightning import pl
from evertune.callbacks import LogitAdjustment, Replay
from tests.helpers.quiet import QUIET

ABSENT = -50.0


class Classifier(pl.LightningModule):
    """Three numbers to class logits; notes the loss of each step and the logits that evaluation sees."""

    def __init__(self, n_classes: int = 4, multi_label: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, n_classes)
        self.multi_label = multi_label
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []  # logits without adjustment, targets, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.binary_cross_entropy_with_logits(self(x), y) if self.multi_label else F.cross_entropy(self(x), y)
        with torch.no_grad():
            self.steps.append((F.linear(x, self.head.weight, self.head.bias), y, loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: pl.LightningModule, data: Any, *callbacks: pl.Callback, **settings: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        **QUIET,
        **{"max_epochs": 1, **settings},
    )
    trainer.fit(module, data if isinstance(data, DataLoader) else DataLoader(data, batch_size=4))


def examples(targets: list[int], seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(len(targets), 3, generator=generator), torch.tensor(targets))


def expected(in_batch: list[float], in_all: list[float]) -> Tensor:
    p, q = torch.tensor(in_batch, dtype=torch.float64), torch.tensor(in_all, dtype=torch.float64)
    return torch.where(p > 0, p.log() - q.log(), ABSENT)


def assert_trained_on(module: Classifier, adjustment: Tensor) -> None:
    assert module.steps
    for logits, targets, loss in module.steps:
        torch.testing.assert_close(loss.double(), F.cross_entropy(logits.double() + adjustment, targets))


def test_the_loss_is_that_of_the_adjusted_logits() -> None:
    adjust, module = LogitAdjustment(), Classifier()
    fit(module, examples([0, 0, 0, 1]), adjust)
    assert_trained_on(module, expected([0.75, 0.25, 0, 0], [0.75, 0.25, 0, 0]))

    module.steps.clear()
    fit(module, examples([2, 2, 2, 3]), adjust)
    assert_trained_on(module, expected([0, 0, 0.75, 0.25], [3 / 8, 1 / 8, 3 / 8, 1 / 8]))
    assert adjust.counts.tolist() == [3, 1, 3, 1]


@pytest.mark.parametrize("adjust_first", [True, False])
def test_with_replay_the_replayed_share_counts(adjust_first: bool) -> None:
    module, replay, adjust = Classifier(), Replay(2, "class_balanced", replay_ratio=0.5), LogitAdjustment()
    callbacks = [adjust, replay] if adjust_first else [replay, adjust]
    fit(module, examples([0] * 6 + [1] * 2), *callbacks)
    module.steps.clear()
    fit(module, examples([2] * 4), *callbacks)
    # Two thirds of a batch are new; the memory holds one example of each old class.
    assert_trained_on(module, expected([1 / 6, 1 / 6, 2 / 3, 0], [6 / 12, 2 / 12, 4 / 12, 0]))


def test_several_labels_are_adjusted_by_their_odds() -> None:
    x = torch.randn(4, 3)
    first = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    second = torch.tensor([[0.0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]])
    adjust, module = LogitAdjustment(), Classifier(3, multi_label=True)
    fit(module, TensorDataset(x, first), adjust)
    module.steps.clear()
    fit(module, TensorDataset(x, second), adjust)
    odds = torch.logit(torch.tensor([0, 1 / 4, 3 / 4])) - torch.logit(torch.tensor([2 / 8, 3 / 8, 3 / 8]))
    adjustment = torch.cat([torch.tensor([ABSENT]), odds[1:]])
    for logits, targets, loss in module.steps:
        torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits + adjustment, targets))


def test_evaluation_is_not_adjusted_and_the_head_is_left_as_it_was() -> None:
    class Compare(pl.Callback):
        def on_validation_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
        ) -> None:
            seen.append(
                torch.equal(pl_module(batch[0]), F.linear(batch[0], pl_module.head.weight, pl_module.head.bias))
            )

    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    seen: list[bool] = []
    module, data = Validated(), DataLoader(examples([0, 0, 0, 1]), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[LogitAdjustment(), Compare()],
        **QUIET,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data, data)
    assert seen == [True, True]
    assert not module.head._forward_hooks


def test_a_fit_that_fails_changes_neither_head_nor_counts() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("out of luck")

    adjust, module = LogitAdjustment(), Fails()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, examples([0, 1]), adjust)
    assert not module.head._forward_hooks
    assert adjust.counts.tolist() == []


def test_rows_allocated_ahead_take_no_part() -> None:
    adjust, module = LogitAdjustment(), Classifier(6)
    fit(module, examples([0, 1, 1, 1]), adjust)
    assert_trained_on(module, torch.tensor([0.0, 0, ABSENT, ABSENT, ABSENT, ABSENT], dtype=torch.float64))


def test_saved_and_loaded(tmp_path: Path) -> None:
    adjust, fresh, from_checkpoint = LogitAdjustment(), LogitAdjustment(), LogitAdjustment()
    fit(Classifier(), examples([0, 0, 0, 1]), adjust)
    adjust.save(tmp_path)
    fresh.load(tmp_path)
    from_checkpoint.load_state_dict(adjust.state_dict())
    for one in (fresh, from_checkpoint):
        assert (one.counts.tolist(), one.n_seen, one.experience_index) == ([3, 1], 4, 1)
    (tmp_path / "logit_adjustment.json").write_text('{"counts": ["many"]}')
    with pytest.raises(ValueError, match=r"logit_adjustment.json is corrupt"):
        fresh.load(tmp_path)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(examples([0, 1]))


@pytest.mark.parametrize(
    ("data", "head", "message"),
    [
        (Endless(), "head", "LogitAdjustment needs the classes of the training data before training, and cannot read"),
        (examples([0, 1]), "classifier", "Classifier has no submodule 'classifier'; pass head="),
        (TensorDataset(torch.ones(2, 3), torch.rand(2, 4) + 0.1), "head", "needs targets that are class numbers"),
        (TensorDataset(torch.ones(2, 3)), "head", "needs the class of every example: cannot find targets"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(data: Any, head: str, message: str) -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit(module, DataLoader(data, batch_size=2), LogitAdjustment(head))
    assert not module.steps
