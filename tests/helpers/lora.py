"""A small network with adapters, and the same network by hand in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from evertune._lightning import pl

RATE, SCALE = 0.1, 1.5
LAYERS = ("first", "second")


class Adapted(pl.LightningModule):
    """Two layers with adapters of rank 2, and a head; knows nothing of evertune."""

    def __init__(self, optimizer: str = "sgd", **settings: Any) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(0)
        self.net = nn.ModuleDict({"first": nn.Linear(6, 5), "second": nn.Linear(5, 5)})
        self.head = nn.Linear(5, 3)
        self.optimizer = optimizer
        config: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": list(LAYERS)} | settings
        inject_adapter_in_model(LoraConfig(**config), self.net)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.net["second"](torch.tanh(self.net["first"](x)))))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=RATE) if self.optimizer == "sgd" else torch.optim.AdamW(trained, lr=0.01)


def data(seed: int, n: int = 40) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (n,), generator=generator)), batch_size=8)


class Starts(pl.Callback):
    """The matrices ``A`` that each fit starts with: these are drawn, and no formula gives them."""

    def __init__(self) -> None:
        self.downs: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.downs.append({name: down(pl_module, name).double() for name in LAYERS})


def down(module: Any, name: str) -> Tensor:
    weight: Tensor = module.net[name].lora_A["default"].weight.detach().clone()
    return weight


def up(module: Any, name: str) -> Tensor:
    weight: Tensor = module.net[name].lora_B["default"].weight.detach().clone()
    return weight


def effective(module: Any) -> dict[str, Tensor]:
    """The weights with which the network computes: those of the layers with their adapters, and of the head."""
    found = {
        name: module.net[name].base_layer.weight.detach().double()
        + SCALE * up(module, name).double() @ down(module, name).double()
        for name in LAYERS
    }
    return found | {"head": module.head.weight.detach().double(), "bias": module.head.bias.detach().double()}


class ByHand:
    """The same network in float64, in which all adapters stay apart: ``W + SCALE * sum_i B_i A_i``.

    Args:
        module: Where to start.
        term: Function ``(earlier A_i, A_t) -> term of the loss`` for each layer.
        trains_down: Whether ``A_t`` is trained.
    """

    def __init__(self, module: Any, term: Callable[[list[Tensor], Tensor], Any] | None = None) -> None:
        self.weights = {
            name: module.net[name].base_layer.weight.detach().to(torch.float64, copy=True) for name in LAYERS
        }
        self.biases = {name: module.net[name].base_layer.bias.detach().to(torch.float64, copy=True) for name in LAYERS}
        self.head = [p.detach().to(torch.float64, copy=True) for p in (module.head.weight, module.head.bias)]
        self.adapters: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in LAYERS}
        self.term, self.trains_down = term, True

    def weight(self, name: str) -> Tensor:
        """The effective weight of a layer."""
        return self.weights[name] + sum(SCALE * b @ a for a, b in self.adapters[name])

    def forward(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The input of each layer and of the head."""
        for name in LAYERS:
            yield name, x
            x = torch.tanh(x @ self.weight(name).T + self.biases[name])
        yield "head", x

    def learn(self, batches: Any, downs: dict[str, Tensor], steps: int | None = None) -> ByHand:
        """An experience, with a new adapter that starts from given ``A_t``."""
        for name in LAYERS:
            self.adapters[name].append((downs[name], torch.zeros(5, len(downs[name]), dtype=torch.float64)))
        for x, y in list(batches)[:steps]:
            leaves = [tensor.requires_grad_() for name in LAYERS for tensor in self.adapters[name][-1]] + [
                tensor.requires_grad_() for tensor in self.head
            ]
            features = dict(self.forward(x.double()))["head"]
            loss = nn.functional.cross_entropy(features @ self.head[0].T + self.head[1], y)
            if self.term is not None:
                for name in LAYERS:
                    earlier = [a.detach() for a, _ in self.adapters[name][:-1]]
                    loss = loss + self.term(earlier, self.adapters[name][-1][0])
            gradients = torch.autograd.grad(loss, leaves)
            moved = [(leaf - RATE * g).detach() for leaf, g in zip(leaves, gradients, strict=True)]
            for number, name in enumerate(LAYERS):
                a = moved[2 * number] if self.trains_down else leaves[2 * number].detach()
                self.adapters[name][-1] = (a, moved[2 * number + 1])
            self.head = moved[-2:]
        return self

    def effective(self) -> dict[str, Tensor]:
        """As :func:`effective`."""
        found = {name: self.weight(name).detach() for name in LAYERS}
        return found | {"head": self.head[0].detach(), "bias": self.head[1].detach()}


def assert_same(module: Any, by_hand: ByHand, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    found, expected = effective(module), by_hand.effective()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
