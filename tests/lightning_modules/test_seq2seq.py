"""Sequence to sequence: sources and targets, scores of generated texts, warm-started encoders, folders, a stream."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.callbacks import EWC, Replay
from evertune.importance.fisher import estimate_fisher
from evertune.lightning_modules import CausalLMModule, Seq2SeqModule
from evertune.metrics.texts import corpus_scores, rouge_l
from evertune.shards.replicated import ReplicatedShards
from evertune.streams import Experience, ExperienceDataModule
from evertune.tasks import Seq2SeqTask
from evertune.training.trainer import ContinualTrainer
from tests.helpers.generation import QUESTIONS, make_tokenizer, records, tiny_t5
from tests.helpers.lightning_modules import tiny_bert
from tests.helpers.quiet import QUIET

PAIR = {"text": "prompt", "label": "answer"}
SHORT = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_t5(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def build(model: str, **settings: Any) -> Seq2SeqModule:
    torch.manual_seed(0)
    module = Seq2SeqModule(model, **{"generation": SHORT, **settings})
    module.configure_model()
    return module


def dataset(rows: list[Any], tokenizer: Any = None, task: Seq2SeqTask | None = None, max_length: int = 32) -> Any:
    task = task or Seq2SeqTask()
    return task.dataset(rows, tokenizer or make_tokenizer(), **PAIR, id_column=None, max_length=max_length)


def batch_of(module: Any, rows: list[Any]) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = module.task.collator(module.tokenizer)(
        list(dataset(rows, module.tokenizer, module.task))
    )
    return batch


def test_sources_and_targets_become_tokens_that_end(model: str) -> None:
    tokenizer = make_tokenizer()
    (example,) = dataset([{"prompt": "the old river", "answer": "big"}], tokenizer)
    assert tokenizer.decode(example["input_ids"]) == "the old river"
    assert tokenizer.decode(example["labels"]) == "big <end>"
    rows = [{"prompt": "old " * 9, "answer": "red " * 9}, {"prompt": "the", "answer": "big"}]
    with pytest.warns(UserWarning, match="1 of 2 (sources|targets) have more than 4 tokens and are truncated"):
        long, _ = dataset(rows, tokenizer, Seq2SeqTask(max_target_length=4), max_length=4)
    assert tokenizer.decode(long["labels"]) == "red red red <end>"
    assert len(long["input_ids"]) == 4
    module = build(model)
    batch = batch_of(module, [{"prompt": "the river", "answer": "big"}, {"prompt": "the", "answer": "old and red"}])
    assert batch["labels"].tolist() == [[13, 2, -100, -100], [17, 10, 15, 2]]
    logits = module(**batch).logits
    assert torch.equal(logits, module.backbone(**batch).logits)  # shifted as T5 does it
    assert module(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.shape[:2] == (2, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "the", "answer": " "}, "there is no answer to learn: the text is empty"),
        ({"prompt": "the", "answer": None}, "there is no answer to learn: no text"),
        ({"prompt": " ", "answer": "big"}, "the text is empty"),
    ],
)
def test_what_cannot_be_learned(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dataset([row])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "bleu"}, "score must be one of"),
        ({"metrics": ["meteor"]}, "there is no score 'meteor'; use rouge_l, chrf, bleu"),
        ({"max_target_length": 1}, "max_target_length must be at least 2, got 1"),
    ],
)
def test_settings_that_cannot_work(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Seq2SeqModule(model, **settings)


def test_models_of_the_other_kind_are_named(model: str, bert: str) -> None:
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\), which Seq2SeqModule trains"):
        CausalLMModule(model).configure_model()
    with pytest.raises(ValueError, match="max_target_length must be at most 32"):
        build(bert, max_target_length=64)


def test_scores_compare_generated_texts_and_do_not_depend_on_the_batch(model: str) -> None:
    rows = [*records("colours"), *records("sizes")]
    for score in ("rouge_l", "chrf", "likelihood"):
        module = build(model, score=score).eval()
        with torch.no_grad():
            together = module.task.score(module, batch_of(module, rows))
            alone = torch.cat([module.task.score(module, batch_of(module, [row])) for row in rows])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        if score == "rouge_l":
            said = module.predict([row["prompt"] for row in rows])
            expected = [rouge_l(text, row["answer"]) for text, row in zip(said, rows, strict=True)]
            assert together.tolist() == pytest.approx(expected)


def test_the_test_loop_reports_what_is_generated(model: str) -> None:
    module = build(model, metrics=["rouge_l", "bleu", "chrf"])
    data = ExperienceDataModule(
        Experience("x", records("sizes"), test=records("sizes")),
        module.tokenizer,
        task=module.task,
        eval_batch_size=3,
        **PAIR,
    )
    (found,) = pl.Trainer(accelerator="cpu", **QUIET).test(module, data, verbose=False)
    said = module.predict([prompt for prompt, _ in QUESTIONS["sizes"]])
    expected = corpus_scores(said, [answer for _, answer in QUESTIONS["sizes"]], ["rouge_l", "bleu", "chrf"])
    assert {name: found[f"test_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert found["test_perplexity"] > 1


def test_beams_and_samples(model: str) -> None:
    module = build(model)
    prompts = ["the old river", "what"]
    greedy = module.predict(prompts)
    assert greedy == [module.predict([prompt])[0] for prompt in prompts]
    assert module.predict([("the", "river")]) == module.predict(["the\n\nriver"])
    assert build(model, generation={**SHORT, "num_beams": 3}).predict(prompts) == module.predict(prompts, num_beams=3)
    torch.manual_seed(0)
    sampled = {tuple(module.predict(prompts, do_sample=True)) for _ in range(5)}
    assert len(sampled) > 0
    with pytest.raises(TypeError, match=r"texts\[0\] must be a text, got 3"):
        module.predict([3])  # type: ignore[list-item]


def learn(module: Seq2SeqModule, epochs: int) -> Any:
    stream = [Experience(topic, records(topic, 2), test=records(topic)) for topic in QUESTIONS]
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
    module = build(model, learning_rate=0.01, score="likelihood")
    history, replay, ewc = learn(module, epochs=12)
    matrix = torch.tensor(history.accuracy_matrix)
    assert matrix[0, 0] > 0.3  # chance is 1 in 22 words
    assert {str(example["id"]).split()[0] for example in replay.memory} == {"colours", "sizes"}
    assert ewc.experience_index == 2
    module.save_pretrained(tmp_path)
    loaded = Seq2SeqModule.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    prompts = [prompt for prompt, _ in QUESTIONS["colours"]]
    assert loaded.predict(prompts) == module.predict(prompts)


def test_importance_does_not_depend_on_the_batch(model: str) -> None:
    module = build(model)
    rows = [*records("colours"), *records("sizes")]
    found = []
    for size in (1, 4):
        batches = [batch_of(module, rows[start : start + size]) for start in range(0, len(rows), size)]
        found.append(torch.cat(estimate_fisher(module, batches, ReplicatedShards(module))))
    assert found[0].max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-7)


def test_an_encoder_is_taken_twice(bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        module = build(bert, max_target_length=8, dropout=0.0)
    assert any("it is taken twice, as encoder and as decoder" in record.message for record in caplog.records)
    encoder, decoder = module.backbone.encoder.state_dict(), module.backbone.decoder.state_dict()
    shared = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(encoder[shared], decoder[f"bert.{shared}"])
    again = build(bert, max_target_length=8, dropout=0.0)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    rows = [{"prompt": "the bank share", "answer": "market"}, {"prompt": "a goal", "answer": "the match"}]
    batch = batch_of(module, rows)
    assert module.tokenizer.decode(batch["labels"][0, :3]) == "[CLS] market [SEP]"
    module.training_step(batch, 0).backward()
    assert {name for name, weight in module.named_parameters() if weight.grad is None} == set()
    module.save_pretrained(tmp_path)
    loaded = Seq2SeqModule.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    assert loaded.predict(["the bank"]) == module.predict(["the bank"])
    assert Seq2SeqModule(str(tmp_path)).max_tokens == module.max_tokens == 32
