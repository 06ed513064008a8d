"""Asymmetric cross-entropy: the formula of the paper, what it composes with, what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import ERACE, DarkReplay, LogitAdjustment, Replay
from tests.helpers.function_space import Net, Points, assert_same, copy_of, fit, logits_of, step

FIRST, SECOND, THIRD = Points([0, 1] * 6), Points([1, 2, 2, 2] * 4, 100), Points([2] * 4 + [3] * 4, 200)


def stack(numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Examples by their numbers, as all three experiences have them."""
    items = [
        data[n - data.start] for n in numbers for data in (FIRST, SECOND, THIRD) if 0 <= n - data.start < len(data)
    ]
    return torch.stack([item["x"] for item in items]), torch.tensor([item["labels"] for item in items])


def paper(weights: dict[str, Tensor], steps: list[list[int]], classes: list[int] | None) -> dict[str, Tensor]:
    """Gradient descent on the asymmetric loss; four new examples a step. ``classes`` None: those of the batch."""
    for numbers in steps:
        x, y = stack(numbers)
        among = classes or sorted(set(y[:4].tolist()))

        def loss(at: dict[str, Tensor], x: Tensor = x, y: Tensor = y, among: list[int] = among) -> Tensor:
            logits = logits_of(at, x)
            new = -(logits[:4].gather(1, y[:4, None])[:, 0] - logits[:4][:, among].logsumexp(1))
            old = -logits[4:].log_softmax(1).gather(1, y[4:, None])[:, 0]
            return torch.cat([new, old]).mean()

        weights = step(weights, loss)
    return weights


@pytest.mark.parametrize("growing", [True, False])
@pytest.mark.parametrize("among", ["update", "batch"])
def test_the_weights_are_those_of_the_paper(among: Any, growing: bool) -> None:
    replay, race, module = Replay(5), ERACE(among), Net(2 if growing else 4)
    for data, classes in ((FIRST, [0, 1]), (SECOND, [1, 2]), (THIRD, [2, 3])):
        if growing:
            module.grow(max(classes) + 1)
        before = copy_of(module)
        module.numbers.clear()
        fit(module, data, race, replay)
        assert_same(module, paper(before, module.numbers, classes if among == "update" else None))
    assert len(module.numbers[0]) == 8


def test_the_order_of_the_callbacks_changes_nothing() -> None:
    """Stored logits are compared with the model's own, not with those of the new classes alone."""
    found = []
    for reverse in (False, True):
        callbacks: list[pl.Callback] = [DarkReplay(5), ERACE()]
        module = Net(4)
        for data in (FIRST, SECOND):
            fit(module, data, *callbacks[:: -1 if reverse else 1])
        found.append(copy_of(module))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_several_labels_have_no_gradient_for_old_classes() -> None:
    class ManyLabels(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.binary_cross_entropy_with_logits(self(batch["x"]), batch["labels"])

    class Rows(Points):
        def __getitem__(self, index: int) -> Any:
            return {**super().__getitem__(index), "labels": torch.tensor(self.targets[index], dtype=torch.float64)}

    module, data = ManyLabels(3), Rows([[0.0, 1, 0]] * 4)
    before = copy_of(module)
    fit(module, data, Replay(5), ERACE())
    after = copy_of(module)
    assert torch.equal(before["head.weight"][[0, 2]], after["head.weight"][[0, 2]])
    assert not torch.equal(before["head.weight"][1], after["head.weight"][1])


def test_evaluation_is_left_alone_and_so_is_the_module() -> None:
    class Compare(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            seen.append(torch.equal(module(batch["x"]), logits_of(copy_of(module), batch["x"])))

    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    seen: list[bool] = []
    module = Validated(4)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[Replay(5), ERACE(), Compare()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data = DataLoader(FIRST, batch_size=4)
    trainer.fit(module, data, data)
    assert seen == [True] * 3
    assert not any(part._forward_hooks for part in module.modules())


class Smooth(Net):
    label_smoothing = 0.1


class Sequences(Points):
    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), "labels": torch.tensor([0.5])}


@pytest.mark.parametrize(
    ("module", "callbacks", "data", "message"),
    [
        (Net, [ERACE()], FIRST, "ERACE needs a Replay"),
        (Net, [LogitAdjustment(), Replay(5), ERACE()], FIRST, "ERACE and LogitAdjustment both correct"),
        (Smooth, [Replay(5), ERACE()], FIRST, "over which label_smoothing=0.1 spreads the targets"),
        (Net, [Replay(5), ERACE()], Sequences([0] * 8), "needs targets that are class numbers"),
        (Net, [Replay(5), ERACE(head="out")], FIRST, "it has no submodule 'out'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    module: type[Net], callbacks: list[pl.Callback], data: Any, message: str
) -> None:
    model = module(4)
    with pytest.raises(ValueError, match=message):
        fit(model, data, *callbacks)
    assert not model.numbers


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"among must be one of \['update', 'batch'\], got 'all'"):
        ERACE("all")  # type: ignore[arg-type]
