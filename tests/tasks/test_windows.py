"""Windows over long contexts: what they hold, where the answer is marked, which are trained on, and the best span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evertune.tasks.question_answering import QuestionAnsweringTask
from evertune.tasks.spans import Window, best_span
from evertune.tasks.token_cache import TokenCache
from evertune.tasks.windows import FIRST, LAST, targets_in, unstacked
from tests.helpers.texts import TOKENIZER

COLUMNS: dict[str, Any] = {"text": ("question", "context"), "label": "answers", "id_column": None}


def record(n_words: int, *answers: str, question: str = "w1 w2") -> dict[str, Any]:
    """A context of ``w0 w1 ...``, in which every word occurs once; each answer is a part of it."""
    context = " ".join(f"w{number}" for number in range(n_words))
    return {
        "question": question,
        "context": context,
        "answers": {"text": list(answers), "answer_start": [f"{context} ".index(f"{one} ") for one in answers]},
    }


def words(tokens: Any) -> str:
    return TOKENIZER.decode(tokens)


def made(*records: dict[str, Any], max_length: int = 13, stride: int = 2, **more: Any) -> Any:
    return QuestionAnsweringTask(stride).dataset(list(records), TOKENIZER, max_length=max_length, **(COLUMNS | more))


def batch_of(data: Any) -> Any:
    return QuestionAnsweringTask().collator(TOKENIZER)([data[place] for place in range(len(data))])


def test_windows_cover_the_context_and_share_the_stride() -> None:
    item = made(record(20, "w13 w14"))[0]
    windows = [item["windows"] == number for number in (1, 2, 3)]
    texts = [words(item["input_ids"][window]) for window in windows]
    # 13 tokens, of which [CLS] w1 w2 [SEP] ... [SEP] leave 8 for the context
    assert texts == [
        f"[CLS] w1 w2 [SEP] {' '.join(f'w{i}' for i in part)} [SEP]"
        for part in (range(0, 8), range(6, 14), range(12, 20))
    ]
    assert set(item["windows"].tolist()) == {1, 2, 3} and len(item["windows"]) == 39
    for window in windows:
        where = item["char_end"][window] > 0
        starts, ends = item["char_start"][window][where], item["char_end"][window][where]
        spelled = [item["context"][start:end] for start, end in zip(starts, ends, strict=True)]
        assert " ".join(spelled) == words(item["input_ids"][window][where])


def test_the_answer_is_marked_where_a_window_holds_it_and_no_answer_elsewhere() -> None:
    data = made(record(20, "w13 w14"), record(3), record(5, "w4", "w0 w1"))
    tokens, rows = unstacked(batch_of(data))
    assert rows.tolist() == [0, 0, 0, 1, 2]
    marked = [
        words(ids[first : last + 1])
        for ids, (first, last) in zip(tokens["input_ids"], targets_in(tokens).tolist(), strict=True)
    ]
    assert marked == ["[CLS]", "[CLS]", "w13 w14", "[CLS]", "w4"]
    first, rows = unstacked(batch_of(data), first=True)
    assert rows.tolist() == [0, 1, 2]
    assert [words(ids[last]) for ids, last in zip(first["input_ids"], targets_in(first)[:, 1], strict=True)] == [
        "w14",
        "[CLS]",
        "w4",
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_windows_are_taken_apart_whatever_side_is_padded(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "padding_side", side)
    data = made(record(20, "w13"), record(4, "w2"))
    batch = batch_of(data)
    assert batch["attention_mask"].sum(1).tolist() == [39, 9]
    tokens, _ = unstacked(batch)
    assert tokens["attention_mask"].sum(1).tolist() == [13, 13, 13, 9]
    item = data[0]
    for window in range(3):
        assert torch.equal(tokens["input_ids"][window], item["input_ids"][item["windows"] == window + 1])
    assert torch.equal(tokens["input_ids"][3, :9], data[1]["input_ids"])
    assert not tokens["spans"][3, 9:].any()


def test_training_takes_windows_with_the_answer_and_one_without() -> None:
    rows = [record(60, "w13"), record(60), record(4, "w2"), record(4)]
    data = QuestionAnsweringTask(2).training_dataset(rows, TOKENIZER, max_length=13, **COLUMNS)
    items = [data[place] for place in range(len(data))]
    has = [bool(item["labels"]["text"]) for item in items]
    # w13 is in the share of two windows; the record without an answer has one window of its many
    assert has == [True, True, False, False, True, False]
    assert [int((item["spans"] & FIRST).argmax()) > 0 for item in items] == has
    assert [int((item["spans"] & LAST).argmax()) > 0 for item in items] == has
    assert all(item["windows"].eq(1).all() and len(item["input_ids"]) <= 13 for item in items)
    assert data.lengths.tolist() == [len(item["input_ids"]) for item in items]
    for item in items:
        assert ("w13" in words(item["input_ids"]).split()) == (item["labels"]["text"] == ["w13"])


def test_tokens_are_kept_on_disk_whatever_the_answers(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "tokens")
    plain, cached = made(record(20, "w13")), made(record(20, "w13"), cache=cache)
    for _ in range(2):
        for key in ("input_ids", "windows", "char_end", "spans"):
            assert torch.equal(plain[0][key], cached[0][key])
        cached = made(record(20, "w13"), cache=cache)
    assert len(list((tmp_path / "tokens").glob("*.lock"))) == 1
    made(record(20, "w1"), cache=cache)
    assert len(list((tmp_path / "tokens").glob("*.lock"))) == 1
    assert made(record(20, "w13"), cache=cache, stride=1)[0]["windows"].max() == 3
    assert len(list((tmp_path / "tokens").glob("*.lock"))) == 2


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (record(20, question="w1 " * 9), {}, r"has 9 tokens, which leaves 1 of max_length=13 .* stride=2: shorten"),
        (record(20, question="w1 " * 30), {}, r"has 30 tokens, which leaves 0 of max_length=13"),
        (record(20, "w5 w6 w7 w8 w9"), {}, r"answer 'w5 w6 w7 w8 w9' in 'w0 .* not in any window as a whole"),
        (record(20, question=" "), {}, "the tokenizer finds nothing in the question"),
        (record(0), {}, "the tokenizer finds nothing in the context"),
        (record(20), {"text": "question"}, r"two texts, the question and the context, got \['question'\]; set text"),
    ],
)
def test_what_does_not_fit_is_refused(row: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(row, **settings)


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        ([], {"text": [], "answer_start": []}),
        ({"text": [], "answer_start": []}, {"text": [], "answer_start": []}),
        ([{"text": "Rome", "answer_start": 3, "more": 1}], {"text": ["Rome"], "answer_start": [3]}),
        ({"text": np.array(["Rome"]), "answer_start": np.array([3])}, {"text": ["Rome"], "answer_start": [3]}),
    ],
)
def test_both_forms_of_squad(answers: Any, kept: Any) -> None:
    assert QuestionAnsweringTask().check_label(answers) == kept


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (None, "the answers must be"),
        ("Rome", "the answers must be"),
        ({"text": ["Rome"]}, "the answers must be"),
        ({"text": ["Rome"], "answer_start": []}, "the answers must be"),
        ([{"text": " ", "answer_start": 3}], "an answer must be a text that is not empty"),
        ([{"text": "Rome", "answer_start": "3"}], "must be a number of characters, got '3'"),
        ([{"text": "Rome", "answer_start": -3}], "must be a number of characters, got -3"),
    ],
)
def test_answers_in_another_form_are_refused(answers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionAnsweringTask().check_label(answers)


def test_an_answer_must_stand_where_it_is_said_to() -> None:
    label = {"text": ["Rome"], "answer_start": [5]}
    QuestionAnsweringTask().check_record(["Where?", "Near Rome"], label)
    with pytest.raises(
        ValueError, match=r"'Rome' is not in its context, which has 'ome' at answer_start=5; it is at 4"
    ):
        QuestionAnsweringTask().check_record(["Where?", "Nea Rome"], label)
    with pytest.raises(ValueError, match="a record has two texts"):
        QuestionAnsweringTask().check_record(["Near Rome"], label)


# --- the best span


def window(scores: dict[int, tuple[float, float]], n_tokens: int, shift: int = 0) -> Window:
    """A window with [CLS] and tokens of two characters; all scores but those given are 0."""
    start, end = np.zeros(n_tokens), np.zeros(n_tokens)
    for token, (first, last) in scores.items():
        start[token], end[token] = first, last
    place = 2 * np.maximum(np.arange(n_tokens) - 1 + shift, 0)
    return Window(start, end, place, np.where(np.arange(n_tokens) > 0, place + 2, 0))


def test_probabilities_of_spans_and_no_answer_add_up() -> None:
    one = window({0: (1.0, 0.5), 2: (2.0, 0.0), 3: (0.0, 1.0)}, 4)
    spans = {(i, j): one.start[i] + one.end[j] for i in range(1, 4) for j in range(i, 4)}
    total = np.exp(1.5) + np.exp(list(spans.values())).sum()
    best = best_span([one], max_answer_tokens=3)
    assert (best.start, best.end) == (2, 6)
    assert best.probability == pytest.approx(np.exp(3.0) / total)
    none = best_span([one], max_answer_tokens=3, threshold=2.0)
    assert none.start is None and none.probability == pytest.approx(np.exp(1.5) / total)


def test_a_span_must_be_in_order_short_and_in_the_context() -> None:
    backwards = window({3: (5.0, 0.0), 1: (0.0, 5.0)}, 4)
    assert best_span([backwards], 3).start == 4 or best_span([backwards], 3).end == 2
    long = window({1: (5.0, 0.0), 4: (0.0, 5.0), 2: (0.0, 1.0)}, 5)
    assert best_span([long], 4)[:2] == (0, 8) and best_span([long], 3)[:2] == (0, 4)
    outside = best_span([window({0: (0.0, 9.0), 1: (1.0, 0.0)}, 3)], 3)
    assert outside.start is None


def test_the_best_window_wins_and_shared_spans_count_once() -> None:
    sure = window({0: (-4.0, -4.0), 2: (3.0, 3.0)}, 4, shift=2)
    empty = window({0: (6.0, 6.0), 1: (5.0, 5.0)}, 4)
    together = best_span([empty, sure], 3)
    assert together[:2] == (6, 8)
    assert together.probability == pytest.approx(best_span([sure], 3).probability, abs=1e-3)
    assert best_span([sure, sure], 3) == best_span([sure], 3)
    assert best_span([empty, empty], 3).start is None
