"""Streams of Avalanche feed ``fit_stream``."""

from __future__ import annotations

import pytest
import torch
from avalanche.benchmarks import ni_benchmark
from torch.utils.data import TensorDataset

from evertune import ContinualTrainer
from evertune.callbacks import Replay
from evertune.streams import from_avalanche
from tests.avalanche.loops import N_EACH, Module, benchmark


def test_a_benchmark_is_a_stream() -> None:
    theirs = benchmark()
    stream = from_avalanche(theirs)
    assert [one.classes for one in stream] == [["0", "1"], ["2", "3"], ["4", "5"]]
    for one, learned, scored in zip(stream, theirs.train_stream, theirs.test_stream, strict=True):
        assert len(one.train) == len(one.test or ()) == 2 * N_EACH
        for ours, other in ((one.train, learned.dataset), (one.test, scored.dataset)):
            assert ours is not None
            for index in range(len(ours)):
                inputs, target = ours[index]
                assert torch.equal(inputs, other[index][0])
                assert target == other[index][1]


def test_it_is_learned_without_forgetting() -> None:
    trainer = ContinualTrainer(
        max_epochs=20, accelerator="cpu", callbacks=[Replay(memory_size=40)], logger=False, enable_checkpointing=False
    )
    history = trainer.fit_stream(Module(), from_avalanche(benchmark()), batch_size=8)
    assert history.experiences == ["experience 1", "experience 2", "experience 3"]
    assert history.average_accuracy > 0.6


def test_test_data_that_are_not_split_are_refused() -> None:
    inputs, targets = torch.randn(24, 5), torch.arange(24) % 3
    theirs = ni_benchmark(TensorDataset(inputs, targets), TensorDataset(inputs, targets), 3, seed=0)
    with pytest.raises(ValueError, match="the test stream has 1 experiences and the train stream 3"):
        from_avalanche(theirs)
    with pytest.raises(ValueError, match="list has no train_stream"):
        from_avalanche([])
