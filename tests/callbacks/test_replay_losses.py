"""The loss-aware memory: which examples it keeps, and which losses it asks for."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evertune.callbacks import Replay
from evertune.memory import LossAware
from evertune.tasks.base import Outputs, losses
from tests.helpers.function_space import Net, Points, copy_of, fit, logits_of


def test_examples_are_kept_in_proportion_to_their_loss() -> None:
    """Of one class, the first that is kept is each example with its share of the losses."""
    policy, weights = LossAware(), np.array([[0.1], [0.2], [0.3], [1.4]])
    first: Counter[int] = Counter()
    for seed in range(2000):
        values = policy.priorities(list("abcd"), ["x"] * 4, weights, arrival=0, seed=seed, size=4)
        first[int(values.argmin())] += 1
    for index, share in enumerate((0.05, 0.1, 0.15, 0.7)):
        assert abs(first[index] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)


def test_the_memory_asks_the_model_for_the_losses() -> None:
    data, replay, module = Points([0, 1, 1, 0] * 5), Replay(6, "loss_aware", seed=3), Net(2)
    fit(module, data, replay)
    x, y = torch.stack([one["x"] for one in data]), torch.tensor(data.targets)
    each = F.cross_entropy(logits_of(copy_of(module), x), y, reduction="none")
    keys = {}
    for index, loss in enumerate(each.tolist()):
        digest = hashlib.blake2b(f"0:{index}".encode(), digest_size=8, key=b"3").digest()
        keys[index] = -math.log(1 - (int.from_bytes(digest, "little") >> 11) / 2**53) / loss
    expected = {i for label in (0, 1) for i in sorted((i for i in keys if y[i] == label), key=keys.__getitem__)[:3]}
    assert {replay.memory[slot]["number"] for slot in range(6)} == expected


def test_losses_of_each_kind() -> None:
    logits, generator = torch.randn(2, 3), torch.Generator().manual_seed(0)
    words, tags = torch.randn(2, 4, 3, generator=generator), torch.tensor([[0, 2, -100, 1], [-100] * 4])
    found = losses(Outputs(words, tags, "categorical"))
    torch.testing.assert_close(found[0], F.cross_entropy(words[0], tags[0]))
    assert found[1].isnan()
    labels = torch.tensor([[1.0, 0, -100], [0, 0, 1]])
    found = losses(Outputs(logits, labels, "bernoulli"))
    torch.testing.assert_close(found[0], F.binary_cross_entropy_with_logits(logits[0, :2], labels[0, :2]))
    numbers = torch.randn(2, 3)
    torch.testing.assert_close(losses(Outputs(logits, numbers, "gaussian")), (logits - numbers).square().mean(1))
    with pytest.raises(ValueError, match="have no loss without targets"):
        losses(Outputs(logits, None, "categorical"))


def test_losses_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="needs one loss of at least 0 for each example"):
        LossAware().priorities(["a"], ["x"], np.array([[-1.0]]), arrival=0, seed=0, size=1)
    with pytest.raises(ValueError, match="Replay cannot compare examples by the features of Net"):
        fit(Net(2), Points([0, 1] * 4), Replay(4, "loss_aware", features=lambda module, batch: batch["x"][0]))
