"""The modules on two real processes: growing, saving and predicting give what one process gives."""

import pytest
import torch
from safetensors.torch import load_file

from evertune._lightning import pl
from evertune.lightning_modules import SequenceClassificationModule
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import loader, tiny_bert


def learn_two_experiences(folder, out, strategy, devices, head):
    """Learn two classes, then a third with the head grown, and save; the epochs have one global batch of 6."""
    pl.seed_everything(3)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = SequenceClassificationModule(folder, dropout=0.0, head=head, learning_rate=1e-3, n_classes_ahead=2)
    for classes in (["business", "sport"], ["politics", "sport"]):
        module.add_classes(classes)
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            enable_model_summary=False,
            **settings,
        )
        trainer.fit(module, loader(folder, classes, batch_size=6 // devices))
    module.save_pretrained(out)
    lazy = SequenceClassificationModule.from_pretrained(out, lazy=True)
    trainer = pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, enable_model_summary=False, **settings)
    result = trainer.validate(lazy, loader(folder, ["politics", "sport"], batch_size=2), verbose=False)[0]
    return {"predictions": module.predict(["the bank", "a goal"]), "val_loss": result["val_loss"]}


@pytest.mark.parametrize(("strategy", "head"), [("ddp", "linear"), ("evertune_deepspeed_stage_3", "cosine")])
def test_two_ranks_learn_what_one_process_learns(tmp_path, strategy, head):
    folder = tiny_bert(tmp_path / "model")
    one = learn_two_experiences(folder, str(tmp_path / "one"), "auto", 1, head)
    ranks = run_ranks(
        f"{__name__}:learn_two_experiences",
        2,
        folder=folder,
        out=str(tmp_path / "two"),
        strategy=strategy,
        devices=2,
        head=head,
    )
    for rank in ranks:
        assert rank["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
        for ours, theirs in zip(rank["predictions"], one["predictions"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    for name in ("head.safetensors", "model.safetensors"):
        expected, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-4, atol=2e-5), key
    assert load_file(tmp_path / "two/head.safetensors")["head.weight"].shape == (3, 32)
