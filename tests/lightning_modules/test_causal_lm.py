"""Causal language models: what of a record is learned, packing, scores, adapters, folders, and a stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks import EWC, Distillation, Replay, SourceLosses
from evertune.importance.fisher import estimate_fisher
from evertune.lightning_modules import CausalLMModule, generation
from evertune.lightning_modules.adapters import mlp_layers
from evertune.lightning_modules.packing import check_packing
from evertune.shards.replicated import ReplicatedShards
from evertune.streams import Experience, ExperienceDataModule, domain_incremental
from evertune.tasks import CausalLMTask
from evertune.training.trainer import ContinualTrainer
from tests.helpers.generation import QUESTIONS, dialogue, make_tokenizer, records, tiny_llama
from tests.helpers.quiet import QUIET

PAIR = {"text": "prompt", "label": "answer"}
TEXT = {"text": "text", "label": None}
LORA = {"method": "lora", "r": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def build(model: str, **settings: Any) -> CausalLMModule:
    torch.manual_seed(0)
    module = CausalLMModule(model, **settings)
    module.configure_model()
    return module


def dataset(rows: list[Any], tokenizer: Any = None, task: CausalLMTask | None = None, **columns: Any) -> Any:
    settings = {"id_column": None, "max_length": 32, **TEXT, **columns}
    return (task or CausalLMTask()).dataset(rows, tokenizer or make_tokenizer(), **settings)


def batch_of(module: CausalLMModule, rows: list[Any], **columns: Any) -> dict[str, Tensor]:
    data = dataset(rows, module.tokenizer, module.task, **columns)
    batch: dict[str, Tensor] = module.task.collator(module.tokenizer)(list(data))
    return batch


def learned(example: dict[str, Tensor], tokenizer: Any) -> str:
    """The text of an example, with what is learned in brackets."""
    words = []
    for token, label in zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True):
        word = tokenizer.decode([token])
        words.append(f"[{word}]" if label == token else word)
        assert label in (token, -100)
    return " ".join(words)


# --- what is learned


def test_the_answer_is_learned_and_the_prompt_is_not() -> None:
    tokenizer = make_tokenizer()
    (example,) = dataset([{"prompt": "what is a river", "answer": "big"}], tokenizer, **PAIR)
    assert learned(example, tokenizer) == "<user> what is a river <end> <assistant> [big] [<end>]"


def test_all_turns_of_the_assistant_are_learned() -> None:
    tokenizer, turns = make_tokenizer(), dialogue("what is a river", "big", "and a city", "small and red")
    (example,) = dataset([{"text": [{"role": "system", "content": "the city"}, *turns]}], tokenizer)
    assert learned(example, tokenizer) == (
        "<system> the city <end> <user> what is a river <end> <assistant> [big] [<end>] <user> and a city <end> "
        "<assistant> [small] [and] [red] [<end>]"
    )
    (stored,) = dataset([{"text": CausalLMTask().check_text(dialogue("what is a river", "big"))}], tokenizer)
    assert learned(stored, tokenizer) == "<user> what is a river <end> <assistant> [big] [<end>]"


def test_without_a_template_an_answer_is_a_second_line_and_a_text_is_learned_as_a_whole() -> None:
    tokenizer = make_tokenizer(template=False)
    pair = {"a": "what is", "b": "the river", "answer": "big"}
    (example,) = dataset([pair], tokenizer, text=("a", "b"), label="answer")
    assert learned(example, tokenizer) == "what is the river [big] [<end>]"
    (example,) = dataset([{"text": "the river is big"}], tokenizer)
    assert learned(example, tokenizer) == "[the] [river] [is] [big] [<end>]"


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"prompt": "what", "answer": " "}, PAIR, "there is no answer to learn: the text is empty"),
        ({"prompt": "what", "answer": None}, PAIR, "there is no answer to learn: no text"),
        ({"prompt": "", "answer": "big"}, PAIR, "the text is empty"),
        ({"text": dialogue("what is a river")}, TEXT, "no turn of the assistant"),
        ({"text": dialogue("what is a river", " ")}, TEXT, "message 2, a turn of the assistant, is empty"),
        ({"text": [{"role": "user"}]}, TEXT, "message 1 has no text as its content"),
        ({"text": []}, TEXT, "a conversation is a list of messages"),
            ],
)  # fmt: skip
def test_what_cannot_be_learned(row: dict[str, Any], columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dataset([row], **columns)
    with pytest.raises(ValueError, match=rf"record 1: .*{reason}"):
        dataset([{"prompt": "what", "answer": "big", "text": dialogue("what", "big")}, row], **columns)
    task = CausalLMTask()
    if columns is PAIR and row["prompt"]:
        with pytest.raises(ValueError, match="there is no answer to learn"):
            task.check_label(row["answer"])
    elif columns is TEXT:
        with pytest.raises(ValueError, match=reason):
            task.check_text(row["text"])


def test_a_conversation_has_no_other_answer() -> None:
    with pytest.raises(ValueError, match="a conversation holds its answers itself"):
        dataset([{"text": dialogue("what", "big"), "answer": "red"}], label="answer")


def test_messages_need_a_chat_template_that_takes_them() -> None:
    row = {"text": dialogue("what", "big")}
    with pytest.raises(ValueError, match="the tokenizer has no chat template, which messages need"):
        dataset([row], make_tokenizer(template=False))
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('only user and assistant') }}"
    with pytest.raises(ValueError, match="the chat template refuses the messages: only user and assistant"):
        dataset([row], strict)
    strict.chat_template = "{{ messages | length }} <assistant> {{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="the last turn of the assistant cannot be found"):
        dataset([row], strict)


def test_long_texts_keep_their_answer_and_are_counted() -> None:
    tokenizer = make_tokenizer()
    rows = [{"prompt": "old " * 20 + "river", "answer": "big"}, {"prompt": "what", "answer": "red"}]
    with pytest.warns(UserWarning, match="1 of 2 texts have more than 8 tokens and are truncated; the longest has 26"):
        long, short = dataset(rows, tokenizer, max_length=8, **PAIR)
    assert learned(long, tokenizer) == "old old old river <end> <assistant> [big] [<end>]"
    assert learned(short, tokenizer) == "<user> what <end> <assistant> [red] [<end>]"
    with pytest.warns(UserWarning):
        (answer,) = dataset([{"prompt": "what is the", "answer": "big " * 9}], tokenizer, max_length=8, **PAIR)
    assert learned(answer, tokenizer) == "is the <end> <assistant> [big] [big] [big] [big]"
    with pytest.warns(UserWarning):
        (text,) = dataset([{"text": "old " * 3 + "red " * 9}], tokenizer, max_length=4)
    assert learned(text, tokenizer) == "[old] [old] [old] [red]"
    with pytest.raises(ValueError, match=r'record 0: the text has 26 tokens, more than max_length=8 \(too_long="ref'):
        dataset(rows, tokenizer, CausalLMTask(too_long="refuse"), max_length=8, **PAIR)


def test_tokens_are_kept_on_disk(tmp_path: Path) -> None:
    from evertune.tasks.token_cache import TokenCache

    tokenizer, rows = make_tokenizer(), records("colours")
    kept = [dataset(rows, tokenizer, id_column="id", cache=TokenCache(tmp_path), **PAIR) for _ in range(2)]
    plain = dataset(rows, tokenizer, id_column="id", **PAIR)
    assert len(list(tmp_path.glob("*.lock"))) == 1
    for data in kept:
        for one, other in zip(data, plain, strict=True):
            assert one["id"] == other["id"]
            assert all(torch.equal(one[name], other[name]) for name in ("input_ids", "labels"))


# --- packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_text_gets_the_logits_that_it_gets_alone(model: str, attention: Any) -> None:
    module = build(model, packing=True, attention=attention, dropout=0.0)
    rows = [{"text": text} for text in ("the old city is big and red", "a river", "big", "the city")]
    batch = batch_of(module, rows)
    sizes: list[list[int]] = []
    handle = module.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(list(kwargs["input_ids"].shape)), with_kwargs=True
    )
    packed = module.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    handle.remove()
    assert sizes == [[2, 8]]  # four texts of 8, 3, 2 and 3 tokens
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = module.eval()(input_ids=batch["input_ids"][row : row + 1, mask]).logits[0]
        torch.testing.assert_close(packed[row, mask], alone, rtol=1e-5, atol=1e-6)
    gradients = []
    for packing in (True, False):
        module.packing = packing
        module.zero_grad()
        module.train().training_step(batch, 0).backward()
        gradients.append([weight.grad.clone() for weight in module.parameters()])  # type: ignore[union-attr]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_model_in_which_packed_texts_see_one_another_is_refused(model: str) -> None:
    module = build(model).eval()
    with torch.no_grad():
        check_packing(module.encode, module.device)
        cached = lambda **inputs: module.encode(**{**inputs, "use_cache": True})  # noqa: E731
        with pytest.raises(ValueError, match="packing=True changes the logits of this model"):
            check_packing(cached, module.device)


def test_methods_that_read_the_logits_of_a_step_need_texts_apart(model: str) -> None:
    for method in (Distillation, SourceLosses):
        for packing in (False, True):
            module = build(model, packing=packing)
            data = ExperienceDataModule(Experience("x", records("sizes")), module.tokenizer, task=module.task, **PAIR)
            trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[method(), Replay(4)], **QUIET)  # type: ignore[operator]
            if not packing:
                trainer.fit(module, data)
                continue
            with pytest.raises(ValueError, match=rf"{method.__name__} reads logits .*: leave packing out"):
                trainer.fit(module, data)


# --- scores and predictions


def test_the_score_is_the_likelihood_of_the_answer_or_whether_greedy_decoding_gives_it(model: str) -> None:
    module = build(model).eval()
    rows = [{"prompt": "what is the city", "answer": "red"}, {"prompt": "what", "answer": "small and old"}]
    batch = batch_of(module, rows, **PAIR)
    with torch.no_grad():
        scores = module.task.score(module, batch)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            ids, labels = batch["input_ids"][row, mask], batch["labels"][row, mask]
            likelihoods = module(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            assert scores[row] == pytest.approx(likelihoods[labels[1:] != -100].mean().exp().item(), rel=1e-5)
        said = module.predict([row["prompt"] for row in rows], max_new_tokens=8)
        ends = [{"prompt": row["prompt"], "answer": text or "a"} for row, text in zip(rows, said, strict=True)]
        module.task = CausalLMTask(score="exact_match")
        exact = module.task.score(module, batch_of(module, [*rows, *ends], **PAIR))
    assert exact[:2].tolist() == [0, 0]
    assert set(exact.tolist()) <= {0, 1}


def test_prompts_and_conversations_are_answered_alike_in_any_batch(model: str) -> None:
    module = build(model)
    prompts = ["what is the old river", "what"]
    said = module.predict(prompts, max_new_tokens=5)
    assert said == [module.predict([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert module.predict([dialogue(prompt) for prompt in prompts], max_new_tokens=5) == said
    assert module.predict([("what", "is")], max_new_tokens=5) == module.predict(["what\n\nis"], max_new_tokens=5)
    assert module.training
    batch = batch_of(module, [{"prompt": prompt, "answer": "big"} for prompt in prompts], **PAIR)
    module.generation = {"max_new_tokens": 5}
    assert module.predict_step(batch, 0) == said
    continued = module.predict(["what is"], continue_texts=True, max_new_tokens=2)
    assert len(continued[0].split()) <= 2
    with pytest.raises(TypeError, match="for one text pass"):
        module.predict("what")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a text or a list of messages, got 3"):
        module.predict(["what", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="max_new_tokens must be less than 32"):
        module.predict(["what"], max_new_tokens=40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "bleu"}, r"score must be one of \['likelihood', 'exact_match'\], got 'bleu'"),
        ({"too_long": "drop"}, "too_long must be one of"),
        ({"freeze_layers": -1}, "freeze_layers=-1 leaves nothing to train"),
        ({"peft": "lora"}, "peft must be a mapping, 'auto' or null, got 'lora'"),
    ],
)
def test_settings_that_cannot_work(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLMModule(model, **settings)


# --- learning


def learn(module: CausalLMModule, *topics: str, epochs: int = 8) -> Any:
    stream = [Experience(topic, records(topic, 2), test=records(topic)) for topic in topics]
    replay, ewc = Replay(memory_size=4, id="id"), EWC(ewc_lambda=1.0, n_examples=4, batch_size=2)
    trainer = ContinualTrainer(max_epochs=epochs, accelerator="cpu", callbacks=[replay, ewc], **QUIET)
    history = trainer.fit_stream(
        module,
        stream,
        datamodule=lambda one: ExperienceDataModule(
            one, module.tokenizer, task=module.task, batch_size=4, id_column="id", **PAIR
        ),
        untrained=False,
    )
    return history, replay, ewc


def test_a_stream_with_replay_and_ewc_is_learned_saved_and_loaded(model: str, tmp_path: Path) -> None:
    module = build(model, learning_rate=0.01, packing=True)
    history, replay, ewc = learn(module, "colours", "sizes", epochs=12)
    matrix = torch.tensor(history.accuracy_matrix)
    assert matrix.shape == (2, 2)
    assert ((matrix >= 0) & (matrix <= 1) | matrix.isnan()).all()
    assert matrix[0, 0] > 0.3
    assert matrix[1, 0] > 0.2  # chance is 1 in 22 words
    assert {str(example["id"]).split()[0] for example in replay.memory} == {"colours", "sizes"}
    assert ewc.experience_index == 2

    module.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (tied to the word embeddings: saved once)
    hashes = json.loads((tmp_path / "evertune.json").read_text())["sha256"]
    assert {"generation_config.json", "chat_template.jinja"} <= hashes.keys()
    loaded = CausalLMModule.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    prompts = [prompt for prompt, _ in QUESTIONS["colours"]]
    assert loaded.predict(prompts) == module.predict(prompts)
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is damaged"):
        CausalLMModule.from_pretrained(tmp_path)


def test_importance_is_sampled_and_does_not_depend_on_the_batch(model: str) -> None:
    """With 22 words at several positions the exact expectation is out of reach: labels are drawn."""
    module = build(model, dropout=0.0)
    rows = [*records("colours"), *records("sizes")]
    found = []
    for estimator, size in (("auto", 1), ("sampled", 4)):
        batches = [batch_of(module, rows[start : start + size], **PAIR) for start in range(0, len(rows), size)]
        found.append(torch.cat(estimate_fisher(module, batches, ReplicatedShards(module), estimator)))  # type: ignore[arg-type]
    assert found[0].max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-7)


def test_validation_logs_loss_and_perplexity(model: str) -> None:
    module = build(model)
    data = ExperienceDataModule(
        Experience("x", records("sizes"), val=records("sizes")),
        module.tokenizer,
        task=module.task,
        eval_batch_size=3,
        **PAIR,
    )
    (found,) = pl.Trainer(accelerator="cpu", **QUIET).validate(module, data, verbose=False)
    with torch.no_grad():
        losses = [-module.task.score(module.eval(), batch_of(module, [row], **PAIR)).log() for row in records("sizes")]
    assert found["val_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    n_tokens = torch.tensor([2.0, 4.0, 2.0, 4.0])
    mean = (torch.cat(losses) * n_tokens).sum() / n_tokens.sum()
    assert found["val_perplexity"] == pytest.approx(mean.exp().item(), rel=1e-4)


def test_conversations_in_a_file_become_a_stream(model: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"topic": topic, "messages": dialogue(*turns)} for topic in QUESTIONS for turns in QUESTIONS[topic] * 2
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"topic": "sizes", "messages": dialogue("what")}])))
    module = build(model)
    settings: dict[str, Any] = {"domain": "topic", "text": "messages", "label": None, "task": module.task}
    with pytest.raises(ValueError, match="row 17: column 'messages': the conversation has no turn of the assistant"):
        domain_incremental(str(path), **settings)
    stream = domain_incremental(str(path), **settings, on_bad_row="skip")
    assert len(stream.bad_rows) == 1
    trainer = ContinualTrainer(max_epochs=1, accelerator="cpu", callbacks=[Replay(4)], **QUIET)
    history = trainer.fit_stream(module, stream, batch_size=4, untrained=False)
    assert 0 < history.accuracy_matrix[1][0] < 1


# --- adapters


def test_large_models_train_adapters_on_their_mlps(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(".lora_" in name for name in build(model).state_dict())
    monkeypatch.setattr(generation, "LARGE", 1_000)
    module = build(model)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".mlp." in name and ".lora_" in name for name in trained)
    assert module.default_learning_rate() == pytest.approx(2e-3)
    for weight in module.parameters():
        weight.data += 0.01 if weight.requires_grad else 0
    module.save_pretrained(tmp_path)
    loaded = CausalLMModule.from_pretrained(tmp_path)
    assert loaded.hparams["peft"] == "auto"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    assert not any(".lora_" in name for name in build(model, peft=None).state_dict())


def test_mlps_are_found_by_name() -> None:
    from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, MixtralConfig, OPTConfig

    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    wide = {"intermediate_size": 8}
    cases: list[tuple[Any, set[str]]] = [
        (GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2), {"mlp.c_fc", "mlp.c_proj"}),
        (OPTConfig(**small, ffn_dim=8, word_embed_proj_dim=8), {"0.fc1", "0.fc2"}),
        (BertConfig(**small, **wide, is_decoder=True), {"intermediate.dense", "output.dense"}),
    ]
    for config, expected in cases:
        found = mlp_layers(AutoModelForCausalLM.from_config(config))
        assert {".".join(name.split(".")[-2:]) for name in found} == expected
    experts = MixtralConfig(**small, **wide, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(ValueError, match="cannot find the MLPs of Mixtral"):
        mlp_layers(AutoModelForCausalLM.from_config(experts))
