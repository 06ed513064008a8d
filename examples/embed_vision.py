"""Path 1, embed: add evertune to a Lightning project that has never heard of it.

A small convolutional network learns the handwritten digits 0 to 4 and, in a second fit, 5 to 9. The module, the
loaders and the trainer are plain Lightning; with the two callbacks it keeps what it knew. Needs ``pip install
scikit-learn`` for the images (1,797 real ones, 8 x 8 pixels); takes seconds on a CPU.
"""

import logging

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from evertune.callbacks import EWC, Replay


class ConvNet(pl.LightningModule):
    """The project's own module. Its batches are tuples; nothing in it knows about continual learning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
            nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return F.cross_entropy(self(images), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def load(digits: range) -> tuple[DataLoader, DataLoader]:
    """Three quarters of the images of these digits to train on, the others to test on."""
    data = load_digits()
    images, targets = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target)
    chosen = torch.isin(targets, torch.tensor(digits))
    examples = TensorDataset(images[chosen], targets[chosen])
    train, test = random_split(examples, [0.75, 0.25], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=256)


def accuracy(module: pl.LightningModule, loader: DataLoader) -> float:
    module.eval()
    with torch.no_grad():
        hits = [module(images).argmax(1) == digits for images, digits in loader]
    return torch.cat(hits).float().mean().item()


def learn(callbacks: list[pl.Callback]) -> tuple[float, float]:
    """Learn 0 to 4, then 5 to 9; the accuracy on each at the end."""
    pl.seed_everything(0, verbose=False)
    (old_train, old_test), (new_train, new_test) = load(range(5)), load(range(5, 10))
    module = ConvNet()
    for loader in (old_train, new_train):
        trainer = pl.Trainer(
            max_epochs=8,
            accelerator="cpu",
            callbacks=[*callbacks],  # the same objects in both fits: they remember
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    return accuracy(module, old_test), accuracy(module, new_test)


def main() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    methods = {"no callbacks": [], "Replay + EWC": [Replay(memory_size=100), EWC()]}
    print(f"{'':14}{'digits 0-4':>12}{'digits 5-9':>12}")
    for name, callbacks in methods.items():
        old, new = learn(callbacks)
        print(f"{name:14}{old:>12.1%}{new:>12.1%}")


if __name__ == "__main__":
    main()
