"""Question answering: learned over long contexts, predicted over windows, in streams, updates and on two ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune._lightning import pl
from evertune.callbacks import Distillation, Replay
from evertune.gate.gate import Gate
from evertune.lightning_modules import QuestionAnsweringModule
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.streams import Experience, ExperienceDataModule, domain_incremental
from evertune.training.trainer import ContinualTrainer
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import WORDS, tiny_bert

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
COLUMNS: dict[str, Any] = {"text": ("question", "context"), "label": "answers"}
LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("pretrained"))


def row(number: int, n_words: int = 6, domain: str = "a") -> dict[str, Any]:
    """Asked for "the film", the answer is the "film" in the context; asked for "the law", there is no answer."""
    draw = random.Random(f"{domain} {number}")
    words = draw.choices(WORDS[:8], k=n_words)
    has = number % 3 > 0
    if has:
        words[draw.randrange(n_words)] = "film"
    context = " ".join(words)
    answers = [{"text": "film", "answer_start": f"{context} ".index("film ")}] if has else []
    question = "the film" if has else "a law"
    return {"id": f"{domain}{number}", "question": question, "context": context, "answers": answers, "domain": domain}


def build(folder: str) -> QuestionAnsweringModule:
    torch.manual_seed(0)
    return QuestionAnsweringModule(folder, stride=3, dropout=0.0, learning_rate=5e-3)


@pytest.fixture(scope="module")
def learned(folder: str) -> tuple[QuestionAnsweringModule, pl.Trainer]:
    module = build(folder)
    kept = [
        {**one, "answers": module.task.check_label(one["answers"])} for one in (row(n, 3 + n % 9) for n in range(120))
    ]
    long = [row(number, n_words=30) for number in range(30)]
    test = [{**one, "answers": module.task.check_label(one["answers"])} for one in long]
    trainer = pl.Trainer(max_epochs=8, enable_checkpointing=False, num_sanity_val_steps=0, **QUIET)
    experience = Experience("one", kept, val=test)
    data = ExperienceDataModule(
        experience, module.tokenizer, **COLUMNS, task=module.task, batch_size=16, max_length=LENGTH
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


def test_answers_are_found_in_contexts_longer_than_those_of_training(learned: Any) -> None:
    module, trainer = learned
    assert trainer.callback_metrics["val_f1"] == trainer.callback_metrics["val_exact_match"] > 0.9
    assert trainer.callback_metrics["val_loss"] < 1.5
    context = row(8, n_words=30)["context"]
    found, none = module.predict([("the film", context), ("a law", row(9, n_words=30)["context"])], max_length=LENGTH)
    start = context.index("film")
    assert (found["answer"], found["start"], found["end"]) == ("film", start, start + 4)
    assert start > 40 and 0.5 < found["probability"] < 1
    assert (none["answer"], none["start"], none["end"]) == ("", None, None) and none["probability"] > 0.5


def test_a_prediction_does_not_depend_on_the_other_questions(learned: Any) -> None:
    module, _ = learned
    pairs = [(one["question"], one["context"]) for one in (row(n, 4 * n + 1) for n in range(6))]
    together = module.predict(pairs, max_length=LENGTH)
    for pair, one in zip(pairs, together, strict=True):
        (alone,) = module.predict([pair], max_length=LENGTH)
        assert alone["answer"] == one["answer"] and alone["probability"] == pytest.approx(one["probability"], rel=1e-4)
    assert module.predict([]) == []


def test_a_threshold_makes_it_more_careful_and_is_saved(learned: Any, tmp_path: Path) -> None:
    module, _ = learned
    module.save_pretrained(tmp_path)
    careful = QuestionAnsweringModule.from_pretrained(tmp_path, no_answer_threshold=50.0)
    assert careful.task.stride == 3
    assert careful.predict([("the film", "bank film")], max_length=LENGTH)[0]["answer"] == ""
    again = QuestionAnsweringModule.from_pretrained(tmp_path)
    pairs = [("the film", "bank film share"), ("a law", "bank film")]
    assert again.predict(pairs, max_length=LENGTH) == module.predict(pairs, max_length=LENGTH)


@pytest.mark.parametrize(
    ("questions", "error", "message"),
    [
        (["the film"], TypeError, r"questions\[0\] must be a pair \(question, context\) of texts, got 'the film'"),
        ([("the film", "bank"), ("the film",)], TypeError, r"questions\[1\] must be a pair"),
        ([("the film", " ")], ValueError, r"questions\[0\] has an empty context"),
        ([("film " * 20, "bank")], ValueError, "has 20 tokens, which leaves 0 of max_length=16"),
    ],
)
def test_questions_that_cannot_be_read(learned: Any, questions: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        learned[0].predict(questions, max_length=LENGTH)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"stride": -1}, "stride must not be negative, got -1"), ({"max_answer_tokens": 0}, "must be positive, got 0")],
)
def test_settings_are_checked(folder: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionAnsweringModule(folder, **settings)


def test_a_stream_of_domains_refuses_a_bad_answer_and_methods_that_compare_classes(folder: str) -> None:
    module = build(folder)
    rows = [row(number, domain=domain) for domain in "ab" for number in range(12)]
    wrong = {**row(1), "answers": [{"text": "film", "answer_start": 0}], "context": "bank film"}
    with pytest.raises(ValueError, match=r"row 25: the answer 'film' is not in its context, which has 'bank' at"):
        domain_incremental([*rows, wrong], **COLUMNS, task=module.task)
    stream = domain_incremental(rows, **COLUMNS, task=module.task)
    trainer = ContinualTrainer(max_epochs=1, enable_checkpointing=False, callbacks=[Distillation()], **QUIET)
    with pytest.raises(ValueError, match="Distillation compares logits class by class, but those of QuestionAnswering"):
        trainer.fit_stream(module, stream, max_length=LENGTH, batch_size=8)
    with pytest.raises(ValueError, match="a record has two texts, the question and the context, got"):
        domain_incremental(rows, text="context", label="answers", task=module.task)


def test_an_update_sets_bad_records_aside_and_learns_the_others(folder: str, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    bad = {**row(1), "id": "misplaced", "answers": [{"text": "film", "answer_start": 400}]}
    long = {**row(3), "id": "long", "question": "a law " * 20}

    def updater() -> Updater:
        trainer = ContinualTrainer(max_epochs=1, devices=1, callbacks=[Replay(20, id="id")], **QUIET)
        return Updater(
            tmp_path / "registry",
            FolderSource(str(inbox)),
            build(folder),
            trainer,
            schema=RecordSchema(text=["question", "context"], label="answers", id="id"),
            data={"batch_size": 8, "max_length": LENGTH},
            trigger=Volume(10),
            gate=Gate(max_duplicate_share=None, max_latency_ratio=None, max_size_ratio=None, max_forgetting=1.0),
            settings=UpdateSettings(checkpoint_every_n_steps=50),
        )

    for name, rows in (("a", [*map(row, range(24)), bad, long]), ("b", [row(n, 12, "b") for n in range(24)])):
        (inbox / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        live = updater()
        outcome = live.run()
        assert outcome.status == "promoted", outcome.words
    reasons = {one["id"]: one["reason"] for one in live.journal.quarantined()}
    assert reasons.keys() == {"misplaced", "long"}
    assert "'film' is not in its context, which has '' at answer_start=400" in reasons["misplaced"]
    assert "has 40 tokens, which leaves 0 of max_length=16" in reasons["long"]
    scores = live.registry.version(2).manifest.metrics.accuracy
    assert scores.keys() == {"update-1", "update-2"}
    assert all(score is not None and 0 <= score <= 1 for score in scores.values())


def learn(folder: str, out: str, strategy: str, devices: int) -> dict[str, Any]:
    """Two experiences with a memory; contexts differ in their number of windows."""
    module = build(folder)
    pl.seed_everything(3)  # ranks begin a fit with this seed again
    rows = [row(number, 4 + number % 12, domain) for domain in "ab" for number in range(12)]
    rows = [{**one, "answers": module.task.check_label(one["answers"])} for one in rows]
    stream = [Experience(name, [one for one in rows if one["domain"] == name], test=rows) for name in "ab"]
    trainer = ContinualTrainer(
        max_epochs=2,
        devices=devices,
        strategy=strategy,
        enable_checkpointing=False,
        callbacks=[Replay(memory_size=6)],
        **QUIET,
    )

    def data(experience: Experience) -> ExperienceDataModule:
        batches: dict[str, Any] = {"batch_size": 4 // devices, "eval_batch_size": 6, "max_length": LENGTH}
        return ExperienceDataModule(experience, module.tokenizer, **COLUMNS, task=module.task, **batches)

    history = trainer.fit_stream(module, stream, data, untrained=False)
    module.save_pretrained(out)
    predicted = module.predict([(one["question"], one["context"]) for one in rows[:8]], max_length=LENGTH)
    return {"matrix": history.accuracy_matrix[1], "probabilities": [one["probability"] for one in predicted]}


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_learn_what_one_process_learns(folder: str, tmp_path: Path) -> None:
    alone = learn(folder, str(tmp_path / "one"), "auto", 1)
    ranks = run_ranks(
        f"{__name__}:learn",
        2,
        folder=folder,
        out=str(tmp_path / "two"),
        strategy="evertune_deepspeed_stage_3",
        devices=2,
    )
    for rank in ranks:
        assert rank["matrix"] == pytest.approx(alone["matrix"], abs=1e-4)
        assert rank["probabilities"] == pytest.approx(alone["probabilities"], rel=1e-2)
