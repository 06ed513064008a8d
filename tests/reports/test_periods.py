"""The page that compares ways to keep a model over periods."""

from __future__ import annotations

from pathlib import Path

import pytest

from evertune.reports.periods import Way, write_periods

WAYS = [
    Way("frozen", "never learns", {"Recall@10": [0.5, 0.25], "NDCG@10": [0.25, 0.125]}, 60.0),
    Way("weekly <b>", "learns", {"Recall@10": [0.5, 0.75], "NDCG@10": [0.25, 0.5]}, 125.0),
]


def test_the_page_has_all_numbers_and_escapes_text(tmp_path: Path) -> None:
    path = write_periods(
        "News",
        "Weekly is better.",
        WAYS,
        ["week 2", "week 3"],
        ["Measured so & so."],
        {1: "taste has changed"},
        tmp_path / "a" / "page.html",
    )
    page = path.read_text()
    assert "Weekly is better." in page and "Measured so &amp; so." in page and "<b>&lt;" not in page
    for words in ("37.5", "62.5", "1 min 00 s", "2 min 05 s", "weekly &lt;b&gt;", "week 3: taste has changed"):
        assert words in page
    assert page.count("<polyline") == 4 and 'data-tip="frozen, week 3: 12.5 %"' in page
    assert "http" not in page.replace("http-equiv", "")


def test_ways_must_fit_the_periods(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'frozen' must have 3 values of Recall@10, NDCG@10, got \{'Recall@10': 2"):
        write_periods("", "", WAYS, ["1", "2", "3"], [], out=tmp_path / "page.html")
    with pytest.raises(ValueError, match="ways is empty"):
        write_periods("", "", [], ["1"], [], out=tmp_path / "page.html")
