"""The modules on two real processes: growing, saving and predicting give what one process gives."""

import pytest
import torch
from safetensors.torch import load_file

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.lightning_modules import AnalyticClassificationModule, SequenceClassificationModule
from evertune.lightning_modules.pruning import prune
from evertune.streams import Experience, ExperienceDataModule
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import TEXTS, loader, tiny_bert
from tests.helpers.quiet import QUIET


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


@pytest.mark.parametrize(
    ("strategy", "head", "heads_removed"),
    [
        ("ddp", "linear", 0),
        ("evertune_deepspeed_stage_3", "cosine", 0),
        ("evertune_fsdp2", "linear", 0),
        pytest.param("evertune_deepspeed_stage_3", "linear", 0.5, marks=pytest.mark.slow),
        pytest.param("evertune_fsdp2", "linear", 0.5, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_what_one_process_learns(tmp_path, strategy, head, heads_removed):
    folder = tiny_bert(tmp_path / "model")
    if heads_removed:
        module = SequenceClassificationModule(folder, classes=["business", "sport"])
        module.configure_model()
        prune(module, [], heads=heads_removed)
        module.save_pretrained(folder := str(tmp_path / "narrow"))
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


def unfreeze(folder, out, strategies, devices):
    """One update under each strategy, in which the layers join one after another, with EWC from the second on."""
    for strategy in strategies:
        pl.seed_everything(3)
        module = SequenceClassificationModule(
            folder, classes=["business", "sport"], dropout=0.0, learning_rate=1e-3, unfreeze_ratio=0.5
        )
        callbacks = [EWC(ewc_lambda=1.0, n_examples=4), Replay(memory_size=4)]
        for _ in range(2):
            settings = {"max_epochs": 4, "accelerator": "cpu", "devices": devices, "strategy": strategy}
            batches = loader(folder, ["business", "sport"], batch_size=6 // devices)
            pl.Trainer(**settings, **QUIET, callbacks=callbacks).fit(module, batches)
        module.save_pretrained(f"{out}/{strategy}")


@pytest.mark.parametrize(
    "strategies",
    [
        ["ddp", "evertune_deepspeed_stage_2"],
        pytest.param(
            ["evertune_deepspeed_stage_1", "evertune_deepspeed_stage_3", "evertune_fsdp2"], marks=pytest.mark.slow
        ),
    ],
)
def test_layers_join_on_every_strategy_as_on_one_process(tmp_path, strategies):
    folder = tiny_bert(tmp_path / "model")
    unfreeze(folder, str(tmp_path / "one"), ["auto"], 1)
    run_ranks(f"{__name__}:unfreeze", 2, folder=folder, out=str(tmp_path), strategies=strategies, devices=2)
    expected = load_file(tmp_path / "one/auto/model.safetensors")
    for strategy in strategies:
        found = load_file(tmp_path / strategy / "model.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=f"{strategy}: {name}")


def learn_without_training(folder, out, strategies, devices):
    """Two experiences under each strategy, the second with a new class, and one that fails on the way."""
    found = {}
    for strategy in strategies:
        module = AnalyticClassificationModule(folder, features="relu", solver="ridge", n_features=48)
        for classes in (["business", "sport"], ["politics"]):
            rows = [{"text": text, "label": name} for name in classes for text in TEXTS[name]]
            experience = Experience("-".join(classes), rows, rows, classes=classes)
            data = ExperienceDataModule(experience, module.tokenizer, task=module.task, batch_size=4 // devices)
            settings = {"max_epochs": 2, "accelerator": "cpu", "devices": devices, "strategy": strategy}
            pl.Trainer(**settings, **QUIET, callbacks=[Replay(memory_size=4)]).fit(module, data)
        module.save_pretrained(f"{out}/{strategy}")
        counts = module.head.statistics.counts.tolist()
        found[strategy] = {"counts": counts, "predictions": module.predict(["the bank", "a goal", "a law"])}
    return found


@pytest.mark.parametrize(
    "strategies",
    [
        ["ddp", "evertune_deepspeed_stage_3", "evertune_fsdp2"],
        pytest.param(["evertune_deepspeed_stage_1", "evertune_deepspeed_stage_2"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_count_what_one_process_counts(tmp_path, strategies):
    folder = tiny_bert(tmp_path / "model")
    one = learn_without_training(folder, str(tmp_path / "one"), ["auto"], 1)["auto"]
    target = f"{__name__}:learn_without_training"
    ranks = run_ranks(target, 2, folder=folder, out=str(tmp_path / "two"), strategies=strategies, devices=2)
    expected = load_file(tmp_path / "one/auto/head.safetensors")
    assert one["counts"] == [3, 3, 3]
    for strategy in strategies:
        for rank in ranks:
            assert rank[strategy]["counts"] == [3, 3, 3]
            for ours, theirs in zip(rank[strategy]["predictions"], one["predictions"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        found = load_file(tmp_path / "two" / strategy / "head.safetensors")
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max()))
