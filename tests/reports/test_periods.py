"""The page that compares ways to keep a model over periods."""

from __future__ import annotations

from pathlib import Path

import pytest

from evertune.reports.periods import Part, Way, write_periods

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


def test_parts_show_lines_and_tables(tmp_path: Path) -> None:
    parts = [
        Part("Negatives", "As read.", {"read <i>": [0.25, 0.75], "right": [0.5, 0.5]}, {1: "an alarm"}),
        Part("Words", columns=["Word", "Share"], rows=[["cancelled & late", "40 %"]]),
    ]
    page = write_periods("", "", WAYS, ["1", "2"], [], out=tmp_path / "page.html", parts=parts).read_text()
    assert page.count("<polyline") == 6 and "read &lt;i&gt;, 2: 75.0 %" in page and "2: an alarm" in page
    assert "<td>cancelled &amp; late</td>" in page and '<td data-label="Share">40 %</td>' in page
    for part, words in (
        (Part("Negatives", lines={"read": [0.5]}), r"'read' of 'Negatives' must have 2 values, got 1"),
        (Part("Words", columns=["Word"], rows=[["a", "b"]]), r"a row of 'Words' must have 1 cells, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            write_periods("", "", WAYS, ["1", "2"], [], out=tmp_path / "page.html", parts=[part])
