"""Penalties of evertune in Avalanche's loop: equal to Avalanche's own, and to evertune under Lightning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from avalanche.models import MTSimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import EWCPlugin, LwFPlugin, MASPlugin
from torch import Tensor

from evertune.callbacks import EWC, L2SP, MAS, Distillation, Replay, SynapticIntelligence
from evertune.callbacks.avalanche import AvalanchePlugin
from evertune.callbacks.quadratic_method import QuadraticMethod
from tests.avalanche.loops import N_CLASSES, N_EACH, avalanche, benchmark, lightning

WHOLE = N_CLASSES * N_EACH  # at least as large as any experience


def assert_equal(ours: Tensor, theirs: Tensor, other: Tensor) -> None:
    """Equal to 1e-5, where the method matters: without it, the weights differ by more than 100 times that."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - other).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["separate", "online"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_batched_ewc_is_avalanches(mode: str, batch_size: int) -> None:
    decay = 0.7 if mode == "online" else None
    theirs = EWCPlugin(ewc_lambda=2.0, mode=mode, decay_factor=decay)
    ours = EWC(
        2 * 2.0,  # Avalanche has no half in the penalty
        mode=mode,
        gamma=decay or 1.0,
        estimator="batched",
        n_examples=WHOLE,
        batch_size=batch_size,
        normalize=False,
    )
    results = [avalanche([plugin], batch_size) for plugin in (AvalanchePlugin(ours), theirs)]
    assert_equal(*results, avalanche([], batch_size))
    assert ours.experience_index == 3
    assert ours.notes["estimator"] == "batched"


def test_mas_is_avalanches_for_single_examples() -> None:
    theirs = MASPlugin(lambda_reg=0.05, alpha=0.5)
    ours = MAS(2 * 0.05, n_examples=WHOLE, normalize=False)
    results = [avalanche([plugin], 1, n_experiences=2) for plugin in (AvalanchePlugin(ours), theirs)]
    assert_equal(*results, avalanche([], 1, n_experiences=2))


def test_distillation_is_avalanches_lwf() -> None:
    ours = lightning([Distillation(strength=1.5 / 2**2, temperature=2)], epochs=10)  # Avalanche leaves out T^2
    theirs = avalanche([LwFPlugin(alpha=1.5, temperature=2)], WHOLE, epochs=10)
    assert_equal(ours, theirs, avalanche([], WHOLE, epochs=10))


@pytest.mark.parametrize(
    "method",
    [
        lambda: EWC(1.0, estimator="exact"),
        lambda: EWC(3.0, estimator="empirical", mode="separate", normalize=False, n_examples=9),
        lambda: EWC(1.0, estimator="exact", coupling="decoupled"),
        lambda: MAS(1.0),
        lambda: SynapticIntelligence(1.0),
        lambda: L2SP(0.3),
        lambda: L2SP(0.3, to="previous", coupling="decoupled"),
    ],
    ids=["exact", "empirical", "decoupled", "MAS", "SI", "L2SP", "L2SP-decoupled"],
)
def test_the_plugin_is_the_callback(method: Callable[[], QuadraticMethod]) -> None:
    assert_equal(avalanche([AvalanchePlugin(method())], WHOLE), lightning([method()]), lightning([]))


def test_several_penalties() -> None:
    methods = [EWC(1.0, estimator="exact"), L2SP(0.3)]
    assert_equal(
        avalanche([AvalanchePlugin(*methods)], WHOLE),
        lightning([L2SP(0.3), EWC(1.0, estimator="exact")]),
        lightning([]),
    )


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes penalties .* got Replay"):
        AvalanchePlugin(Replay(memory_size=10))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a penalty"):
        AvalanchePlugin()
    model = MTSimpleMLP(input_size=5)
    strategy = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), plugins=[AvalanchePlugin(EWC())]
    )
    with pytest.raises(ValueError, match="does not support models with task labels, got MTSimpleMLP"):
        strategy.train(benchmark().train_stream[0])
