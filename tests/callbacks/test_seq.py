"""SEQ*, against a loop written from the paper."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from evertune._lightning import pl
from evertune.callbacks import EWC, SEQ
from tests.callbacks.test_ewc import Classifier, fit, flat_weights, loader
from tests.callbacks.test_l2sp import InDouble


def experience(seed: int, classes: list[int]) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes)[torch.randint(0, len(classes), (40,), generator=generator)]
    return DataLoader(TensorDataset(torch.randn(40, 4, generator=generator), y), batch_size=8)


def only_rows(module: Classifier, rows: list[int]) -> Tensor:
    """Which weights move: these rows of the head."""
    masks = []
    for name, p in module.named_parameters():
        mask = torch.zeros_like(p, dtype=torch.bool)
        if name.startswith("head"):
            mask[rows] = True
        masks.append(mask.flatten())
    return torch.cat(masks)


@pytest.mark.parametrize("steps", [1, 5])
def test_as_in_the_paper(steps: int) -> None:
    """After one step of the second experience, and after three experiences."""
    module, method = Classifier(classes=4), SEQ()
    by_hand, known = InDouble(module), set[int]()
    for seed, classes in ((1, [0, 1]), (2, [1, 2]), (3, [3])):
        data, new = experience(seed, classes), [c for c in range(4) if c not in known]
        moves = only_rows(module, new) if known else torch.ones_like(by_hand.flat, dtype=torch.bool)
        trained = 5 if seed == 1 else steps
        for x, y in list(data)[:trained]:
            by_hand.set(by_hand.flat - 0.1 * torch.where(moves, by_hand.gradient(x, y), 0.0))
        fit(module, data, method, max_steps=trained)
        torch.testing.assert_close(flat_weights(module).double(), by_hand.flat, rtol=1e-5, atol=1e-6)
        known |= set(classes)
        assert method.known == known


class Adam(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.01}, {"accumulate_grad_batches": 2}])
def test_known_rows_and_the_encoder_stay_to_the_bit(settings: dict[str, Any]) -> None:
    module, method, ewc = Adam(classes=4), SEQ(), EWC(n_examples=8)
    fit(module, experience(1, [0, 1]), method, ewc)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, experience(2, [0, 2]), method, ewc, **settings)
    for name, p in module.named_parameters():
        if name.startswith("head"):
            assert torch.equal(p[:2], before[name][:2])
            assert not torch.equal(p[2:], before[name][2:])
        else:
            assert torch.equal(p, before[name])


def test_it_goes_on_from_a_folder_and_from_a_checkpoint(tmp_path: Path) -> None:
    class SaveAfterOneEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    module, method = Adam(classes=4), SEQ()
    fit(module, experience(1, [0, 1]), method)
    method.save(tmp_path / "seq")
    start = copy.deepcopy(module)
    fit(module, experience(2, [2]), method, SaveAfterOneEpoch(), max_epochs=2)
    for fresh, ckpt in ((copy.deepcopy(start), None), (Adam(classes=4), tmp_path / "middle.ckpt")):
        loaded = SEQ()
        loaded.load(tmp_path / "seq")
        assert (loaded.known, loaded.experience_index) == ({0, 1}, 1)
        fit(fresh, experience(2, [2]), loaded, max_epochs=2, ckpt=ckpt)
        assert torch.equal(flat_weights(fresh), flat_weights(module))
        assert loaded.known == {0, 1, 2}
    with pytest.raises(ValueError, match="the checkpoint's SEQ has completed 1 experiences, this one 0"):
        fit(Adam(classes=4), experience(2, [2]), SEQ(), max_epochs=2, ckpt=tmp_path / "middle.ckpt")


def test_what_cannot_work_is_refused() -> None:
    module, method = Classifier(classes=4), SEQ()
    fit(module, experience(1, [0, 1]), method)
    with pytest.raises(ValueError, match=r"SEQ learns new classes, and all of this experience's are known: \[0, 1\]"):
        fit(module, experience(2, [0, 1]), method)
    with pytest.raises(ValueError, match="finds no trained weight in 'top'; pass head="):
        fit(Classifier(), loader(1), SEQ(head="top"))
    with pytest.raises(ValueError, match="SEQ works with one optimizer, got 2"):
        fit(Classifier(n_optimizers=2), loader(1), SEQ())
