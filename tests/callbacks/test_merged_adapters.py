"""One adapter per experience, merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from evertune._lightning import pl
from evertune.callbacks import EMA, L2SP, MergedAdapters, OrthogonalLoRA
from tests.callbacks.test_ewc import Classifier, fit
from tests.helpers.lora import LAYERS, SCALE, Adapted, ByHand, Starts, assert_same, data, effective, up


def average(elements: list[float]) -> float:
    return sum(elements) / len(elements)


def largest(elements: list[float]) -> float:
    return max(elements, key=abs)


def disjoint_mean(elements: list[float]) -> float:
    elected = sum(elements) > 0
    agree = [one for one in elements if one != 0 and (one > 0) == elected]
    return average(agree) if agree else 0.0


def trimmed(vector: Tensor, density: float) -> Tensor:
    """The elements of the largest magnitudes; the others are 0."""
    order = sorted(range(vector.numel()), key=lambda index: -abs(float(vector.flatten()[index])))
    kept = set(order[: round(density * vector.numel())])
    values = [float(x) if index in kept else 0.0 for index, x in enumerate(vector.flatten())]
    return torch.tensor(values, dtype=torch.float64).view(vector.shape)


def by_elements(vectors: list[Tensor], rule: Any) -> Tensor:
    values = [rule([float(x) for x in elements]) for elements in torch.stack([v.flatten() for v in vectors], 1)]
    return torch.tensor(values, dtype=torch.float64).view(vectors[0].shape)


def merge_by_hand(vectors: list[Tensor], how: str) -> Tensor:
    if how == "ties":
        vectors = [trimmed(vector, 0.4) for vector in vectors]
    return by_elements(vectors, {"average": average, "arithmetic": sum, "ties": disjoint_mean}.get(how, largest))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("start", ["last", "pretrained"])
@pytest.mark.parametrize("how", ["average", "arithmetic", "ties", "magnitude"])
def test_as_in_the_papers(how: Any, start: Any, steps: int) -> None:
    """After one step, and after two and three experiences."""
    module, method, starts = Adapted(), MergedAdapters(how, start, scale=0.8, density=0.4), Starts()
    by_hand = ByHand(module)
    pretrained, vectors = dict(by_hand.weights), {name: [] for name in LAYERS}
    for seed in (1, 2, 3):
        fit(module, data(seed), method, starts, max_steps=steps)
        begun = {n: vectors[n][-1] if start == "last" and vectors[n] else 0 * pretrained[n] for n in LAYERS}
        by_hand.weights = {name: pretrained[name] + begun[name] for name in LAYERS}
        by_hand.learn(data(seed), starts.downs[-1], steps)
        for name in LAYERS:
            [(a, b)] = by_hand.adapters[name]
            vectors[name].append(begun[name] + SCALE * b @ a)
            by_hand.weights[name] = pretrained[name] + 0.8 * merge_by_hand(vectors[name], how)
            by_hand.adapters[name] = []
        assert_same(module, by_hand)
        assert all(not up(module, name).any() for name in LAYERS)
    assert method.n_adapters == 3


def test_one_experience_of_scale_1_is_plain_lora() -> None:
    plain, module = Adapted(), Adapted()
    fit(plain, data(1), OrthogonalLoRA())
    fit(module, data(1), MergedAdapters())
    for name, value in effective(plain).items():
        torch.testing.assert_close(effective(module)[name], value, rtol=1e-6, atol=1e-7)


def test_saved_and_loaded_it_takes_the_same_steps(tmp_path: Path) -> None:
    module, method = Adapted(), MergedAdapters("ties")
    fit(module, data(1), method)
    method.save(tmp_path)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, data(2), method)
    other, loaded = Adapted(), MergedAdapters("ties")
    other.load_state_dict(state)
    loaded.load(tmp_path)
    fit(other, data(2), loaded)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert loaded.n_adapters == loaded.experience_index == 2


@pytest.mark.parametrize("start", ["last", "pretrained"])
def test_resumed_in_the_middle_it_ends_in_the_same_bits(start: Any, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    module, method = Adapted("adamw"), MergedAdapters(start=start)
    fit(module, data(1), method)
    fit(module, data(2), method, Save(), max_epochs=2)
    resumed, fresh = Adapted("adamw"), MergedAdapters(start=start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, data(2), fresh, max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    for one, two in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert fresh.n_adapters == 2


@pytest.mark.parametrize("start", ["last", "pretrained"])
def test_an_experience_that_failed_continues_with_its_adapter(start: Any) -> None:
    class Crash(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("power cut")

    module, method, other, again = Adapted(), MergedAdapters(start=start), Adapted(), MergedAdapters(start=start)
    for one, callback in ((module, method), (other, again)):
        fit(one, data(1), callback)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, data(2), method, Crash())  # after a step
    assert method.n_adapters == 1
    fit(module, data(2), method)
    rows = data(2).dataset
    fit(other, DataLoader(ConcatDataset([Subset(rows, range(8)), rows]), batch_size=8), again)
    for name, value in effective(other).items():
        torch.testing.assert_close(effective(module)[name], value, rtol=1e-5, atol=1e-6)


def test_a_callback_that_cannot_consolidate_leaves_weights_and_adapters_together() -> None:
    class Fails(L2SP):
        def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            raise RuntimeError("disk full")

    module, method = Adapted(), MergedAdapters()
    fails = Fails()
    vars(method)["setup"] = lambda *_, **__: None  # which would refuse it
    with pytest.raises(RuntimeError, match="disk full"):
        fit(module, data(1), method, fails)
    assert method.n_adapters == 1
    assert all(not up(module, name).any() for name in LAYERS)


def test_a_smoke_test_is_no_experience() -> None:
    module, method = Adapted(), MergedAdapters()
    fit(module, data(1), method, fast_dev_run=True)
    assert method.n_adapters == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Classifier(), []), "MergedAdapters trains LoRA adapters, and Classifier has none"),
        (lambda: (Adapted(), [EMA()]), "MergedAdapters and EMA in one Trainer: each sets the final weights"),
        (lambda: (Adapted(), [OrthogonalLoRA()]), "MergedAdapters and OrthogonalLoRA in one Trainer: each starts"),
        (lambda: (Adapted().bfloat16(), []), "has a weight of torch.bfloat16, which would round away"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    module, others = make()
    with pytest.raises(ValueError, match=message):
        fit(module, data(1), MergedAdapters(), *others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": "mean"}, "merge must be one of .*, got 'mean'"),
        ({"start": "first"}, "start must be 'last' or 'pretrained', got 'first'"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergedAdapters(**settings)
