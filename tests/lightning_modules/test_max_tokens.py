"""The number of tokens that a transformer takes: known for each kind of positions, and never exceeded."""

import logging
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertTokenizer

from evertune._lightning import pl
from evertune.drift import FrozenEncoder
from evertune.lightning_modules import SequenceClassificationModule
from evertune.live import Updater
from evertune.sources import FolderSource
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks.texts import truncation_length
from evertune.training.trainer import ContinualTrainer
from tests.helpers.lightning_modules import WORDS

POSITIONS = 40
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
KINDS = {  # the configuration, and the tokens that the transformer takes
    "Bert": ({**SIZE}, POSITIONS),
    "Roberta": ({**SIZE, "pad_token_id": 1}, POSITIONS - 2),
    "XLMRoberta": ({**SIZE, "pad_token_id": 1}, POSITIONS - 2),
    "Camembert": ({**SIZE, "pad_token_id": 1}, POSITIONS - 2),
    "MPNet": ({**SIZE}, POSITIONS - 2),
    "DistilBert": ({"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}, POSITIONS),
    "GPT2": ({"n_embd": 16, "n_layer": 1, "n_head": 2}, POSITIONS),
    "OPT": ({**SIZE, "word_embed_proj_dim": 16, "ffn_dim": 16}, POSITIONS),
    "Llama": ({**SIZE}, POSITIONS),
    "DebertaV2": ({**SIZE, "relative_attention": True, "position_biased_input": False}, None),
    "XLNet": ({"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, None),
    "Bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
}
LONG = "the bank " * 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @cache
    def made(kind: str) -> str:
        """A tiny transformer of a kind; its tokenizer has no maximum."""
        path = tmp_path_factory.mktemp(kind)
        settings, _ = KINDS[kind]
        positions = {} if kind in ("XLNet", "Bloom") else {"max_position_embeddings": POSITIONS}
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(SPECIALS + WORDS), **positions, **settings)
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(path)
        BertTokenizer(vocab={word: i for i, word in enumerate(SPECIALS + WORDS)}).save_pretrained(path)
        return str(path)

    return made


def quiet_trainer(**settings):
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


def data_of(module, **settings):
    rows = [{"text": LONG, "label": name} for name in ("a", "b")] * 4
    return ExperienceDataModule(Experience("one", rows), module.tokenizer, batch_size=4, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_up_to_the_maximum_is_read_and_one_more_is_refused(folder, kind):
    expected = KINDS[kind][1]
    module = SequenceClassificationModule(folder(kind), classes=["a", "b"]).eval()
    assert module.max_tokens == expected, "before the weights are loaded"
    module.configure_model()
    tokens = torch.full((1, expected or 200), 7)
    with torch.no_grad():
        assert module(input_ids=tokens).logits.isfinite().all()
        if expected is not None:
            with pytest.raises(ValueError, match=f"{expected + 1} tokens, but {kind}Model takes at most {expected}"):
                module(input_ids=torch.full((1, expected + 1), 7))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_truncated_when_it_is_predicted(folder, kind):
    module = SequenceClassificationModule(folder(kind), classes=["a", "b"])
    (prediction,) = module.predict([LONG])
    assert sum(prediction.values()) == pytest.approx(1)
    if (limit := KINDS[kind][1]) is not None:
        with pytest.raises(ValueError, match=f"max_length must be at most {limit}, .* got {limit + 1}"):
            module.predict([LONG], max_length=limit + 1)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2"])
def test_training_truncates_to_what_the_model_takes(folder, kind):
    module = SequenceClassificationModule(folder(kind), classes=["a", "b"])
    data = data_of(module)
    quiet_trainer().fit(module, datamodule=data)
    assert max(data.dataset("train").lengths) == (KINDS[kind][1] or 128)


def test_a_longer_setting_is_refused_before_the_first_step(folder):
    module = SequenceClassificationModule(folder("Roberta"), classes=["a", "b"])
    trainer = quiet_trainer()
    with pytest.raises(
        ValueError, match=r"max_length must be at most 38, .* SequenceClassificationModule takes, got 39"
    ):
        trainer.fit(module, datamodule=data_of(module, max_length=39))
    assert trainer.global_step == 0


def test_a_frozen_encoder_truncates_too(folder):
    encoder = FrozenEncoder(folder("Roberta"))
    assert encoder.max_length == 38
    assert encoder([LONG]).shape == (1, 16)
    with pytest.raises(ValueError, match="max_length must be at most 38"):
        FrozenEncoder(folder("Roberta"), max_length=64)


def test_updates_truncate_to_what_the_model_takes_and_say_so(folder, tmp_path: Path, caplog):
    module = SequenceClassificationModule(folder("Roberta"))
    with caplog.at_level(logging.WARNING, "evertune.live"):
        updater = Updater(
            tmp_path / "registry",
            FolderSource(str(tmp_path)),
            module,
            ContinualTrainer(max_epochs=1),
            data={"max_length": 128},
        )
    assert "data.max_length is 128, but the model takes at most 38 tokens" in caplog.text
    assert updater.data["max_length"] == 38


@pytest.mark.parametrize("unlimited", [10**30, int(1e30), 2**63])
def test_a_tokenizer_of_an_unlimited_model_may_say_so_in_any_way(folder, tmp_path, unlimited):
    path = shutil.copytree(folder("XLNet"), tmp_path / "xlnet")
    tokenizer = BertTokenizer.from_pretrained(path)
    tokenizer.model_max_length = unlimited
    tokenizer.save_pretrained(path)
    assert len(SequenceClassificationModule(str(path), classes=["a", "b"]).predict([LONG])) == 1


def test_a_model_without_a_maximum_takes_any_setting(folder):
    module = SequenceClassificationModule(folder("XLNet"))
    assert truncation_length(5_000, module.tokenizer, module) == 5_000
    assert truncation_length(None, module.tokenizer, module) == 128
