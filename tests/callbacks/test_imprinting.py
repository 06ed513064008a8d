"""Imprinting: the rows of new classes are the means of their examples, and no other row changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks import Imprinting
from evertune.lightning_modules import SequenceClassificationModule
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.texts import PadCollator
from evertune.utils.evaluation import evaluation_mode
from tests.helpers.shard_worker import Sentences, make_bert


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bert(tmp_path_factory.mktemp("bert"))


class RowsAtFirstStep(pl.Callback):
    """Keeps the head's rows, and the features of each example, as they are before the first step."""

    def __init__(self, data: Sentences) -> None:
        self.data = data

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.rows = pl_module.head.weight.detach().clone()
            with evaluation_mode(pl_module):
                one = (PadCollator(0)([self.data[index]]) for index in range(len(self.data)))
                self.features = torch.cat([pl_module.features(batch) for batch in one])

    def mean(self, label: str, most: int = 64) -> Tensor:
        where = [index for index, example in enumerate(self.data.examples) if example["labels"] == label][:most]
        return F.normalize(F.normalize(self.features[where].double(), dim=-1).mean(0), dim=0).float()


def fit(module: Any, data: Sentences, classes: list[str], *callbacks: pl.Callback, **settings: Any) -> RowsAtFirstStep:
    rows = RowsAtFirstStep(data)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[rows, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **settings},
    )
    experience = Experience("one", data, classes=classes)
    batches = ExperienceDataModule(experience, batch_size=4, collate_fn=PadCollator(0), label="labels")
    trainer.fit(module, datamodule=batches, ckpt_path=settings.pop("ckpt_path", None))
    return rows


def build(bert: str, classes: list[str]) -> SequenceClassificationModule:
    torch.manual_seed(0)
    return SequenceClassificationModule(bert, classes=classes, head="cosine", learning_rate=1e-2)


def test_rows_of_new_classes_are_the_means_of_their_examples(bert: str) -> None:
    module, imprint = build(bert, ["a", "b"]), Imprinting(examples_per_class=5)
    first = fit(module, Sentences(18, ["a", "b"], 1), ["a", "b"], imprint)
    for row, name in zip(first.rows, "ab", strict=True):
        torch.testing.assert_close(row, first.mean(name, 5), rtol=1e-5, atol=1e-6)
    assert imprint.imprinted == {0, 1}

    trained = module.head.weight.detach().clone()
    assert not torch.allclose(trained, first.rows)
    second = fit(module, Sentences(18, ["b", "c"], 2), ["b", "c"], imprint)
    torch.testing.assert_close(second.rows[2], second.mean("c", 5), rtol=1e-5, atol=1e-6)
    assert torch.equal(second.rows[:2], trained)
    assert imprint.imprinted == {0, 1, 2}


def test_a_class_without_examples_is_imprinted_when_they_come(bert: str) -> None:
    module, imprint = build(bert, ["a", "b", "c"]), Imprinting()
    first = fit(module, Sentences(8, ["a", "c"], 1), ["a", "c"], imprint)
    assert imprint.imprinted == {0, 2}
    torch.testing.assert_close(first.rows[2], first.mean("c"), rtol=1e-5, atol=1e-6)
    second = fit(module, Sentences(8, ["b"], 2), ["b"], imprint)
    torch.testing.assert_close(second.rows[1], second.mean("b"), rtol=1e-5, atol=1e-6)


def test_a_fit_that_fails_imprints_again_and_one_that_resumes_does_not(bert: str, tmp_path: Path) -> None:
    class FailAt(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                raise RuntimeError("out of luck")

    data, imprint = Sentences(18, ["a", "b"], 1), Imprinting()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(build(bert, ["a", "b"]), data, ["a", "b"], imprint, FailAt())
    assert imprint.imprinted == set()
    again = fit(build(bert, ["a", "b"]), data, ["a", "b"], imprint)
    torch.testing.assert_close(again.rows[0], again.mean("a"), rtol=1e-5, atol=1e-6)

    class Started(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.rows = pl_module.head.weight.detach().clone()

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            assert batch_idx > 2 or torch.equal(pl_module.head.weight, self.rows)

    resumed, started = Imprinting(), Started()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[started, resumed],
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    experience = Experience("one", data, classes=["a", "b"])
    batches = ExperienceDataModule(experience, batch_size=4, collate_fn=PadCollator(0), label="labels")
    trainer.fit(build(bert, ["a", "b"]), datamodule=batches, ckpt_path=tmp_path / "middle.ckpt")
    assert resumed.imprinted == {0, 1}


def test_saved_and_loaded(bert: str, tmp_path: Path) -> None:
    imprint, fresh, from_checkpoint = Imprinting(), Imprinting(), Imprinting()
    fit(build(bert, ["a", "b"]), Sentences(8, ["a", "b"], 1), ["a", "b"], imprint)
    imprint.save(tmp_path)
    fresh.load(tmp_path)
    from_checkpoint.load_state_dict(imprint.state_dict())
    assert fresh.imprinted == from_checkpoint.imprinted == {0, 1}
    assert fresh.experience_index == from_checkpoint.experience_index == 1
    (tmp_path / "imprinting.json").write_text("[]")
    with pytest.raises(ValueError, match=r"imprinting.json is corrupt"):
        fresh.load(tmp_path)


def test_what_cannot_work_is_refused_by_name(bert: str) -> None:
    data = Sentences(8, ["a", "b"], 1)
    with pytest.raises(ValueError, match="examples_per_class must be positive, got 0"):
        Imprinting(examples_per_class=0)
    with pytest.raises(ValueError, match=r"has head='linear': pass head='cosine'"):
        fit(SequenceClassificationModule(bert, classes=["a", "b"]), data, ["a", "b"], Imprinting())
    with pytest.raises(ValueError, match=r"no weight 'rows' is trained; pass head=, one of \['backbone"):
        fit(build(bert, ["a", "b"]), data, ["a", "b"], Imprinting(head="rows"))
    with pytest.raises(ValueError, match=r"features have length 2, the rows of 'head.weight' \[16\]"):
        fit(build(bert, ["a", "b"]), data, ["a", "b"], Imprinting(features=lambda m, b: m.features(b)[:, :2]))
