"""A registry with everything that pages show, whose versions were never trained."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from evertune.gate.predictions import Predictions
from evertune.gate.verdict import Check, Verdict
from evertune.live.outcome import reasons_of
from evertune.live.slices import save_slice
from evertune.registry.journal import Journal
from evertune.registry.manifest import Manifest, Metrics, VerdictSummary
from evertune.registry.registry import Registry
from evertune.registry.slice_index import SliceEntry

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
FOREIGN = (EVIL, "[/x]", "\x1b[31mred\u202e")
"""Labels that are markup for a page, for rich, and for a terminal."""
CLASSES = ["sport", "tech", "art", *FOREIGN]
START = datetime(2026, 3, 1, 6, 0, tzinfo=UTC)


def news(folder: Path, n_records: int = 24) -> Registry:
    """Versions 1 and 2 were promoted, 3 was refused, 4 has passed and waits. Records are pending and in quarantine."""
    registry = Registry(folder / "news")
    slices: list[SliceEntry] = []
    said: dict[str, Predictions] = {}
    for number in range(1, 5):
        slices.append(_slice(registry, number, n_records))
        said = {entry.name: _predictions(place, number, n_records) for place, entry in enumerate(slices, start=1)}
        _publish(registry, folder, number, slices, said)
        if number < 3:
            registry.promote(number, reason="the gate", verify=False)
    registry.set_refused(3)
    _records(Journal(registry.store))
    return registry


def _slice(registry: Registry, number: int, n_records: int) -> SliceEntry:
    rows = [
        {
            "id": f"{number}-{i}",
            "origin": f"inbox/{number}.jsonl:{i}",
            "record": {"text": f"text {i} of {CLASSES[(i + number) % len(CLASSES)]}", "label": _label(number, i)},
        }
        for i in range(n_records)
    ]
    return save_slice(registry.store, f"update-{number}", rows)


def _label(number: int, i: int) -> str:
    return CLASSES[i * number % min(number + 2, len(CLASSES))]


def _predictions(number: int, version: int, n_records: int) -> Predictions:
    """Of 24 answers, 3 are wrong; of those of the slice that is new to a version, 5."""
    labels = [_label(number, i) for i in range(n_records)]
    wrong = {i for i in range(n_records) if i % 8 == 3 or (number == version and i % 11 == 5)}
    predicted = [
        CLASSES[(CLASSES.index(one) + 1) % len(CLASSES)] if i in wrong else one for i, one in enumerate(labels)
    ]
    sure = np.linspace(0.5, 0.99, n_records)
    ids = [f"{number}-{i}" for i in range(n_records)]
    right = np.array([a == b for a, b in zip(labels, predicted, strict=True)])
    return Predictions(ids, list(labels), list(predicted), sure, np.where(right, sure, 0.01))


def _publish(
    registry: Registry, folder: Path, number: int, slices: list[SliceEntry], said: dict[str, Predictions]
) -> None:
    staging = folder / "publishing"
    (staging / "model").mkdir(parents=True)
    (staging / "model" / "model.safetensors").write_bytes(b"weights %d" % number)
    accuracy = {name: one.accuracy for name, one in said.items()}
    verdict = _verdict(number, accuracy)
    files: dict[str, Any] = {
        "evaluation.json": {"slices": {name: one.to_dict() for name, one in said.items()}},
        "verdict.json": verdict.to_dict(),
    }
    for name, content in files.items():
        (staging / name).write_text(json.dumps(content))
    manifest = Manifest(
        version=number,
        parent=min(number - 1, 2) or None,
        created=START + timedelta(days=number),
        kind="update" if number > 1 else "first",
        experience=f"update-{number}",
        reason="drift: 0.31 above 0.05" if number % 2 else "200 records are pending",
        consumed=number,
        module="SequenceClassificationModule",
        classes=CLASSES,
        records={"train": 100 * number, "held_out": len(said), "quarantined": 1},
        verdict=VerdictSummary(verdict.passed, reasons_of(verdict)),
        metrics=Metrics(dict(accuracy), sum(accuracy.values()) / len(accuracy)),
        seconds={"plan": 1.0, "train": 10.0, "fit": 8.0, "evaluate": 2.0},
        config={"schema": {"text": "text", "label": "label"}},
        code="evertune 0.1.0",
    )
    registry.publish(staging, manifest, slices)


def _verdict(number: int, accuracy: dict[str, float]) -> Verdict:
    new = f"update-{number}"
    before = None if number == 1 else accuracy[new] - 0.2
    checks = [
        Check.of_version("new records", new, before, accuracy[new], 0.02, True, f"on {EVIL} it is right", on="less"),
        Check.of_version("calibration", "", 0.1, 0.12, 0.1, None, "cannot tell: 24 records are too few"),
    ]
    if number == 3:
        words = "on 'update-1' the new version is right on 60.0 % of 24 held-out records"
        checks.append(Check.of_version("forgetting", "update-1", 0.9, 0.6, 0.02, False, words, 0.004, on="less"))
    return Verdict.of(checks)


def _records(journal: Journal) -> None:
    """Segments 1 to 4, of which production has learned 2; the fourth is the only one with several records."""
    for number in range(1, 5):
        rows = [
            {"id": f"p{number}-{i}", "origin": f"inbox/{number}.jsonl:{i}", "record": {"text": FOREIGN[i % 3], "n": i}}
            for i in range(1 if number < 4 else 60)
        ]
        bad: list[dict[str, Any]] = []
        if number == 4:
            bad = [
                {
                    "id": f"q-{i}",
                    "origin": f"inbox/4.jsonl:{60 + i}",
                    "kind": "refused",
                    "reason": f"field 'label': {FOREIGN[i]!r} is not a name of {i}",
                    "record": {"text": FOREIGN[i], "label": i},
                }
                for i in range(3)
            ]
            bad.append({"origin": "inbox/4.jsonl:99", "kind": "unreadable", "reason": "not JSON", "raw": f"{{{EVIL}"})
        journal.append(rows, bad=bad, waiting=[], offset={"line": number})


def queue(path: Path) -> Path:
    """A queue of ``evertune review`` with three records: a name, names and entities."""
    suggested = [EVIL, ["a", "b"], [{"start": 0, "end": 3, "label": "PER"}]]
    lines = [
        {"text": f"text {i} {FOREIGN[i]}", "suggested": one, "sureness": 0.1 * i, "version": 2, "label": None}
        for i, one in enumerate(suggested)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
