"""InfLoRA: adapters that read their input along directions that old data do not use."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from evertune._lightning import pl
from evertune.callbacks import EWC, InfLoRA, OrthogonalLoRA
from tests.callbacks.test_ewc import Classifier, fit
from tests.helpers.lora import LAYERS, Adapted, ByHand, assert_same, data, down


class Subspaces:
    """The method by hand in float64, on the matrices of inputs and their singular values, as the paper writes it."""

    def __init__(self, energy: float) -> None:
        self.energy = energy
        self.bases: dict[str, Tensor] = {}

    def residual(self, by_hand: ByHand, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """For each layer, the inputs (a column each), and what of them is off the basis."""
        found = {}
        for name, x in by_hand.forward(data(seed).dataset.tensors[0].double()):
            if name in LAYERS:
                inputs = x.detach().T
                basis = self.bases.get(name, torch.zeros(len(inputs), 0, dtype=torch.float64))
                found[name] = inputs, inputs - basis @ (basis.T @ inputs)
        return found

    def design(self, by_hand: ByHand, seed: int) -> dict[str, Tensor]:
        return {
            name: torch.linalg.svd(off)[0][:, :2].T / math.sqrt(3)
            for name, (_, off) in self.residual(by_hand, seed).items()
        }

    def take_in(self, by_hand: ByHand, seed: int) -> None:
        for name, (inputs, off) in self.residual(by_hand, seed).items():
            vectors, values, _ = torch.linalg.svd(off)
            basis = self.bases.get(name, torch.zeros(len(inputs), 0, dtype=torch.float64))
            held, number = float((basis.T @ inputs).square().sum()), 0
            while held < self.energy * float(inputs.square().sum()):
                held += float(values[number] ** 2)
                number += 1
            self.bases[name] = torch.cat([basis, vectors[:, :number]], 1)


@pytest.mark.parametrize("steps", [1, 5])
def test_as_in_the_paper(steps: int) -> None:
    """After one step, and after two and three experiences. In float64, as close eigenvalues magnify rounding."""
    module, method = Adapted().double(), InfLoRA(energy=0.6)
    by_hand, subspaces = ByHand(module), Subspaces(0.6)
    by_hand.trains_down = False
    for seed in (1, 2, 3):
        fit(module, data(seed), method, max_steps=steps, precision="64-true")
        by_hand.learn(data(seed), subspaces.design(by_hand, seed), steps)
        assert_same(module, by_hand, rtol=1e-9, atol=1e-9)
        subspaces.take_in(by_hand, seed)
        for name in LAYERS:
            basis, expected = method.kept[f"net.{name}"], subspaces.bases[name]
            torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=1e-9, atol=1e-9)
            assert 0 < basis.shape[1] < len(basis)


class Watch(pl.Callback):
    """``A`` before the first step and after the last, and what the steps see of its gradient."""

    def __init__(self) -> None:
        self.first: list[Tensor] = []
        self.last: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.first = [down(pl_module, name) for name in LAYERS]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.last = [down(pl_module, name) for name in LAYERS]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_was_designed_stays_and_is_off_what_was_learned(optimizer: str) -> None:
    """Under weight decay, too, which needs no gradient."""
    module, method, watch = Adapted(optimizer), InfLoRA(energy=0.6), Watch()
    for seed in (1, 2):
        bases = dict(method.kept)
        fit(module, data(seed), method, watch)
        assert all(torch.equal(one, other) for one, other in zip(watch.first, watch.last, strict=True))
        for rows, name in zip(watch.last, LAYERS, strict=True):
            assert rows.norm(dim=1).allclose(torch.full((2,), 1 / math.sqrt(3)))
            if seed == 2:
                assert (rows @ bases[f"net.{name}"]).abs().max() < 1e-5


def test_where_no_direction_is_left_nothing_is_learned() -> None:
    module, method = Adapted(), InfLoRA(energy=1.0)
    fit(module, data(1), method)
    assert {one.shape for one in method.kept.values()} == {(6, 6), (5, 5)}
    with pytest.warns(UserWarning, match="use all directions of the inputs of 2 of 2 layers"):
        fit(module, data(2), method)
    assert all(not down(module, name).any() for name in LAYERS)


def test_padding_does_not_count(tmp_path: Path) -> None:
    from evertune.lightning_modules import SequenceClassificationModule
    from tests.helpers.lightning_modules import TEXTS, tiny_bert

    model = tiny_bert(tmp_path / "bert")
    lora = {"method": "lora", "r": 2, "target_modules": ["query"]}
    found = []
    for padding in (True, "max_length"):
        module = SequenceClassificationModule(model, classes=["business", "sport"], peft=lora, dropout=0.0)

        def collate(rows: list[tuple[str, str]], to: Any = padding, one: Any = module) -> Any:
            texts, labels = zip(*rows, strict=True)
            tokens = one.tokenizer(list(texts), padding=to, max_length=12, truncation=True, return_tensors="pt")
            return {**tokens, "labels": list(labels)}

        rows = [(text, name) for name in ("business", "sport") for text in TEXTS[name]]
        method = InfLoRA(energy=0.6)
        torch.manual_seed(0)
        fit(module, DataLoader(rows, batch_size=3, collate_fn=collate), method)
        found.append(method.kept)
    for name, basis in found[0].items():
        torch.testing.assert_close(basis @ basis.T, found[1][name] @ found[1][name].T, rtol=1e-3, atol=1e-4)


def test_saved_and_loaded_it_takes_the_same_steps(tmp_path: Path) -> None:
    module, method = Adapted(), InfLoRA(energy=0.6)
    fit(module, data(1), method)
    method.save(tmp_path)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, data(2), method)
    other, loaded = Adapted(), InfLoRA(energy=0.6)
    other.load_state_dict(state)
    loaded.load(tmp_path)
    fit(other, data(2), loaded)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_resumed_in_the_middle_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    module, method = Adapted("adamw"), InfLoRA(energy=0.6)
    fit(module, data(1), method)
    fit(module, data(2), method, Save(), max_epochs=2)
    resumed, fresh = Adapted("adamw"), InfLoRA(energy=0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, data(2), fresh, max_epochs=2, ckpt=tmp_path / "middle.ckpt")
    for one, two in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert all(torch.equal(method.kept[name], fresh.kept[name]) for name in method.kept)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Classifier(), []), "InfLoRA trains LoRA adapters, and Classifier has none"),
        (lambda: (Adapted(), [OrthogonalLoRA()]), "InfLoRA and OrthogonalLoRA in one Trainer: each starts the adapter"),
        (lambda: (Adapted(), [EWC()]), "InfLoRA and EWC in one Trainer"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    module, others = make()
    with pytest.raises(ValueError, match=message):
        fit(module, data(1), InfLoRA(), *others)


def test_data_that_cannot_be_read_again_are_refused() -> None:
    class Sampler(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Any:
            return iter(range(8))

        def __len__(self) -> int:
            return 8

    rows = DataLoader(TensorDataset(torch.randn(8, 6), torch.zeros(8).long()), batch_size=4, sampler=Sampler())
    with pytest.raises(
        ValueError,
        match=r"InfLoRA needs the inputs of the adapted layers .* read this TensorDataset by index: .* no sampler",
    ):
        fit(Adapted(), rows, InfLoRA())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 0.0}, "energy must be above 0 and at most 1, got 0.0"),
        ({"n_examples": 0}, "n_examples must be positive, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfLoRA(**settings)
