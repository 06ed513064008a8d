"""What a notebook shows of a history, a registry, a version and a comparison: escaped, and never too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evertune.drift.comparison.comparison import Alarm, Comparison, Scan, SetAside
from evertune.metrics.history import History
from tests.helpers.shown import EVIL, FOREIGN, news
from tests.reports.test_stream import Page


def words(shown: Any) -> str:
    source = shown._repr_html_()
    page = Page(source)
    assert not page.count("script") and not page.count("img")
    assert "\x1b" not in source and "\u202e" not in source
    return " ".join(page.text)


def test_a_history() -> None:
    history = History([FOREIGN[0], FOREIGN[2]], [[1.0], [0.5, 0.75]], seconds=12.0)
    shown = words(history)
    assert "average accuracy 62.5 %, forgetting 50.0 %" in shown
    assert f"after update {EVIL}" in shown and r"\x1b[31mred\u202e" in shown
    assert "1 100.0 % \N{EN DASH} 2 50.0 % 75.0 %" in shown
    many = History([f"e-{k}" for k in range(60)], [[0.5] * (t + 1) for t in range(60)], seconds=1.0)
    page = Page(many._repr_html_())
    assert page.count("tr") == 21 and page.count("td") == 20 * 21
    assert page.text[1:3] == ["after update", "e-40"] and "60" in page.text


def test_a_registry_and_its_versions(tmp_path: Path) -> None:
    registry = news(tmp_path)
    assert "2 production 2026-03-03 06:00 update-2 200 83.3 % passed: 2 checks" in words(registry)
    shown = words(registry.version(3))
    assert "version 3, refused: on 'update-1'" in shown and "train records 300" in shown
    assert "accuracy on update-1 87.5 %" in shown and EVIL in shown
    registry.store.write("versions/1/manifest.json", b"{")
    registry.store.write("aliases.json", b"{")
    again = type(registry)(registry.store.root)
    assert "is damaged or cut short" in words(again) and "aliases.json is damaged" in words(again)


@pytest.mark.parametrize("alarms", [[], [Alarm(17, FOREIGN[0], 0.3, 0.1)]])
def test_a_comparison(alarms: list[Alarm]) -> None:
    scan = Scan("text", "MMD", 1_000.0, 200, 300, 4, alarms, [])
    rest: Any = [[], [], [], ([], [])]
    found = Comparison("march", EVIL, "MiniLM", 1, 200, 300, SetAside(), SetAside(), [scan], None, *rest)  # type: ignore[arg-type]
    shown = words(found)
    assert shown.startswith(f"{EVIL} against march: {'drift' if alarms else 'no drift'}")
    assert (f"17 ({FOREIGN[0]}) 0.3 0.1" in shown) is bool(alarms)
