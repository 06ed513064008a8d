"""The benchmark of text streams: its cells, what it resumes, and its tables."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest

from tests.helpers.lightning_modules import WORDS, tiny_bert

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "text_streams.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("text_streams", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["text_streams"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes, each with a word of its own, in five domains and years."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "text": " ".join([WORDS[number], *WORDS[-1 - i % 3 :]]),
            "label": f"class {number}",
            "domain": f"domain {i % 4}",
            "date": f"{2018 + i % 4}-05-17",
            "split": split,
        }
        for split, n in (("train", 12), ("valid", 4), ("test", 4))
        for number in range(10)
        for i in range(n)
    ]
    for name in ("clinc150", "vader4", "huffpost_2018_2022", "uci3_sentiment"):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.mark.parametrize("name", ["C20", "C100", "vader4", "huffpost-topics", "huffpost-years", "uci3"])
def test_streams_are_drawn_by_the_seed_and_tuned_on_validation_data(
    benchmark: ModuleType, data: Path, name: str
) -> None:
    learned = [benchmark.task(data, name, seed, "test", False) for seed in (0, 0, 1)]
    texts = [[row["text"] for e in one.learned for row in e.train] for one in learned]
    assert texts[0] == texts[1]
    if name != "huffpost-years":
        assert [e.name for e in learned[0].learned] != [e.name for e in learned[2].learned]
    assert sum(len(e.test) for e in learned[0].scored) == 40
    trial = benchmark.task(data, name, 1_000, "valid", False)
    assert len(trial.scored) == (len(learned[0].scored) + 1) // 2
    assert trial.n_train < learned[0].n_train


def test_quick_run_fills_the_table_and_a_second_one_trains_nothing(
    benchmark: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_bert(tmp_path / "bert")
    arguments = ["--data", str(data), "--results", str(tmp_path / "results"), "--model", model, "--quick"]
    report = benchmark.main(arguments)
    assert set(report["results"]) == {f"C20/{name}" for name in benchmark.QUICK}
    for name, row in report["results"].items():
        assert 0 <= row["accuracy"] <= 100 and row["cpu_seconds"] > 0, name
        assert (row["forgetting"] is None) == ("joint" in name)
    kept = {name: row["bytes_kept"] for name, row in report["results"].items()}
    assert kept["C20/naive"] == kept["C20/joint"] == 0 < kept["C20/ER"] < kept["C20/EWC"]
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == report

    monkeypatch.setattr(benchmark, "learn", None)
    assert benchmark.main(arguments) == report
    assert benchmark.main([*arguments, "--table"]) == report


@pytest.mark.slow
def test_every_method_learns(benchmark: ModuleType, data: Path, tmp_path: Path) -> None:
    job = benchmark.Job(data, tmp_path, ("C20",), (), 1, True, tiny_bert(tmp_path / "bert"))
    for name, method in benchmark.METHODS.items():
        cell = job.cell("C20", name, job.trials("C20", name)[0][0], 0, "test")
        figures = benchmark.learn(cell, method, data)
        assert 0 <= figures["accuracy"] <= 1, name
        assert (figures["bytes_kept"] > 0) == (name not in ("naive", "joint")), name


def test_methods_of_new_classes_have_no_row_where_classes_return(
    benchmark: ModuleType, data: Path, tmp_path: Path
) -> None:
    job = benchmark.Job(data, tmp_path, ("C20", "vader4"), ("SEQ*",), 1, False, "model")
    assert len(job.cells("C20", "SEQ*")) == 4
    assert job.cells("vader4", "SEQ*") == []


def test_a_cell_is_done_by_one_process_and_given_back_when_it_fails(
    benchmark: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = benchmark.Job(data, tmp_path, ("C20",), ("ER",), 2, False, "model")
    trials = job.cells("C20", "ER")
    assert [cell.split for cell in trials] == ["valid"] * 4
    assert {cell.settings["memory_size"] for cell in trials} == {120}

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "learn", fail)
    with benchmark.claimed(trials[0].path(tmp_path)) as mine:
        assert mine and not benchmark._do(job, "ER", trials[0])
    with pytest.raises(RuntimeError, match="out of memory"):
        benchmark._do(job, "ER", trials[0])

    scores = iter([0.25, 0.75, 0.5, 0.1])
    figures = {"forgetting": 0.0, "cpu_seconds": 1.0, "bytes_kept": 1}
    monkeypatch.setattr(benchmark, "learn", lambda *_: {"accuracy": next(scores), **figures})
    assert all(benchmark._do(job, "ER", cell) for cell in trials)
    assert job.chosen("C20", "ER") == job.chosen("C20", "ER, 5 %") == benchmark._rates(benchmark.STREAMS["C20"])[1]
    assert [(cell.split, cell.seed) for cell in job.cells("C20", "ER")] == [("test", 0), ("test", 1)]
    assert job.cells("C20", "ER, 5 %")[0].settings["memory_size"] == 6


def test_bars_hold_the_preset_against_its_rivals_on_common_seeds_and_its_limits(benchmark: ModuleType) -> None:
    def row(*scores: float) -> dict[str, object]:
        by_seed = {str(seed): score for seed, score in enumerate(scores)}
        return {"accuracy": sum(scores) / len(scores), "cpu_seconds": 80.0, "by_seed": by_seed}

    rows = {"preset": row(92.5), "SLDA": row(92.7, 80.0), "ER": row(90.0), "joint": row(91.0)}
    bars = benchmark.bars({"C20": {**rows, "joint, as the preset": row(93.0, 99.0)}, "vader4": {"ER": row(50.0)}})
    assert {name: bar["ok"] for name, bar in bars.items()} == {
        "C20: preset before SLDA": False,
        "C20: preset before ER": True,
        "C20: preset": True,
        "C20: CPU seconds of the preset": True,
        "C20: preset behind joint": True,
        "C20: best without memory": False,
    }
    assert bars["C20: preset behind joint"] == {"value": 0.5, "limit": 1.0, "ok": True}
    assert bars["C20: preset before SLDA"]["value"] == -0.2


def test_better_than_not_training(benchmark: ModuleType) -> None:
    """As measured with the preset as it is now: after a change of it, the benchmark has to run again."""
    scores: defaultdict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for path in (PATH.parent / "results" / "text_streams").glob("*.json"):
        figures = json.loads(path.read_text())
        cell, settings = figures["cell"], figures["cell"]["settings"]
        own_memory = settings.get("memory_size") == benchmark.STREAMS[cell["stream"]].memory
        if cell["split"] == "test" and cell["run"] == "_preset" and own_memory:
            if settings["preset"] == benchmark.preset_digest():
                scores[cell["stream"], "preset"][cell["seed"]] = figures["accuracy"]
        elif cell["split"] == "test" and cell["run"] == "_frozen":
            scores[cell["stream"], json.dumps(settings, sort_keys=True)][cell["seed"]] = figures["accuracy"]
    for stream in benchmark.STREAMS:
        frozen = [name for measured, name in scores if measured == stream and name != "preset"]
        solvers = {json.loads(name)["solver"] for name in frozen}
        assert solvers == {"mean", "lda", "ridge"}, f"{stream}: not all heads without training are measured"
        ours = scores[stream, "preset"]
        assert ours, f"{stream}: the preset is not measured as it is now"
        for name in frozen:
            common = ours.keys() & scores[stream, name].keys()
            assert common, f"{stream}: no seed of {name} has been measured with the preset"
            better = fmean(ours[seed] - scores[stream, name][seed] for seed in common)
            assert better > 0, f"{stream}: {name} is {-100 * better:.1f} points ahead of the preset"
