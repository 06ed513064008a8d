"""Extra examples beside the memory, such as a part of the data of pretraining, and the loss of each source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from evertune._lightning import pl
from evertune.callbacks import DarkReplay, LogitAdjustment, Replay, SourceLosses
from tests.helpers.function_space import Net, Points, SaveAt, assert_same, copy_of, fit, learn, logits_of, step

FIRST, SECOND, EXTRA = Points([0, 1] * 6), Points([1, 2] * 8, 100), Points([3, 0, 3] * 2, 900)


def stack(numbers: list[int]) -> tuple[Tensor, Tensor]:
    items = [
        data[n - data.start] for n in numbers for data in (FIRST, SECOND, EXTRA) if 0 <= n - data.start < len(data)
    ]
    return torch.stack([item["x"] for item in items]), torch.tensor([item["labels"] for item in items])


def sources(numbers: list[int]) -> list[int]:
    """How many examples of a batch are of each source; they come in this order."""
    kinds = [2 if n >= 900 else 0 for n in numbers]
    return [kinds.count(0), kinds.count(2)]


def test_extra_examples_join_every_batch_from_the_first_experience_on() -> None:
    replay, module = Replay(5, extra=EXTRA, extra_ratio=0.4), Net(4)
    fit(module, FIRST, replay)
    assert [sources(numbers) for numbers in module.numbers] == [[4, 1], [4, 2], [4, 1]]
    assert not any(number >= 900 for number in (replay.memory[slot]["number"] for slot in range(5)))
    module.numbers.clear()
    fit(module, SECOND, replay, max_epochs=2)
    assert [sources(numbers) for numbers in module.numbers] == [[8, n] for n in (1, 2, 1, 2, 2, 1, 2, 1)]
    drawn = [number for numbers in module.numbers for number in numbers[8:]]
    assert sorted(drawn[:6]) == sorted(drawn[6:12]) == list(range(900, 906))  # each once in a pass
    assert drawn[:6] != drawn[6:12]


def test_worker_processes_draw_the_same_and_a_resumed_fit_too(tmp_path: Path) -> None:
    seen = []
    for workers in (0, 2):
        replay, module = Replay(5, extra=EXTRA, extra_ratio=0.5), Net(4)
        for data in (FIRST, SECOND):
            fit(module, DataLoader(data, batch_size=4, num_workers=workers), replay)
        seen.append(module.numbers)
    assert seen[0] == seen[1]
    whole, part, again = Net(4), Net(4), Replay(5, extra=EXTRA, extra_ratio=0.5)
    learn(whole, FIRST, Replay(5, extra=EXTRA, extra_ratio=0.5), SaveAt(tmp_path / "middle.ckpt"))
    learn(part, FIRST, again, ckpt_path=tmp_path / "middle.ckpt")
    assert whole.numbers[2:] == part.numbers
    assert_same(part, copy_of(whole), rtol=0)


def test_with_stored_logits_the_new_examples_keep_their_weight() -> None:
    replay, module = DarkReplay(5, alpha=0.3, beta=0.7, extra=EXTRA, extra_ratio=0.5), Net(4)
    fit(module, FIRST, replay)
    before = weights = copy_of(module)
    stored = {replay.memory[slot]["number"] for slot in range(5)}
    module.numbers.clear()
    fit(module, SECOND, replay)
    for numbers in module.numbers:
        assert (set(numbers[4:8]) <= stored, len(numbers)) == (True, 10)

        def loss(at: dict[str, Tensor], numbers: list[int] = numbers) -> Tensor:
            x, y = stack(numbers)
            h, each = logits_of(at, x), F.cross_entropy(logits_of(at, x), y, reduction="none")
            apart = (h[4:8] - logits_of(before, x[4:8])).square().mean()
            return each[:4].mean() + 0.7 * each[4:8].mean() + 0.5 * each[8:].mean() + 0.3 * apart

        weights = step(weights, loss)
    assert_same(module, weights, rtol=1e-5)


def test_the_loss_of_each_source_is_logged() -> None:
    class Notes(pl.Callback):
        """The losses of each step, by an own forward pass on the weights before it."""

        def __init__(self) -> None:
            self.losses: list[Tensor] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            logits = logits_of(copy_of(module), batch["x"])
            self.losses.append(F.cross_entropy(logits, batch["labels"], reduction="none"))

    replay, module, notes = Replay(5, extra=EXTRA, extra_ratio=0.5), Net(4), Notes()
    trainer = fit(module, FIRST, SourceLosses(), replay)
    assert trainer.callback_metrics.keys() == {"train_loss/new", "train_loss/extra"}
    plain = Net(4)
    fit(plain, FIRST, Replay(5, extra=EXTRA, extra_ratio=0.5))
    assert_same(module, copy_of(plain), rtol=0)  # it only looks
    trainer = fit(module, SECOND, replay, notes, SourceLosses())
    for name, rows in (("new", slice(4)), ("replayed", slice(4, 8)), ("extra", slice(8, None))):
        expected = torch.cat([losses[rows] for losses in notes.losses]).mean()
        torch.testing.assert_close(trainer.callback_metrics[f"train_loss/{name}"], expected.float())
    assert not any(part._forward_hooks for part in module.modules())


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"extra": Endless()},
            "extra must be a dataset that is read by index, with at least one example, got a Endless",
        ),
        ({"extra": []}, "with at least one example, got a list"),
        ({"extra": EXTRA, "extra_ratio": 0.0}, "extra_ratio must be positive and finite, got 0.0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Replay(5, **settings)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [Replay(5, extra=[{"y": 1}], extra_ratio=1.0)],
            r"Replay cannot join example 0 of extra= to the new ones: it has",
        ),
        ([Replay(5, extra=EXTRA), LogitAdjustment()], r"LogitAdjustment counts .* not those of Replay\(extra=...\)"),
        ([SourceLosses()], "it needs a Replay"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(callbacks: list[pl.Callback], message: str) -> None:
    module = Net(4)
    with pytest.raises(ValueError, match=message):
        fit(module, FIRST, *callbacks)
    assert not module.numbers
