"""Virtual tokens that are trained instead of the transformer, and AdaLoRA's allocation of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from evertune._lightning import pl
from evertune.callbacks import EWC
from evertune.export.formats import merged
from evertune.lightning_modules import (
    CausalLMModule,
    SequenceClassificationModule,
    SequenceRegressionModule,
    TokenClassificationModule,
)
from evertune.lightning_modules.pruning import prune
from tests.helpers.distributed import run_ranks
from tests.helpers.generation import tiny_llama
from tests.helpers.lightning_modules import TEXTS, loader, tiny_bert
from tests.lightning_modules.test_modules import batch_of, build, trainer

PROMPTS: list[dict[str, Any]] = [
    {"method": "prompt_tuning", "num_virtual_tokens": 4},
    {"method": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 8},
    {"method": "prefix_tuning", "num_virtual_tokens": 4},
    {"method": "prefix_tuning", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
]
ADALORA = {"method": "adalora", "init_r": 4, "target_r": 2, "target_modules": ["query", "value"]}
IDS = ["prompt", "p", "prefix", "projected"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("model"))


def changed_in(module: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("peft", PROMPTS, ids=IDS)
def test_only_the_prompt_and_the_head_are_trained(model: str, peft: dict[str, Any], tmp_path: Path) -> None:
    module = build(model, peft=peft, head_learning_rate=0.01, dropout=0.0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(max_epochs=2).fit(module, loader(model, ["business", "sport"]))
    changed = changed_in(module, before)
    assert changed == {name for name, value in module.named_parameters() if value.requires_grad}
    assert {name.partition(".")[0] for name in changed} == {"prompt", "head"}
    module.eval().save_pretrained(tmp_path)
    again = SequenceClassificationModule.from_pretrained(tmp_path).eval()
    batch = batch_of(module, TEXTS["sport"])
    assert torch.equal(again(**batch).logits, module(**batch).logits)
    assert not any(parameter.requires_grad for parameter in again.backbone.parameters())
    with pytest.raises(ValueError, match=f"virtual tokens of {peft['method']} cannot be merged"):
        merged(tmp_path)


@pytest.mark.parametrize("peft", PROMPTS, ids=IDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_does_not_matter(model: str, peft: dict[str, Any], attention: str) -> None:
    module = build(model, peft=peft, attention=attention).eval()
    alone = module(**batch_of(module, ["goal match"])).logits
    beside = module(**batch_of(module, ["goal match", "the bank share of a market"])).logits
    torch.testing.assert_close(beside[:1], alone)
    assert not torch.allclose(alone, build(model).eval()(**batch_of(module, ["goal match"])).logits)


def test_a_prompt_of_words_gives_what_the_words_give(model: str) -> None:
    """Soft tokens with the embeddings of words, before a text whose own first token is where it would be."""
    module = build(model, peft=PROMPTS[0]).eval()
    batch = batch_of(module, ["goal match"])
    words = torch.tensor([[7, 8, 9, 10]])
    module.prompt.encoder.embedding.weight.data = module.backbone.get_input_embeddings()(words[0]).clone()
    with_words = {
        "input_ids": torch.cat([words, batch["input_ids"]], 1),
        "attention_mask": torch.ones(1, 4 + batch["input_ids"].shape[1], dtype=torch.long),
    }
    expected = module.backbone(**with_words).last_hidden_state[:, 4:]
    torch.testing.assert_close(module.encode(**batch).last_hidden_state, expected)


def test_a_prefix_of_words_gives_what_the_words_give(model: str) -> None:
    """Keys and values of a first layer that are those of words; the second layer sees others, so one layer is used."""
    module = build(model, peft=PROMPTS[2]).eval()
    module.backbone.encoder.layer = module.backbone.encoder.layer[:1]
    module.prompt._n_layers = 1
    batch, words = batch_of(module, ["goal match"]), torch.tensor([[7, 8, 9, 10]])
    attention = module.backbone.encoder.layer[0].attention.self
    hidden = module.backbone.embeddings(input_ids=words)
    keys_and_values = torch.stack([attention.key(hidden)[0], attention.value(hidden)[0]], 1)
    module.prompt.encoder.embedding = torch.nn.Embedding.from_pretrained(keys_and_values.flatten(1))
    with_words = {
        "input_ids": torch.cat([words, batch["input_ids"]], 1),
        "attention_mask": torch.ones(1, 4 + batch["input_ids"].shape[1], dtype=torch.long),
    }
    expected = module.backbone(**with_words).last_hidden_state[:, 4:]
    torch.testing.assert_close(module.encode(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("peft", PROMPTS, ids=IDS)
def test_their_importance_does_not_depend_on_the_batch(model: str, peft: dict[str, Any]) -> None:
    found = []
    for batch_size in (1, 3):
        module = build(model, peft=peft, dropout=0.0, learning_rate=1e-9, head_learning_rate=1e-9)
        ewc = EWC(ewc_lambda=1.0, batch_size=batch_size, n_examples=6)
        trainer(callbacks=[ewc]).fit(module, loader(model, ["business", "sport"], batch_size=6))
        found.append(ewc.tensors["importance"])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-8)


def test_other_tasks_take_prompts(model: str) -> None:
    tagger = TokenClassificationModule(model, classes=["ORG"], peft=PROMPTS[0])
    tagger.configure_model()
    tokens = batch_of(tagger, ["the bank"])
    assert tagger(**tokens).logits.shape[:2] == tokens["input_ids"].shape
    assert isinstance(SequenceRegressionModule(model, peft=PROMPTS[2]).predict(["the bank"])[0], float)


def test_they_leave_less_room_for_the_text(model: str) -> None:
    module = build(model, peft=PROMPTS[0])
    assert module.max_tokens == 32 - 4 == module.tokenizer.model_max_length
    module.predict(["the bank share " * 30])
    with pytest.raises(ValueError, match="max_length must be at most 28"):
        module.predict(["the bank"], max_length=32)


# --- AdaLoRA


def n_kept(module: Any) -> list[int]:
    """Ranks that are left in each layer."""
    return [int((value != 0).sum()) for name, value in module.named_parameters() if ".lora_E." in name]


class Kept(pl.Callback):
    """Notes before each batch how many ranks are left."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(sum(n_kept(pl_module)))


def adalora(model: str, **settings: Any) -> Any:
    return build(model, peft=ADALORA | settings, learning_rate=0.01, dropout=0.0)


def test_ranks_go_until_the_target_is_left(model: str, tmp_path: Path) -> None:
    module, kept = adalora(model), Kept()
    batch = batch_of(module.eval(), TEXTS["sport"])
    torch.testing.assert_close(module(**batch).logits, build(model).eval()(**batch).logits)  # they start as nothing
    trainer(max_epochs=10, callbacks=[kept]).fit(module, loader(model, ["business", "sport"], batch_size=3))  # 20 steps
    assert kept.seen[:3] == [0, 16, 16]  # two layers, query and value, four ranks each, after the first step
    assert kept.seen[14:] == [8] * 6  # in the last three tenths, two each on average
    assert sorted(kept.seen[1:], reverse=True) == kept.seen[1:]
    assert sum(n_kept(module)) == 8
    module.eval().save_pretrained(tmp_path)
    again = SequenceClassificationModule.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, module(**batch).logits)
    base = AutoModel.from_pretrained(tmp_path).state_dict()  # what transformers reads: the frozen transformer
    for name, value in AutoModel.from_pretrained(model).state_dict().items():
        assert name.startswith("pooler.") or torch.equal(base[name], value)
    without = merged(tmp_path)
    assert without.peft is None
    torch.testing.assert_close(without(**batch).logits, module(**batch).logits, rtol=1e-4, atol=1e-5)

    later = Kept()
    trainer(max_epochs=10, callbacks=[later]).fit(module.train(), loader(model, ["business", "sport"], batch_size=3))
    assert later.seen[2] == 16  # the next update has all ranks again
    assert sum(n_kept(module)) == 8


def test_a_resumed_update_allocates_the_same(model: str, tmp_path: Path) -> None:
    batches = loader(model, ["business", "sport"], batch_size=3)
    whole, part = adalora(model), adalora(model)
    trainer(max_epochs=10).fit(whole, batches)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    trainer(max_epochs=10, callbacks=[Save()]).fit(part, batches)
    resumed = adalora(model)
    trainer(max_epochs=10).fit(resumed, batches, ckpt_path=tmp_path / "middle.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def learn(folder: str, devices: int, strategies: list[str], pefts: list[dict[str, Any]]) -> dict[str, Any]:
    """The logits after an update under each strategy with each kind of adapters, or why it is refused."""
    found: dict[str, Any] = {}
    for strategy in strategies:
        for peft in pefts:
            pl.seed_everything(3)
            module = SequenceClassificationModule(
                folder, classes=["business", "sport"], dropout=0.0, learning_rate=0.01, peft=peft
            )
            batches = loader(folder, ["business", "sport"], batch_size=6 // devices)
            name = f"{strategy} {peft['method']} {len(peft)}"
            try:
                trainer(max_epochs=10, devices=devices, strategy=strategy).fit(module, batches)
                answers = module.predict(["the bank", "a goal match"])
                found[name] = [answer[one] for answer in answers for one in module.classes]
            except ValueError as error:
                found[name] = str(error)
    return found


@pytest.mark.parametrize(
    "strategies",
    [
        ["ddp"],
        pytest.param(["evertune_deepspeed_stage_2", "evertune_deepspeed_stage_3"], marks=pytest.mark.slow),
        pytest.param(["evertune_fsdp2"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_what_one_process_learns(model: str, strategies: list[str]) -> None:
    pefts = [*PROMPTS, ADALORA]
    expected = {name.partition(" ")[2]: values for name, values in learn(model, 1, ["auto"], pefts).items()}
    arguments = {"folder": model, "devices": 2, "strategies": strategies, "pefts": pefts}
    for found in run_ranks(f"{__name__}:learn", 2, **arguments):
        assert len(found) == len(strategies) * len(pefts)
        for name, values in found.items():
            strategy, _, kind = name.partition(" ")
            if "adalora" in kind and strategy != "ddp":
                assert "adalora" in values
            else:
                assert values == pytest.approx(expected[kind], abs=1e-4), name


# --- what is refused


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"method": "prompt_tuning", "num_virtual_tokens": 0}, "peft: num_virtual_tokens must be positive, got 0"),
        ({"method": "prompt_tuning", "r": 2}, "peft: 'r' is not supported; use num_virtual_tokens"),
        (ADALORA | {"target_r": 4}, "peft: target_r=4 must be below init_r=4"),
    ],
)
def test_settings_that_cannot_work(model: str, peft: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceClassificationModule(model, peft=peft)


def test_updates_that_cannot_allocate(model: str) -> None:
    with pytest.raises(ValueError, match=r"tinit=1 and tfinal=1 has no step between them in an update of 2 steps"):
        trainer(max_steps=2).fit(adalora(model, tinit=1, tfinal=1), loader(model, ["business", "sport"]))
    endless = build(model, peft=ADALORA, schedule="constant", warmup_ratio=0.0)
    with pytest.raises(ValueError, match="peft: adalora needs to know how long fit lasts"):
        trainer(max_epochs=-1).fit(endless, loader(model, ["business", "sport"]))


def test_a_prefix_has_as_many_heads_as_are_left(model: str, tmp_path: Path) -> None:
    narrow = build(model)
    prune(narrow, [], heads=0.5)
    narrow.save_pretrained(tmp_path)
    module = build(str(tmp_path), peft=PROMPTS[2], head_learning_rate=0.01)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(max_epochs=1).fit(module, loader(model, ["business", "sport"]))
    assert {name.partition(".")[0] for name in changed_in(module, before)} == {"prompt", "head"}


def test_models_that_take_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CausalLMModule generates texts, which is not supported; use lora"):
        CausalLMModule(tiny_llama(tmp_path), peft=PROMPTS[0])
    from transformers import DistilBertConfig, DistilBertModel

    shape = {"vocab_size": 18, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 32}
    DistilBertModel(DistilBertConfig(**shape)).save_pretrained(tmp_path / "distil")
    module = SequenceClassificationModule(str(tmp_path / "distil"), classes=["a"], peft=PROMPTS[2])
    with pytest.raises(ValueError, match="prefix_tuning gives keys and values, which DistilBertModel does not take"):
        module.configure_model()
