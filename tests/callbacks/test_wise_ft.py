"""WiSE-FT: the share is the best one on all experiences, and the weights are the average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evertune.callbacks import EMA, Replay, WiSEFT
from tests.helpers.function_space import Net, Points, assert_same, copy_of, fit, logits_of

SHARES = (0.0, 0.25, 0.5, 0.75)
FIRST, SECOND = Points([0, 1] * 10), Points([2, 3] * 10, 100)


def accuracy(weights: dict[str, Tensor], data: list[Any]) -> float:
    x, y = torch.stack([one["x"] for one in data]), torch.tensor([one["labels"] for one in data])
    return float((logits_of(weights, x).argmax(1) == y).double().mean())


def after_two(*callbacks: Any, epochs: int = 15) -> tuple[Net, dict[str, Tensor]]:
    module = Net(4)
    fit(module, FIRST, *callbacks, max_epochs=epochs)
    before = copy_of(module)
    fit(module, SECOND, *callbacks, max_epochs=epochs)
    return module, before


@pytest.mark.parametrize("first", [True, False])
def test_the_best_share_on_all_experiences(first: bool) -> None:
    wise, replay, plain = WiSEFT(SHARES), Replay(20, replay_ratio=0.05), Replay(20, replay_ratio=0.05)
    module, before = after_two(*([wise, replay] if first else [replay, wise]))
    trained, same_before = after_two(plain)
    assert all(torch.equal(value, same_before[name]) for name, value in before.items())  # nothing to average at first
    scores, averages = {}, {}
    for share in SHARES:
        mean = {name: share * before[name] + (1 - share) * value for name, value in copy_of(trained).items()}
        averages[share] = mean
        scores[share] = (accuracy(mean, list(FIRST)) + accuracy(mean, list(SECOND))) / 2
    assert wise.scores == pytest.approx(scores)
    assert wise.previous == max(SHARES, key=lambda share: (round(scores[share], 6), -share))
    assert len({round(score, 6) for score in scores.values()}) > 1
    assert_same(module, averages[wise.previous], rtol=1e-4)  # the old weights are kept in fp32


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([WiSEFT()], "WiSEFT chooses on the memory of a Replay: add one, or use VersionAveraging"),
        ([WiSEFT(), Replay(5), EMA()], "WiSEFT and EMA in one Trainer: each sets the final weights"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(callbacks: list[Any], message: str) -> None:
    module = Net(4)
    with pytest.raises(ValueError, match=message):
        fit(module, FIRST, *callbacks)
    assert not module.numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (0.5, 1.0)}, r"shares must be numbers from 0 to below 1, got \[0.5, 1.0\]"),
        ({"shares": ()}, r"shares must be numbers from 0 to below 1, got \[\]"),
        ({"n_examples": 0}, "n_examples must be positive, got 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WiSEFT(**settings)
