"""Copies of training records in other words."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import nltk
import nltk.corpus
import pytest
import torch
from datasets import Dataset
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from evertune.lightning_modules import Seq2SeqModule
from evertune.streams import BackTranslation, Experience, Synonyms, augment
from evertune.tasks import CausalLMTask, QuestionAnsweringTask, SequenceClassificationTask, TokenClassificationTask
from tests.helpers.generation import records, tiny_t5

ROWS = [{"id": "1", "text": "a red city", "label": "red"}, {"id": "2", "text": "a river", "label": "blue"}]


def redden(texts: Any, seed: int) -> list[str]:
    return [text.replace("red", "old") for text in texts]


def test_copies_follow_the_records_with_all_their_other_fields() -> None:
    test = [{"text": "a test", "label": "red"}]
    experience = Experience("one", ROWS, test=test, classes=["red", "blue"])
    larger = augment(experience, redden)
    assert list(larger.train) == [*ROWS, {"id": "1", "text": "a old city", "label": "red"}]  # type: ignore[call-overload]
    assert (larger.name, larger.test, larger.classes) == ("one", test, ["red", "blue"])
    assert experience.train is ROWS and len(ROWS) == 2


def test_a_dataset_stays_one_and_what_repeats_or_is_empty_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    seeds: list[int] = []

    def rewrite(texts: Any, seed: int) -> list[str]:
        seeds.append(seed)
        return ["" if "river" in text else f"{text} {min(len(seeds), 2)}" for text in texts]

    with caplog.at_level(logging.INFO):
        larger = augment(Experience("one", Dataset.from_list(ROWS)), rewrite, copies=3, seed=4)
    assert isinstance(larger.train, Dataset)
    assert larger.train["text"][2:] == ["a red city 1", "a red city 2"]
    assert len(set(seeds)) == 3
    assert "2 copies in other words join 2 training records; 4 were left out" in caplog.text
    again = augment(Experience("one", ROWS), lambda texts, seed: [f"{text} {seed}" for text in texts], seed=4)
    assert again.train[2]["text"] == f"a red city {seeds[0]}"


def test_fields_of_a_pair_are_rewritten_each() -> None:
    rows = [{"a": "a red city", "b": "a river", "label": "yes"}]
    larger = augment(Experience("one", rows), redden, text=("a", "b"))
    assert larger.train[1] == {"a": "a old city", "b": "a river", "label": "yes"}


def test_texts_go_there_and_back_by_two_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    there, back = (Seq2SeqModule(tiny_t5(tmp_path / name), generation={"max_new_tokens": 5}) for name in "ab")
    translate = BackTranslation(there, back, batch_size=3)
    texts = [row["prompt"] for row in records("colours")]
    state = torch.get_rng_state()
    said = translate(texts, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert said == translate(texts, 7) and said != translate(texts, 8)
    greedy = BackTranslation(there, back, generation={})
    assert greedy(texts, 7) == greedy(texts, 8)
    assert translate(["", " "], 0) == ["", ""]
    rows = [{"text": row["prompt"], "label": row["answer"]} for row in records("colours")]
    larger = augment(Experience("one", rows), translate, copies=2)
    assert 4 < len(larger.train) <= 12
    assert {larger.train[number]["label"] for number in range(len(larger.train))} == {"red", "blue"}
    with pytest.raises(TypeError, match="back must translate texts by a method predict, got a str"):
        BackTranslation(there, "de-en")


@pytest.mark.parametrize("task", [TokenClassificationTask(), QuestionAnsweringTask()])
def test_labels_that_point_into_a_text_are_refused(task: Any) -> None:
    with pytest.raises(ValueError, match=f"the labels of {type(task).__name__} point into the texts"):
        augment(Experience("one", ROWS), redden, task=task)
    for other in (SequenceClassificationTask(), CausalLMTask()):
        assert len(augment(Experience("one", ROWS), redden, task=other).train) == 3


@pytest.mark.parametrize(
    ("rows", "rewrite", "reason"),
    [
        ([{"text": ["a", "b"]}], redden, r"training record 0 has no text in its field 'text', got \['a', 'b'\]"),
        ([{"body": "a"}], redden, "training record 0 has no text in its field 'text', got None"),
        ([(torch.zeros(1), 0)], redden, "training example 0 is a tuple; augment the records"),
        (ROWS, lambda texts, seed: texts[:1], "rewrite must return a text for each text, got 1 for 2"),
    ],
)
def test_what_cannot_be_rewritten(rows: Any, rewrite: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        augment(Experience("one", rows), rewrite)
    with pytest.raises(ValueError, match="copies must be positive, got 0"):
        augment(Experience("one", rows), rewrite, copies=0)


# --- synonyms

MEANINGS = {"noun": [("city", "metropolis", "urban_center"), ("river", "stream")], "adj": [("small", "little")]}


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A WordNet of three meanings, in NLTK's folder."""
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in ("index.sense", "cntlist.rev"):
        (folder / name).touch()
    (folder / "lexnames").write_text("00\tadj.all\t3\n")
    for kind in ("noun", "verb", "adj", "adv"):
        data, index = "  1 for a test  \n", []
        for words in MEANINGS.get(kind, []):
            names = " ".join(f"{word} 0" for word in words)
            line = f"{len(data):08d} 00 {kind[0]} {len(words):02x} {names} 000 | a meaning  \n"
            index += [f"{word} {kind[0]} 1 0 1 0 {len(data):08d}  \n" for word in words]
            data += line
        (folder / f"data.{kind}").write_text(data)
        (folder / f"index.{kind}").write_text("".join(sorted(index)))
        (folder / f"{kind}.exc").write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", nltk.corpus.LazyCorpusLoader("wordnet", WordNetCorpusReader, None))


@pytest.mark.usefixtures("wordnet")
def test_synonyms_replace_a_share_of_the_words() -> None:
    rewrite = Synonyms(share=1.0)
    (said,) = rewrite(["The small river, a city: Rivers!"], 0)
    assert re.fullmatch("The little stream, a (metropolis|urban center): (Stream|River)!", said)
    texts = ["a small river in a small city by the river"] * 2 + ["nothing known"]
    some = Synonyms(share=0.1)(texts, 3)
    assert some == Synonyms(share=0.1)(texts, 3) and some[0] == some[1]  # by the text, not by its place
    assert sum(a != b for a, b in zip(some[0].split(), texts[0].split(), strict=False)) >= 1
    assert some[2] == texts[2]
    assert len({Synonyms(share=0.1)(texts, seed)[0] for seed in range(8)}) > 2
    larger = augment(Experience("one", ROWS), rewrite, copies=1)
    assert [row["label"] for row in larger.train][2:] == ["red", "blue"]  # type: ignore[attr-defined]


def test_without_a_wordnet_the_command_that_gets_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", nltk.corpus.LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    with pytest.raises(ValueError, match=r"NLTK has no WordNet: run python -m nltk\.downloader wordnet"):
        Synonyms()
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        Synonyms(share=0)
