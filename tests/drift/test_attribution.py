"""What changed: planted changes are found by name, and nothing is found where nothing changed."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from evertune.drift.explain.attribution import attribute
from evertune.drift.explain.fields import changed_fields
from evertune.drift.explain.p_values import chi_squared, kolmogorov_smirnov, normal, two_shares
from evertune.drift.explain.tokens import changed_tokens
from evertune.drift.explain.topics import changed_topics

WEATHER = ["rain", "wind", "sun", "storm", "cloud", "frost", "heat", "fog"]
MONEY = ["shares", "bonds", "profit", "loans", "credit", "stocks", "funds", "rates"]
SPORT = ["goals", "fouls", "match", "coach", "league", "striker", "keeper", "cup"]


def texts(n: int, topics: list[list[str]], seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(generator.choice(topics), k=8)) for _ in range(n)]


def records(n: int, seed: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"text": text, **fields} for text in texts(n, [WEATHER, MONEY], seed)]


# --- p-values, against scipy


def test_p_values_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.3):
        before, after = generator.normal(size=400), generator.normal(shift, size=300)
        distance, p_value = kolmogorov_smirnov(before, after)
        exact = stats.ks_2samp(before, after)
        assert distance == pytest.approx(exact.statistic)
        assert p_value == pytest.approx(exact.pvalue, rel=0.15)
    assert chi_squared(12.3, 4) == pytest.approx(stats.chi2.sf(12.3, 4))
    assert normal(-2.5) == pytest.approx(2 * stats.norm.sf(2.5))
    table = np.array([[30, 70], [50, 50]])
    z = two_shares(30, 100, 50, 100)
    assert z**2 == pytest.approx(stats.chi2_contingency(table, correction=False).statistic)


def test_equal_samples_have_p_value_one() -> None:
    same = np.arange(50.0)
    assert kolmogorov_smirnov(same, same) == (0.0, 1.0)
    assert two_shares(0, 10, 0, 20) == 0.0


# --- tokens


def test_a_planted_word_is_found_first() -> None:
    before, after = texts(400, [WEATHER, MONEY]), texts(400, [WEATHER, MONEY], seed=1)
    after = [text + " phishing" if i % 5 == 0 else text for i, text in enumerate(after)]
    found = changed_tokens(before, after)
    assert (found[0].token, found[0].before, found[0].after) == ("phishing", 0, 80)
    assert found[0].z > 4
    assert found[0].p_corrected < 1e-20
    few = changed_tokens(before, [*after[1:40], "phishing and more"])
    assert [(change.token, change.after) for change in few] == [("phishing", 8)], "few records, new, and still sure"


def test_a_pair_of_words_is_found_where_its_words_are_not_new() -> None:
    before = ["card lost here", "lost my card", "card and lost"] * 60
    after = ["lost card here", "lost card my", "and lost card"] * 60
    assert changed_tokens(before, after)[0].token == "lost card"


def test_no_token_where_nothing_changed() -> None:
    assert sum(len(changed_tokens(texts(300, [WEATHER], s), texts(300, [WEATHER], 100 + s))) for s in range(10)) == 0


def test_a_word_repeated_in_one_record_is_no_change() -> None:
    before, after = texts(200, [WEATHER]), texts(200, [WEATHER], seed=1)
    assert changed_tokens(before, [*after, "spam " * 5_000]) == []


def test_texts_without_words() -> None:
    assert changed_tokens(["", "!?"], ["a"]) == []
    assert changed_topics([], ["a"]) == []


# --- topics


def test_a_new_topic_is_found_by_its_words() -> None:
    topics = changed_topics(texts(300, [WEATHER, MONEY]), texts(60, [WEATHER, MONEY, SPORT], seed=1), n_topics=3)
    new = topics[0]
    assert set(new.words) <= set(SPORT)
    assert (new.before, new.example_before) == (0.0, None)
    assert new.after == pytest.approx(1 / 3, abs=0.15)
    assert new.z > 8
    assert new.example_after is not None


def test_topics_of_given_features() -> None:
    """Words that are all alike, and features that are not."""
    generator = torch.Generator().manual_seed(0)
    old = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(100, 1) + 0.05 * torch.randn(200, 2, generator=generator)
    new = torch.tensor([[1.0, 0.0]]).repeat(100, 1) + 0.05 * torch.randn(100, 2, generator=generator)
    topics = changed_topics(["same"] * 200, ["same"] * 100, (old, new), n_topics=2)
    assert sorted((topic.before, topic.after) for topic in topics) == [(0.5, 0.0), (0.5, 1.0)]


# --- fields


def test_each_kind_of_field() -> None:
    generator = random.Random(0)

    def record(i: int, after: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "text": generator.choice(WEATHER),
            "price": generator.gauss(3.0 if after else 2.0, 1.0),
            "same": generator.gauss(0.0, 1.0),
            "lang": generator.choices(["en", "de", "fr"], [1, 1, 2 if after else 1])[0],
            "ok": generator.random() < (0.5 if after else 0.9),
            "id": i,
            "size": str(i % 7),
            "code": str(i % 5) if after else i % 5,
            "kind": i % 3 if after else "abc"[i % 3],
        }
        if after and i % 2:
            fields["size"] = ""
        return {**fields, **({"new": 1} if after else {"gone": True})}

    before, after = [record(i, False) for i in range(500)], [record(500 + i, True) for i in range(500)]
    found = attribute(before, after)
    changes = {(change.name, change.kind): change for change in found.fields}
    assert {(change.name, change.before, change.after) for change in found.schema} == {
        ("new", "absent", "number"),
        ("gone", "boolean", "absent"),
        ("kind", "text", "number"),
    }
    assert changes["price", "numeric"].effect == pytest.approx(1.0, abs=0.15)
    assert changes["ok", "categorical"].effect == pytest.approx(0.4, abs=0.07)
    assert changes["size", "missing"].after == 0.5
    sure = {name for (name, kind), change in changes.items() if change.p_corrected < 0.001}
    assert sure == {"new", "gone", "kind", "price", "ok", "size", "lang"}
    assert changes["lang", "categorical"].after["fr"] == pytest.approx(0.5, abs=0.06)
    assert changes["same", "numeric"].p_corrected > 0.05
    assert not {"id", "text"} & {change.name for change in found.fields}, "counters and texts are no categories"


@pytest.mark.parametrize("late", [0, 40])
@pytest.mark.parametrize(
    "time",
    [
        lambda i: i,
        lambda i: 1.7e9 + 60 * (i // 3),
        lambda i: f"2026-{1 + i // 280:02d}-{1 + i % 280 // 10:02d}",
        lambda i: f"2026-01-01T{i // 60:02d}:{i % 60:02d}:00Z",
        lambda i: "2026-01-01" if i < 300 else "2026-02-01",
    ],
    ids=["counter", "seconds", "days", "minutes", "batches"],
)
def test_the_time_of_the_stream_is_no_change(time: Any, late: int) -> None:
    order = list(range(600))
    for place in range(7, 600, 601 - late if late else 601):  # one record of many arrives some places late
        order.insert(min(place + 5, 599), order.pop(place))
    records = [{"time": time(i), "n": i % 7} for i in order]
    assert [change.name for change in changed_fields(records[:300], records[300:])] == ["n"]


@pytest.mark.parametrize(
    ("before", "after"),
    [(lambda i: 1, lambda i: 2), (lambda i: i % 5, lambda i: 4), (lambda i: (i * 7) % 30, lambda i: i)],
)
def test_numbers_that_are_not_the_time_are_compared(before: Any, after: Any) -> None:
    found = changed_fields([{"n": before(i)} for i in range(100)], [{"n": after(i)} for i in range(100)])
    assert [change.name for change in found] == ["n"]


def test_topics_are_described_without_words_of_the_language() -> None:
    draw = random.Random(0)
    common, shares, goals = ["the", "of", "and", "to", "in"], ["shares", "bonds", "bank"], ["goal", "team", "match"]

    def text(of: list[str]) -> str:
        return " ".join([*draw.sample(common, 3), *draw.sample(of, 2)])

    topics = changed_topics([text(shares) for _ in range(200)], [text(goals) for _ in range(200)], n_topics=2)
    assert topics and not {word for topic in topics for word in topic.words} & set(common)


def test_numbers_that_are_none() -> None:
    before = [{"x": value} for value in [1.0, 2.0, 3.0, 4.0] * 20]
    after = [{"x": value} for value in [1.0, math.nan, "nan", 10**400] * 20]
    (missing, numeric) = sorted(changed_fields(before, after), key=lambda change: change.kind)
    assert (missing.kind, missing.after) == ("missing", 0.75)
    assert (numeric.before, numeric.after) == (2.5, 1.0)


def test_label_shares_and_correction() -> None:
    before = [{"text": "same", "label": str(i % 2)} for i in range(200)]
    after = [{"text": "same", "label": str(i % 4 // 3)} for i in range(200)]
    (label, *_) = attribute(before, after, label="label").fields
    assert (label.name, label.kind) == ("label", "categorical")
    assert (label.before, label.after) == ({"0": 0.5, "1": 0.5}, {"0": 0.75, "1": 0.25})
    assert label.p_value < label.p_corrected < 1e-5


def test_unknown_words_and_length() -> None:
    before = records(300, seed=0)
    after = [{"text": record["text"] + " zxq" * 4} for record in records(300, seed=1)]
    changes = {change.name: change for change in attribute(before, after).fields}
    assert (changes["length of text"].before, changes["length of text"].after) == (8.0, 12.0)
    assert changes["unknown words in text"].before == 0.0
    assert changes["unknown words in text"].after == pytest.approx(1 / 3)


def test_false_findings_among_many_fields_are_rare() -> None:
    """Holm: at 5 %, of 40 comparisons of 20 unchanged fields 2 are expected to find anything; 7 are most unlikely."""
    found = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        sides = [
            [dict(zip(map(str, range(20)), row, strict=True)) for row in generator.normal(size=(200, 20)).tolist()]
            for _ in range(2)
        ]
        found += any(change.p_corrected < 0.05 for change in attribute(*sides).fields)
    assert found < 7


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_whatever_values_there_are() -> None:
    values = [None, "", " ", 0, -1, 1.5, 1e308, -1e308, math.nan, math.inf, 10**400, "nan", "1e999", "x", "\ud800"]
    values += [[1], {"a": 1}, True, b"x", "2026-01-01"]
    for seed in range(60):
        generator = random.Random(seed)
        sides = [
            [{name: generator.choice(values) for name in generator.sample("abcd", generator.randint(0, 4))}]
            * generator.randint(1, 3)
            + [{"text": generator.choice(["a b", "", "c d e"]), "a": generator.choice(values)} for _ in range(20)]
            for _ in range(2)
        ]
        for change in attribute(*sides, ["text", "d"], label=generator.choice([None, "a"])).fields:
            assert 0 <= change.p_value <= change.p_corrected <= 1


# --- the whole


def test_examples_show_the_change_with_features_and_without() -> None:
    before = records(200, seed=0)
    after = [*records(150, seed=1), *({"text": text} for text in texts(50, [SPORT], seed=2))]
    features = torch.zeros(200, 4), torch.zeros(200, 4)
    generator = torch.Generator().manual_seed(0)
    features[0][:] = 0.1 * torch.randn(200, 4, generator=generator)
    features[1][:] = 0.1 * torch.randn(200, 4, generator=generator)
    features[1][150:, 0] += 3.0
    for found in (attribute(before, after), attribute(before, after, features=features, topic_features=False)):
        assert len(found.examples_before) == len(found.examples_after) == 5
        assert all(i >= 150 for i in found.examples_after)


def test_it_is_deterministic_and_bounded() -> None:
    before, after = records(500, seed=0), [{"text": text} for text in texts(500, [SPORT])]
    first, second = (attribute(before, after, max_records=120, seed=3) for _ in range(2))
    assert repr(first) == repr(second)
    assert (first.n_before, first.n_after) == (120, 120)
    assert max(first.examples_before) > 120, "positions are those of the records given"
    json.dumps([topic.words for topic in first.topics])


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="no records after"):
        attribute([{"text": "a"}], [])
    with pytest.raises(ValueError, match="got 2 and 1 for 1 and 1 records"):
        attribute([{"text": "a"}], [{"text": "b"}], features=(torch.ones(2, 3), torch.ones(1, 3)))
    with pytest.raises(ValueError, match="n_topics must be positive, got 0"):
        attribute([{"text": "a"}], [{"text": "b"}], n_topics=0)


def test_one_record_of_each() -> None:
    found = attribute([{"text": "a"}], [{"text": "b"}], features=(torch.ones(1, 3), torch.ones(1, 3)))
    assert (found.examples_before, found.examples_after, found.tokens) == ([0], [0], [])
