"""Drift of texts in scripts with and without spaces between words, by the default featuriser."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from evertune.drift import HashedNgrams
from evertune.drift.comparison.comparing import compare
from evertune.drift.explain.tokens import changed_tokens
from evertune.drift.scripts import pieces_of, words_of
from evertune.live.triggers import Drift
from evertune.live.triggers.base import Situation

# First character of an alphabet, its size, characters in a word, and what stands between words.
SCRIPTS: dict[str, tuple[int, int, int, str]] = {
    "Latin": (0x61, 26, 6, " "),
    "Cyrillic": (0x430, 32, 6, " "),
    "Arabic": (0x627, 36, 5, " "),
    "Devanagari": (0x905, 50, 5, " "),
    "Chinese": (0x4E00, 300, 2, ""),
    "Chinese, rare": (0x20000, 300, 2, ""),
    "Japanese": (0x3041, 80, 3, ""),
    "Thai": (0x0E01, 46, 4, ""),
    "Khmer": (0x1780, 35, 4, ""),
    "Lao": (0x0E81, 40, 4, ""),
    "Myanmar": (0x1000, 33, 4, ""),
    "Tibetan": (0x0F40, 40, 3, ""),
    "Korean": (0xAC00, 400, 3, " "),
    "Korean without spaces": (0xAC00, 400, 3, ""),
    "Latin without spaces": (0x61, 26, 6, ""),
}


def writer(script: str, seed: int, topic: int = 0) -> Iterator[str]:
    """Texts of ten words each, from a vocabulary of 60 that depends on the topic; all topics share the alphabet."""
    first, size, length, between = SCRIPTS[script]
    vocabulary = random.Random(topic)
    words = ["".join(chr(first + vocabulary.randrange(size)) for _ in range(length)) for _ in range(60)]
    chance = random.Random(seed)
    while True:
        yield between.join(chance.choices(words, k=10))


def records(script: str, n: int, seed: int, topic: int = 0) -> list[dict[str, Any]]:
    texts = writer(script, seed, topic)
    return [{"text": next(texts)} for _ in range(n)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_drift_is_found_in_every_script(script: str) -> None:
    old = records(script, 300, seed=0)
    assert not compare(old, records(script, 128, seed=1)).drift_detected
    assert compare(old, records(script, 128, seed=1, topic=1)).drift_detected


@pytest.mark.parametrize("script", ["Latin", "Chinese", "Thai"])
def test_the_live_trigger_finds_it(script: str) -> None:
    def situation(topic: int) -> Situation:
        rows = [{"id": str(i), "record": record} for i, record in enumerate(records(script, 200, 1, topic))]
        known = [record["text"] for record in records(script, 400, seed=0)]
        return Situation(
            records=lambda: rows, n_pending=200, n_new=200, production=SimpleNamespace(number=1),  # type: ignore[arg-type]
            memory_texts=lambda: known, last_update=None, now=datetime.now(UTC), text="text",
        )  # fmt: skip

    assert Drift().reason(situation(0)) is None
    assert Drift().reason(situation(1)) is not None


def test_words_between_spaces_give_the_features_that_they_always_gave() -> None:
    texts = ["The cat sat, on the mat: 42!", "Кошка сидела на коврике", "القطة على السجادة", "naïve Café"]
    assert [pieces_of(text) for text in texts] == [text.lower().split() for text in texts]
    assert pieces_of("see https://example.org/a/very/long/path now") == [
        "see",
        *"https://example.org/a/very/long/path",
        "now",
    ]
    assert HashedNgrams()(["\ud800 lone", "", "退款"]).shape == (3, 256)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't panic!", ["don't", "panic"]),
        ("退款!没有", ["退", "款", "没", "有"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국어", ["한", "국", "어"]),
        ("iPhone15坏了", ["iphone15", "坏", "了"]),
        ("snake_case", ["snake", "case"]),
    ],
)
def test_words_of_an_explanation(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_an_explanation_names_pairs_of_characters() -> None:
    before, after = ["信用卡丢失"] * 60, ["信用卡丢失"] * 30 + ["申请退款"] * 30
    found = [change.token for change in changed_tokens(before, after)]
    assert {"申", "请", "退", "款", "卡"} <= set(found)
    before, after = ["上海很大", "海上很冷"] * 30, ["上海很大", "上海很冷"] * 30
    assert {change.token for change in changed_tokens(before, after)} == {"上海", "海上", "海很", "上很"}
