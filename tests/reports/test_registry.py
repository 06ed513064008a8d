"""The page, the table and the history of a registry."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evertune.registry.journal import Journal
from evertune.registry.manifest import Manifest, Metrics, VerdictSummary
from evertune.registry.registry import Registry, RegistryError
from evertune.registry.slice_index import SliceEntry
from evertune.reports import save_plots, write_report
from evertune.reports.registry import MAX_SHOWN, history_of, versions_table, write_versions_report
from evertune.reports.summary import MINUS, UNKNOWN
from tests.reports.test_stream import Page

START = datetime(2026, 3, 1, 6, 0, tzinfo=UTC)
REFUSAL = "refused: on 'sport' the new version is right on 60.0 % of 50 held-out records; it is slow"


def publish(registry: Registry, tmp_path: Path, accuracy: dict[str, float | None], refused: str = "", **extra: Any):
    number = registry.next_number()
    folder = tmp_path / "staging"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"weights %d" % number)
    production = registry.production
    manifest = Manifest(
        version=number,
        parent=production.number if production else None,
        created=START + timedelta(days=number),
        kind="update",
        experience=list(accuracy)[-1] if accuracy else f"update-{number}",
        reason="200 records are pending",
        consumed=number,
        module="SequenceClassificationModule",
        classes=["sport", "tech"],
        records={"train": 100 * number, "held_out": 10, "quarantined": number % 2},
        verdict=VerdictSummary(not refused, refused or "passed: 9 checks"),
        metrics=Metrics(accuracy),
        seconds={"plan": 1.0, "train": 10.0, "fit": 8.0, "evaluate": 2.0},
        code="evertune 0.1.0",
    )
    slices = [SliceEntry(name, "x", 50, "0") for name in accuracy]
    version = registry.publish(folder, replace(manifest, **extra), slices)
    if refused:
        registry.set_refused(number)
    else:
        registry.promote(number, verify=False)
    return version


@pytest.fixture
def registry(tmp_path) -> Registry:
    """Two promoted, one refused, one rolled back, one rebuild in production."""
    registry = Registry(tmp_path / "news")
    publish(registry, tmp_path, {"sport": 0.9}, kind="first")
    publish(registry, tmp_path, {"sport": 0.95, "tech": 0.8})
    publish(registry, tmp_path, {"sport": 0.6, "tech": 0.8, "art": 0.7}, refused=REFUSAL)
    publish(registry, tmp_path, {"sport": 0.94, "tech": 0.75, "art": 0.85})
    registry.rollback("readers complain", by="maria")
    publish(registry, tmp_path, {"sport": 0.93, "tech": 0.85, "film": 0.88}, kind="rebuild")
    return registry


def page_of(registry, tmp_path) -> Page:
    return Page(write_versions_report(registry, tmp_path / "out" / "versions.html").read_text(encoding="utf-8"))


def words_of(page: Page) -> str:
    return re.sub(r"\s+", " ", " ".join(page.text))


def test_the_page_tells_what_happened(registry, tmp_path):
    page = page_of(registry.store.root, tmp_path)
    words = words_of(page)
    assert "Registry news" in page.text
    than_before = "1.5 points above version 2 on the 2 that both were measured on."
    assert f"Version 5 is in production: 88.7 % right on average over 3 held-out slices, {than_before}" in words
    assert "5 3 promoted, 1 refused, 1 rolled back" in words
    assert "Records learned 800 30 held out, 2 in quarantine" in words
    assert "Rolled back from version 4 to 2 readers complain maria" in words
    assert "on 'sport' the new version is right on 60.0 % of 50 held-out records it is slow" in words
    assert "refused:" not in words
    timeline = words[words.index("Timeline Newest first") :]
    assert re.findall(r"Version (\d) (in production|promoted|refused|rolled back)|(Rolled back)", timeline) == [
        ("", "", "Rolled back"),
        ("5", "in production", ""),
        ("4", "rolled back", ""),
        ("3", "refused", ""),
        ("2", "promoted", ""),
        ("1", "promoted", ""),
    ]
    assert "Version 5 in production rebuild" in timeline
    assert "Version 2 promoted previous" in timeline
    assert "Version 3 refused 70.0 % \N{MINUS SIGN}17.5 art 200 records are pending" in timeline
    assert page.count("td", "own") == 3
    assert page.count("tr", "out") == page.count("tr", "back") == page.count("tr", "now") == 1
    assert "film 88.0 \N{EN DASH} 50" in words
    assert "1 sport 93.0 \N{MINUS SIGN}2.0 50" in words


def test_lines_follow_production_and_marks_tell_the_rest(registry, tmp_path):
    page = page_of(registry, tmp_path)
    lines = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
    across = {1: "4", 2: "27", 5: "96"}
    low, pieces = 0.6, [{1: 0.9, 2: 0.95}, {2: 0.875, 5: 0.89}]  # like with like, so that a new slice is not a fall
    for line, heights in zip(lines, pieces, strict=False):
        points = [tuple(point.split(",")) for point in line.split()]
        assert [x for x, _ in points] == [across[number] for number in heights]
        for (_, y), height in zip(points, heights.values(), strict=True):
            assert float(y) == pytest.approx(100 * (1 - height) / (1 - low), abs=0.01)
    tips = [attrs["data-tip"] for tag, attrs in page.tags if "dot" in (attrs.get("class") or "").split()]
    assert "version 3, refused: 70.0 %" in tips
    assert "version 4, rolled back: 84.7 %" in tips
    columns = [attrs["data-tip"] for tag, attrs in page.tags if "column" in (attrs.get("class") or "").split()]
    assert columns[2] == "version 3, refused: 300 learned, 10 held out, 1 in quarantine"
    assert page.count("div", "faint") == 2


def test_what_is_pending_is_counted(registry, tmp_path):
    journal = Journal(registry.store)
    assert "Records pending" not in page_of(registry, tmp_path).text
    for number in range(1, 8):
        rows = [{"id": f"{number}-{i}", "origin": "x", "record": {"text": "a"}} for i in range(number)]
        assert journal.append(rows, bad=[], waiting=[], offset={"line": number}).number == number
    assert "Records pending 13 wait for the next update" in words_of(page_of(registry, tmp_path))
    segment = Path(registry.store.root) / "pending" / "000007.json"
    segment.write_bytes(segment.read_bytes()[:30])
    assert "Records pending ? " in words_of(page_of(registry, tmp_path))


def test_the_page_needs_nothing_but_itself(registry, tmp_path):
    path = write_versions_report(registry, tmp_path / "versions.html")
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert not page.count("script")
    assert "default-src 'none'" in source
    assert not re.search(r"(https?:)?//\w|@import|url\(", source)
    assert "prefers-color-scheme: dark" in source


def test_names_cannot_inject(tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
    registry = Registry(tmp_path / "news")
    extra = {"reason": evil, "classes": [evil], "module": evil, "code": evil, "offset": {evil: 1}}
    publish(registry, tmp_path, {evil: 0.9}, **extra)
    publish(registry, tmp_path, {evil: 0.9, "b": 0.8})
    publish(registry, tmp_path, {evil: 0.9}, refused=f"refused: {evil}", **extra)
    registry.rollback(evil, by=evil)
    page = Page(write_versions_report(registry, tmp_path / "v.html", title=evil).read_text(encoding="utf-8"))
    assert not page.count("script")
    assert not page.count("img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(evil) >= 6
    stream = io.StringIO()
    Console(file=stream, width=200).print(versions_table(registry))
    assert evil[:20] in stream.getvalue()


@pytest.mark.parametrize("n_versions", [0, 1, 60])
def test_registries_of_any_size_are_shown(tmp_path, n_versions):
    registry = Registry(tmp_path / "news")
    for number in range(n_versions):
        publish(registry, tmp_path, {f"update-{n + 1}": 0.9 for n in range(number + 1)})
    page = page_of(registry, tmp_path)
    words = words_of(page)
    if n_versions == 0:
        assert "No version is in production yet." in words
    if n_versions == 1:
        assert "90.0 % right on average over 1 held-out slice." in words
    if n_versions == 60:
        assert f"the newest {MAX_SHOWN} of 60 versions are drawn" in words
        assert f"Each slice on its own, the newest {MAX_SHOWN} of 60" in words
        assert f"the {MAX_SHOWN} of 60 that lost most" in words
        assert page.count("div", "panel") == page.count("div", "column") == MAX_SHOWN
        assert len(re.findall(r"Version \d+ promoted", words)) == 59


def test_versions_that_say_little_are_shown(tmp_path):
    registry = Registry(tmp_path / "news")
    for _ in range(2):
        folder = tmp_path / "staging"
        folder.mkdir()
        registry.publish(folder, Manifest(version=registry.next_number()))
    registry.promote(1)
    words = words_of(page_of(registry, tmp_path))
    assert "Version 1 is in production." in words
    assert "Version 2 not promoted" in words
    publish(registry, tmp_path, {"sport": None, "tech": 0.5})
    assert "50.0 % right on average over 1 held-out slice." in words_of(page_of(registry, tmp_path))


def test_a_version_promoted_by_hand_is_named(registry, tmp_path):
    registry.promote(3, reason="the gate is too strict", force=True, by="otto")
    words = words_of(page_of(registry, tmp_path))
    assert "Version 3 promoted by hand the gate is too strict otto" in words
    assert "Version 3 in production" in words
    assert "Version 5 rolled back" in words


def test_promotions_by_hand_are_all_named(registry, tmp_path):
    registry.promote(4, reason="it was the cache", by="otto")  # passed, and was rolled back from
    registry.promote(5, reason="back again", by="otto")
    words = words_of(page_of(registry, tmp_path))
    assert "Version 4 promoted by hand it was the cache otto" in words
    assert "Version 5 promoted by hand back again otto" in words
    assert words.count("promoted by hand") == 2


def test_slices_of_deleted_versions_keep_their_numbers(tmp_path):
    registry = Registry(tmp_path / "news")
    names = [f"update-{number}" for number in range(1, 8)]
    for number in range(1, 8):
        publish(registry, tmp_path, dict.fromkeys(names[:number], 0.9))
    assert page_of(registry, tmp_path).count("td", "own") == 7
    registry.gc(keep=2)
    page = page_of(registry, tmp_path)
    headers = [attrs for tag, attrs in page.tags if tag == "th" and attrs.get("title") in names]
    at = page.text.index("version")
    assert page.text[at + 1 : at + 8] == [str(number) for number in range(1, 8)]
    assert len(headers) == 7
    assert page.count("td", "own") == 2, "only versions 6 and 7 have just learned a slice"


def test_the_records_have_an_axis(registry, tmp_path):
    words = words_of(page_of(registry, tmp_path))
    assert "in quarantine 0 200 400 1 2 3 4 5 Timeline" in words


def test_the_history_is_the_line_of_production(registry, tmp_path):
    history = history_of(registry)
    assert history.experiences == ["sport", "tech", "film"]
    assert history.accuracy_matrix[0][0] == 0.9
    assert history.accuracy_matrix[1][:2] == [0.95, 0.8]
    assert history.accuracy_matrix[2] == [0.93, 0.85, 0.88]
    assert history.forgetting == pytest.approx((0.02 - 0.05) / 2)
    assert (history.seconds, history.examples) == (39.0, 800)
    assert write_report({"production": history}, tmp_path / "report.html").stat().st_size > 1_000
    assert all(path.exists() for path in save_plots({"production": history}, tmp_path / "plots", dpi=40))
    registry.gc(keep=1)
    assert [version.number for version in registry.versions()] == [2, 5]
    kept = history_of(registry)
    assert (kept.experiences, kept.examples) == (["sport", "tech", "film"], 700)
    assert [row[:2] for row in kept.accuracy_matrix] == [[0.95, 0.8], [0.93, 0.85]]


def test_there_is_no_history_without_production_or_slices(tmp_path):
    registry = Registry(tmp_path / "news")
    with pytest.raises(ValueError, match="news has no version in production yet"):
        history_of(registry)
    publish(registry, tmp_path, {})
    with pytest.raises(ValueError, match="no version that led to version 1 was measured on a held-out slice"):
        history_of(registry)


def test_a_damaged_registry_is_said(registry, tmp_path):
    (Path(registry.store.root) / "aliases.json").write_text("{")
    with pytest.raises(RegistryError, match=r"aliases\.json is damaged"):
        write_versions_report(registry, tmp_path / "versions.html")
    assert not (tmp_path / "versions.html").exists()


def test_the_table_for_the_terminal(registry):
    stream = io.StringIO()
    Console(file=stream, width=160).print(versions_table(registry))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[1] == ["1", "2026-03-02", "06:00", "sport", "100", "90.0", UNKNOWN, "promoted"]
    assert lines[2][5:7] == ["87.5", "+5.0"], "a new slice is not a fall"
    assert lines[3][:8] == ["3", "2026-03-04", "06:00", "art", "300", "70.0", f"{MINUS}17.5", "refused:"]
    assert lines[4][-2:] == ["rolled", "back"]
    assert lines[5][-2:] == ["in", "production"]
