"""The number of epochs follows from the size of an update."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader

from evertune import ContinualTrainer
from evertune._lightning import pl
from evertune.callbacks import UpdateLength
from evertune.streams import Experience
from tests.callbacks.test_logit_adjustment import Classifier, Endless, examples, fit
from tests.helpers.quiet import QUIET


class Epochs(pl.Callback):
    across_experiences = True

    def __init__(self) -> None:
        self.run: list[int] = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.run.append(trainer.current_epoch)


def test_small_updates_get_more_epochs() -> None:
    stream = [Experience(str(n), examples([0, 1] * (n // 2)), test=examples([0, 1])) for n in (4, 8, 40)]
    epochs = Epochs()
    trainer = ContinualTrainer(
        callbacks=[UpdateLength(examples=16, max_epochs=3), epochs],
        accelerator="cpu",
        **QUIET,
    )
    trainer.fit_stream(Classifier(2), stream)
    assert epochs.run == [3, 2, 1]


def test_a_plain_trainer_with_a_loader() -> None:
    epochs = Epochs()
    fit(Classifier(2), examples([0, 1] * 4), UpdateLength(examples=16), epochs, max_epochs=50)
    assert epochs.run == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": 0}, "examples must be positive, got 0"),
        ({"max_epochs": -1}, "max_epochs must be positive, got -1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateLength(**settings)


def test_data_without_a_length_are_refused() -> None:
    loader: Any = DataLoader(Endless(), batch_size=2)
    with pytest.raises(ValueError, match="needs training data with a length"):
        fit(Classifier(2), loader, UpdateLength())
