"""EWC and parameters that are renamed, wrapped, frozen or of another precision than fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from tests.helpers.quiet import QUIET

SETTINGS = {**QUIET, "accelerator": "cpu", "devices": 1, "max_epochs": 1}


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.words(x).mean(1)))


class Words(pl.LightningModule):
    """Means of embeddings, a hidden layer and a head; ``wrap`` changes the names of the parameters."""

    def __init__(self, wrap: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 3)
        backbone: nn.Module = Backbone()
        if wrap == "compiled":
            backbone = torch.compile(backbone, backend="eager")  # type: ignore[assignment]
        elif wrap == "parallel":
            backbone = Wrapped(backbone)
        if wrap == "renamed":
            self.net = backbone
        else:
            self.backbone = backbone
        self.names = [name for name, _ in self.named_parameters()]

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.net if hasattr(self, "net") else self.backbone)(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Wrapped(nn.Module):
    """As DistributedDataParallel names it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def loader(seed: int, words: int = 10) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, words, (16, 4), generator=generator)
    return DataLoader(list(zip(x, torch.randint(0, 3, (16,), generator=generator), strict=True)), batch_size=4)


def fit(module: Words, data: Any, *callbacks: Any, **settings: Any) -> None:
    pl.Trainer(callbacks=list(callbacks), **(SETTINGS | settings)).fit(module, data)


def by_name(ewc: EWC, kind: str) -> dict[str, Tensor]:
    assert ewc._state is not None
    return {f.name: t for f, t in zip(ewc._state.fragments, ewc.tensors[kind], strict=True)}


# --- names


@pytest.mark.parametrize("how", ["kept", "saved"])
@pytest.mark.parametrize(("before", "after"), [("", "compiled"), ("compiled", ""), ("", "parallel")])
def test_wrappers_do_not_matter(before: str, after: str, how: str, tmp_path: Path) -> None:
    first, ewc = Words(before), EWC(50.0, n_examples=16)
    fit(first, loader(1), ewc)
    same, twin, wrapped = Words(before), EWC(50.0, n_examples=16), Words(after)
    values = list(first.state_dict().values())
    for module in (same, wrapped):
        module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)))
    ewc.save(tmp_path)
    twin.load(tmp_path)
    if how == "saved":
        ewc = EWC(50.0, n_examples=16)
        ewc.load(tmp_path)
    fit(same, loader(2), twin)
    fit(wrapped, loader(2), ewc)
    for one, other in zip(same.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert list(by_name(ewc, "anchor")) == wrapped.names


def test_parameters_that_are_gone_are_counted() -> None:
    ewc = EWC(1.0, n_examples=8)
    fit(Words(), loader(1), ewc)
    with pytest.warns(UserWarning, match=r"3 of the 5 parameters of which EWC has importance and anchor .*backbone\."):
        fit(Words("renamed"), loader(2), ewc)


def test_a_module_without_any_of_the_parameters_is_refused() -> None:
    class Other(Words):
        def __init__(self) -> None:
            super().__init__("renamed")
            self.classifier = self.head
            del self.head

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.net(x))

    ewc, other = EWC(1.0, n_examples=8), Other()
    fit(Words(), loader(1), ewc)
    with pytest.raises(
        ValueError, match=r"none of the 5 parameters .* Keep the names of the parameters from fit to fit"
    ):
        fit(other, loader(2), ewc)


# --- frozen and trainable


class Unfreeze(pl.callbacks.BaseFinetuning):
    """Trains the head first, and the backbone from an epoch on."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.1)


def test_weights_that_become_trainable_within_a_fit_are_protected() -> None:
    module, ewc = Words(), EWC(100.0, n_examples=16)
    fit(module, loader(1), Unfreeze(1), ewc, max_epochs=2)
    assert sorted(by_name(ewc, "importance")) == sorted(module.names)
    assert all(importance.any() for importance in by_name(ewc, "importance").values())
    free = Words()
    free.load_state_dict(module.state_dict())
    start = module.backbone.hidden.weight.detach().clone()
    for one, callbacks in ((free, []), (module, [ewc])):
        fit(one, loader(2), *callbacks, max_epochs=5)
    moved, held = ((one.backbone.hidden.weight - start).norm() for one in (free, module))
    assert held < 0.9 * moved


def test_weights_that_are_frozen_for_a_fit_keep_what_was_learned_of_them() -> None:
    module, ewc = Words(), EWC(1.0, n_examples=16, mode="separate")
    fit(module, loader(1), ewc)
    before, words = by_name(ewc, "importance"), module.backbone.words.weight.detach().clone()
    module.backbone.requires_grad_(False)
    fit(module, loader(2), ewc)
    assert torch.equal(module.backbone.words.weight, words)
    assert all(p.grad is None for p in module.backbone.parameters())
    assert not any(p.requires_grad for p in module.backbone.parameters())
    assert list(by_name(ewc, "importance")) == module.names
    assert all((by_name(ewc, "importance")[name] >= before[name]).all() for name in module.names)
    fit(module, loader(3), Unfreeze(1), ewc, max_epochs=2)
    assert list(by_name(ewc, "importance")) == module.names


# --- precision


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("words", [3, 50], ids=["few rows", "all rows"])
def test_weights_of_any_precision_are_held(precision: str, words: int) -> None:
    """The embeddings of most words have no importance, or all have some."""
    module, free, ewc = Words(), Words(), EWC(20.0, estimator="exact")
    for tag in (1, 2, 3):
        fit(module, loader(tag, words), ewc, Replay(8), precision=precision, max_epochs=3)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for ts in ewc.tensors.values() for t in ts)
    assert all(p.isfinite().all() for p in module.parameters())
    strong = EWC(2_000.0, estimator="exact")
    for one, callbacks in ((free, []), (module := Words(), [strong])):
        fit(one, loader(1, words), *callbacks, precision=precision)
        start = one.backbone.words.weight.detach().double().clone()
        fit(one, loader(2, words), *callbacks, precision=precision, gradient_clip_val=1.0, max_epochs=4)
        one.moved = (one.backbone.words.weight.double() - start).norm()  # type: ignore[assignment]
    assert module.moved < free.moved
