"""The page, the plots and the table from a history."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from evertune.metrics import History, save_history
from evertune.reports import save_plots, summary_table, write_report
from evertune.reports.chart import MAX_POINTS, keep_peaks, spread

VOID = {"input", "meta", "link", "br", "wbr", "img", "polyline"}
EXPERIENCES = ["business + entertainment", "politics + sport", "tech"]


def example_runs() -> dict[str, History]:
    drift = [
        {"step": step, "score": 0.5 if step == 40 else 0.1, "alarm": step == 40, "threshold": 0.3}
        for step in range(8, 80)
    ]
    memory = {
        "size": 200,
        "capacity": 250,
        "per_experience": {"business + entertainment": 120, "politics + sport": 80},
        "per_class": {"business": 120, "politics": 80},
    }
    return {
        "naive": History(EXPERIENCES, [[0.989], [0.493, 0.981], [0.0, 0.012, 1.0]], 41.2),
        "replay+ewc": History(EXPERIENCES, [[0.989], [0.962, 0.985], [0.951, 0.968, 0.975]], 79, drift, memory, 1334),
        "joint": History(EXPERIENCES, [[0.974, 0.987, 0.963]], 47.5),
    }


class Page(HTMLParser):
    """The text, tags and attributes of a page; asserts that every tag is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.broken = False
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.broken = tag == "wbr"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            if self.broken:  # a place where a browser may break a name
                self.text[-1] += data.strip()
            else:
                self.text.append(data.strip())
        self.broken = False

    def count(self, tag: str, css: str = "") -> int:
        return sum(name == tag and (not css or css in (attrs.get("class") or "").split()) for name, attrs in self.tags)


def page_of(tmp_path, runs) -> Page:
    return Page(write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_shows_every_figure(tmp_path):
    page = page_of(tmp_path, example_runs())
    text = " ".join(page.text).replace("\N{NO-BREAK SPACE}", " ")
    assert "replay+ewc ends at 96.5 % average accuracy, 1.0 points below joint" in text
    assert "naive forgets 97.9 points and ends 62.7 points lower" in text
    for cell in ("98.9", "49.3", "98.1", "0.0", "1.2", "100.0", "95.1", "96.8", "97.5", "97.4", "98.7", "96.3"):
        assert cell in page.text
    assert "1 min 19 s" in page.text
    assert "Where the time went" not in page.text
    assert "1,334" in page.text
    assert "1 alarm, at step 40" in page.text
    assert page.count("span", "alarm") == 1
    assert "200 of 250 examples" in page.text
    assert page.count("table", "map") == 3
    assert page.count("td", "none") == 6
    assert page.count("div", "panel") == 3


def test_where_the_time_went(tmp_path):
    run = example_runs()["naive"]
    run.breakdown = {"training": 30.0, "importance": 1.24, "other": 9.96}
    page = page_of(tmp_path, {"naive": run, "joint": example_runs()["joint"]})
    start = page.text.index("Importance")
    assert page.text[start : start + 9] == [
        *("Importance", "Evaluation", "Other", "naive", "30 s", "\N{EN DASH}", "1.2 s", "\N{EN DASH}", "10.0 s")
    ]
    stream = io.StringIO()
    Console(file=stream, width=100).print(summary_table({"naive": run, "joint": example_runs()["joint"]}))
    assert stream.getvalue().splitlines()[-1].strip() == "naive: training 30 s, importance 1.2 s, other 10.0 s"


def test_the_page_needs_nothing_but_itself(tmp_path):
    source = write_report(example_runs(), tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not page.count("script")
    assert "default-src 'none'" in source
    assert not re.search(r"(https?:)?//\w|@import|url\(", source)
    assert [attrs["href"] for tag, attrs in page.tags if tag == "link"] == ["data:,"]
    assert "prefers-color-scheme: dark" in source
    assert any(attrs.get("name") == "viewport" for tag, attrs in page.tags if tag == "meta")


def test_names_cannot_inject(tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
    run = example_runs()["replay+ewc"]
    run = History([evil, "b"], [[0.5], [0.5, 0.5]], 1, run.drift, run.memory | {"per_class": {evil: 3}})
    path = write_report({evil: run}, tmp_path / "report.html", title=evil)
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.count("script")
    assert not page.count("img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert evil in page.text


def test_drift_goes_on_where_an_update_counts_its_steps_anew(tmp_path):
    tests = [(10, 0.0), (20, 1.0), (5, 0.0), (20, 1.0)]
    drift = [{"step": step, "score": score, "alarm": score > 0, "threshold": 0.5} for step, score in tests]
    page = page_of(tmp_path, {"run": History(["a"], [[1.0]], 1, drift)})
    assert "2 alarms, at steps 20, 40" in page.text
    threshold = next(attrs["points"] for tag, attrs in page.tags if "dashed" in (attrs.get("class") or ""))
    places = [float(point.split(",")[0]) for point in threshold.split()]
    assert places == sorted(places)


def test_points_lie_where_the_scores_say(tmp_path):
    page = page_of(tmp_path, {"run": History(["a", "b"], [[1.0], [0.25, 0.5]], 1)})
    lines = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
    assert lines == ["4,0 96,62.5", "4,0 96,75", "96,50"]


def test_a_line_breaks_where_it_was_not_evaluated(tmp_path):
    page = page_of(tmp_path, {"run": History(["a"], [[1.0], [None], [0.5]], 1)})
    lines = [attrs["points"] for tag, attrs in page.tags if tag == "polyline"]
    assert lines == ["4,0", "96,50"]


@pytest.mark.parametrize(
    "runs",
    [
        {"one": History(["today"], [[0.8]], 3)},
        {"joint only": History(["a", "b"], [[0.8, 0.7]], 3)},
        {"not evaluated": History(["a", "b"], [[None], [None, None]], 3)},
        {"more updates than experiences": History(["a"], [[0.5], [0.6], [0.7]], 3)},
        {"one": History(["a"], [[0.5]], 3), "other": History(["b", "c"], [[0.5], [0.6, 0.7]], 3)},
        {"flat": History(["a"], [[0]], 0, [{"step": 0, "score": 0.0, "alarm": False, "threshold": 0.0}])},
        {"negative": History(["a"], [[0]], 0, [{"step": 5, "score": -1.0, "alarm": True, "threshold": -0.5}])},
        {"empty memory": History(["a"], [[0]], 0, memory={"size": 0, "capacity": 9, "per_class": {}})},
        {"zero": History(["a"], [[0]], 0, memory={"size": 0, "capacity": 9, "per_class": {"x": 0}})},
    ],
    ids=lambda runs: next(iter(runs)),
)
def test_unusual_runs_are_shown(tmp_path, runs):
    page = page_of(tmp_path, runs)
    assert all(name in page.text for name in runs)
    assert all(path.stat().st_size > 1_000 for path in save_plots(runs, tmp_path / "plots", dpi=40))


def test_a_long_stream_stays_small(tmp_path):
    names = [f"part {k}" for k in range(60)]
    drift = [
        {"step": s, "score": 0.9 if s == 77_777 else 0.1, "alarm": s == 77_777, "threshold": 0.5}
        for s in range(100_000)
    ]
    memory = {"size": 300, "capacity": 300, "per_class": {f"class {i}": 2 for i in range(150)}}
    run = History(names, [[0.9] * (t + 1) for t in range(60)], 9, drift, memory)
    path = write_report({"run": run}, tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 2_000_000
    assert "1 alarm, at step 77,777" in page.text
    assert "126 more" in page.text
    assert "A stream of 60 experiences" in page.text
    longest = max((attrs["points"] for tag, attrs in page.tags if tag == "polyline"), key=len)
    assert len(longest.split()) <= MAX_POINTS + 2


def test_a_file_gives_the_same_page(tmp_path):
    path = save_history(tmp_path / "history.json", example_runs())
    from_file = write_report(path, tmp_path / "new" / "a.html").read_text(encoding="utf-8")
    assert from_file == write_report(example_runs(), tmp_path / "b.html").read_text(encoding="utf-8")


def test_nothing_to_report_is_refused(tmp_path):
    for report in (
        lambda: write_report({}, tmp_path / "a.html"),
        lambda: save_plots({}, tmp_path),
        lambda: summary_table({}),
    ):
        with pytest.raises(ValueError, match="there are no runs to report"):
            report()
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(ValueError, match=r"history\.json is not valid JSON"):
        write_report(tmp_path / "history.json", tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_no_plot_cuts_a_name(tmp_path):
    from matplotlib.image import imread

    long = [f"complaints_about_deliveries_in_northern_europe_{n}_" + "x" * 60 for n in range(3)]
    (_, run), *_ = list(example_runs().items())[1:]
    run = replace(run, experiences=long, memory=run.memory | {"per_class": dict.fromkeys(long, 7)})
    for path in save_plots({"a name of a run that says everything about it " * 3: run}, tmp_path, dpi=50):
        ink = imread(path)[..., :3].min(-1) < 0.9
        edges = [ink[0], ink[-1], ink[:, 0], ink[:, -1]]
        assert ink.any() and not any(edge.any() for edge in edges), f"{path.name} has ink at its edge"


def test_plots_are_png_files(tmp_path):
    runs = example_runs() | {"$bad_math{$": example_runs()["naive"]}
    paths = save_plots(runs, tmp_path / "plots", dpi=50)
    assert [path.name for path in paths] == [
        "accuracy_over_time.png",
        "accuracy_matrices.png",
        "drift.png",
        "memory.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_table_for_the_terminal():
    stream = io.StringIO()
    runs = example_runs() | {"[red]tag[/red]": example_runs()["naive"]}
    Console(file=stream, width=100).print(summary_table(runs))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[1] == ["naive", "33.7", "%", "97.9", "\N{MINUS SIGN}97.9", "41", "s"]
    assert lines[3] == ["joint", "97.5", "%", "\N{EN DASH}", "\N{EN DASH}", "48", "s"]
    assert lines[4][0] == "[red]tag[/red]"


def test_labels_keep_their_order_and_distance():
    moved = spread([0.0, 1.0, 2.0, 99.0, 100.0], gap=8)
    assert moved == [0.0, 8.0, 16.0, 92.0, 100.0]


def test_peaks_survive_thinning():
    values = [0.0] * 10_000
    values[1234], values[8765] = 5.0, -5.0
    kept = keep_peaks(values)
    assert {0, 1234, 8765, 9999} <= set(kept)
    assert len(kept) <= MAX_POINTS + 2


def test_what_no_training_would_give_is_beside_the_runs(tmp_path):
    untrained = {"method": "LDA", "accuracy_matrix": [[0.9], [0.85, 0.9], [0.8, 0.85, 0.9]], "seconds": 3.0}
    runs = {name: run if name == "joint" else replace(run, untrained=untrained) for name, run in example_runs().items()}
    page = Page(write_report(runs, tmp_path / "report.html").read_text())
    assert page.text.count("no training (LDA)") >= 3  # the headline, the summary, the accuracy matrices
    text = " ".join(page.text).replace("\N{NO-BREAK SPACE}", " ")
    assert "11.5 points above no training (LDA)" in text
    assert summary_table(runs).row_count == 4
    assert len(save_plots(runs, tmp_path)) == 4
