"""Which strength EWC needs on small networks of different sizes: normalized, and as published.

Three experiences: the digits of scikit-learn, and the same with their pixels permuted in two ways. Networks with two
hidden layers learn one after the other, with Adam for ten epochs each, and are scored on all three at the end (average
of the 597 held-out digits of each). For each size and kind of EWC: the best of several strengths, and the default,
which is for pretrained transformers (``benchmarks/text_streams.py``). The limit is on how far the best strengths of the
normalized EWC lie apart, as the largest over the smallest.

``--quick`` takes half a minute: one size, without EWC and with the default. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from evertune._lightning import pl
from evertune.callbacks import EWC

WIDTHS = (30, 100, 400)
STRENGTHS = {True: (0.01, 0.03, 0.1, 0.3, 1.0), False: (1.0, 10.0, 100.0, 1_000.0, 10_000.0)}
DEFAULT = EWC().ewc_lambda
SPREAD = 10.0
"""Limit of the ratio of the largest of the best strengths to the smallest."""
TRAIN, EPOCHS = 1_200, 10


class Network(pl.LightningModule):
    """A network with two hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def experiences() -> list[TensorDataset]:
    """The digits, and the same with their pixels in two other orders."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    permuted = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return [TensorDataset(x[:, columns], y) for columns in (torch.arange(64), *permuted)]


def learn(width: int, callbacks: list[pl.Callback]) -> float:
    """The average accuracy on all experiences at the end, in percent."""
    module, stream = Network(width), experiences()
    for experience in stream:
        torch.manual_seed(1)
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(*experience[:TRAIN]), batch_size=32, shuffle=True))
    correct = [(module(x).argmax(1) == y).float().mean() for x, y in (experience[TRAIN:] for experience in stream)]
    return 100 * torch.stack(correct).mean().item()


def main() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="one size, without EWC and with the default")
    quick = parser.parse_args().quick
    table = Table("width", "weights", "without", "as published", "normalized", f"default ({DEFAULT})")
    table.title = "Average accuracy after three experiences, and the best strength"
    results: dict[str, float] = {}
    for width in (100,) if quick else WIDTHS:
        weights = sum(parameter.numel() for parameter in Network(width).parameters())
        without, default = learn(width, []), learn(width, [EWC()])
        results |= {f"without_{width}": round(without, 1), f"default_{width}": round(default, 1)}
        shown = []
        for normalize, tried in STRENGTHS.items() if not quick else ():
            scores = {one: learn(width, [EWC(one, normalize=normalize)]) for one in tried}
            best = max(scores, key=lambda one: scores[one])
            kind = "normalized" if normalize else "published"
            results |= {f"{kind}_{width}": round(scores[best], 1), f"{kind}_{width}_strength": best}
            shown.insert(0, f"{scores[best]:.1f} at {best:g}")
        table.add_row(f"{width}", f"{weights:,}", f"{without:.1f}", *(shown or ["", ""]), f"{default:.1f}")
    Console().print(table)
    bars: dict[str, Any] = {}
    if strengths := [value for name, value in results.items() if re.fullmatch(r"normalized_\d+_strength", name)]:
        spread = max(strengths) / min(strengths)
        bars["spread"] = {"value": round(spread, 1), "limit": SPREAD, "ok": spread <= SPREAD}
    size = {"widths": [100] if quick else list(WIDTHS), "epochs": EPOCHS, "examples": TRAIN}
    print(json.dumps({"benchmark": "ewc_strength", "size": size, "results": results, "bars": bars}))


if __name__ == "__main__":
    main()
