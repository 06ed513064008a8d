"""The history of a run: its accuracy matrix, its duration and where it went, and further data for the report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evertune.metrics import functional
from evertune.utils.clock import PARTS
from evertune.utils.notebooks import MAX_ROWS, table
from evertune.utils.shares import percent
from evertune.utils.typed_json import decode

_EXTRAS = ("drift", "memory", "examples", "breakdown", "untrained")
"""Fields that a history may lack."""


@dataclass
class History:
    """The history of one run over a stream.

    Example:
        >>> history = History(["sport", "tech"], [[1.0], [0.5, 0.75]], seconds=12.0)
        >>> history.average_accuracy, history.forgetting, history.backward_transfer
        (0.625, 0.5, -0.5)

    Args:
        experiences: Names of the experiences, the columns of the matrix.
        accuracy_matrix: Row ``t`` holds the score in [0, 1] on each experience after update ``t``; NaN or None, or a
            shorter row, if not evaluated. Any ``MatrixLike``; stored as full rows of floats with NaN.
        seconds: Wall-clock time of the run in seconds.
        drift: Drift scores over time, each ``{"step": int, "score": float, "alarm": bool, "threshold": float}``.
        memory: Content of the replay memory at the end: ``{"size": n, "capacity": n, "per_experience": {name: n},
            "per_class": {name: n}}``. Empty without a memory.
        examples: Number of new examples that the run was trained on, or None if not counted.
        breakdown: The same seconds by what they were spent on: ``training`` (with the loading of its batches, replayed
            examples included), ``replay`` (filling the memory), ``importance`` (estimating how much each weight
            matters), ``evaluation`` and ``other`` (setting up, saving). Empty if not measured.
        untrained: What no training would give on the same data: ``{"method": name, "accuracy_matrix": rows, "seconds":
            n}``, of the best classifier over the pretrained encoder. Empty if not measured.

    Raises:
        ValueError: If an argument does not have this form.
    """

    experiences: list[str]
    accuracy_matrix: list[list[float]]
    seconds: float
    drift: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    examples: int | None = None
    breakdown: dict[str, float] = field(default_factory=dict)
    untrained: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.experiences = _names(self.experiences)
        self.accuracy_matrix = _scores(self.accuracy_matrix, self.experiences)
        if not _is_number(self.seconds) or self.seconds < 0:
            raise ValueError(f"seconds must be a number of at least 0, got {self.seconds!r}")
        self.drift = [_drift_point(point, i) for i, point in enumerate(_of_type(self.drift, list, "drift"))]
        self.memory = _memory(_of_type(self.memory, dict, "memory"))
        if self.examples is not None and not _is_count(self.examples):
            raise ValueError(f"examples must be a count or None, got {self.examples!r}")
        self.breakdown = _breakdown(_of_type(self.breakdown, Mapping, "breakdown"))
        self.untrained = _untrained(_of_type(self.untrained, Mapping, "untrained"), self.experiences)

    def _repr_html_(self) -> str:
        """The accuracy matrix, as a notebook shows it: the newest updates and experiences of a long one."""
        last, names = self.accuracy_matrix[-MAX_ROWS:], self.experiences[-MAX_ROWS:]
        first = len(self.accuracy_matrix) - len(last) + 1
        words = f"average accuracy {percent(self.average_accuracy)}, forgetting {percent(self.forgetting)}"
        rows = [[first + t, *map(percent, row[-MAX_ROWS:])] for t, row in enumerate(last)]
        return table(words, ["after update", *names], rows)

    @property
    def average_accuracy(self) -> float:
        """Mean score after the last update, over the experiences that it was evaluated on."""
        return functional.average_accuracy(self.accuracy_matrix)

    @property
    def forgetting(self) -> float:
        """The best earlier score minus the last one (Chaudhry et al. 2018)."""
        return functional.forgetting(self.accuracy_matrix)

    @property
    def backward_transfer(self) -> float:
        """The last score minus the score when first learned (Lopez-Paz & Ranzato 2017)."""
        return functional.backward_transfer(self.accuracy_matrix)

    @property
    def baseline(self) -> History | None:
        """What no training would give, as a history; None if it was not measured."""
        if not self.untrained:
            return None
        return History(self.experiences, self.untrained["accuracy_matrix"], self.untrained["seconds"])

    def __str__(self) -> str:
        """The metrics, and the seconds by what they were spent on."""
        metrics = {"average accuracy": self.average_accuracy}
        if self.baseline is not None:
            metrics["without training"] = self.baseline.average_accuracy
        if len(self.accuracy_matrix) > 1:
            metrics["forgetting"] = self.forgetting
        scores = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if not math.isnan(value))
        spent = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.breakdown.items() if seconds >= 0.05)
        return f"{scores or 'not evaluated'}; {self.seconds:.1f} seconds{spent and f' ({spent})'}"

    def to_dict(self) -> dict[str, Any]:
        """The history as values for strict JSON: None for NaN, the metrics next to the matrix, no empty extras."""
        extras = {name: getattr(self, name) for name in _EXTRAS}
        if self.untrained:
            rows = [[_or_none(score) for score in row] for row in self.untrained["accuracy_matrix"]]
            extras["untrained"] = {**self.untrained, "accuracy_matrix": rows}
        return {
            "experiences": list(self.experiences),
            "accuracy_matrix": [[_or_none(score) for score in row] for row in self.accuracy_matrix],
            "average_accuracy": _or_none(self.average_accuracy),
            "forgetting": _or_none(self.forgetting),
            "backward_transfer": _or_none(self.backward_transfer),
            "seconds": float(self.seconds),
            **{name: value for name, value in extras.items() if value not in ([], {}, None)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """The history from the output of ``to_dict``. The metrics in it are ignored: they follow from the matrix.

        Raises:
            ValueError: If a key is missing or a value does not have its form.
        """
        _of_type(data, Mapping, "a run")
        missing = [key for key in ("experiences", "accuracy_matrix", "seconds") if key not in data]
        if missing:
            raise ValueError(f"a run must have {', '.join(missing)}; it has {', '.join(map(str, data)) or 'nothing'}")
        optional = {key: data[key] for key in _EXTRAS if key in data}
        return cls(data["experiences"], data["accuracy_matrix"], data["seconds"], **optional)


def save_history(path: str | os.PathLike[str], runs: Mapping[str, History]) -> Path:
    """Write the histories of named runs as JSON, atomically: a reader never sees a partial file.

    Args:
        path: File to write; its folders are created.
        runs: History of each run, by name.

    Raises:
        ValueError: If there are no runs.
    """
    if not runs:
        raise ValueError("there are no runs to save")
    path = Path(path)
    text = json.dumps({"runs": {name: run.to_dict() for name, run in runs.items()}}, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    staging.write_text(text + "\n", encoding="utf-8")
    staging.replace(path)
    return path


def load_history(path: str | os.PathLike[str]) -> dict[str, History]:
    """Read the histories that ``save_history`` wrote, by the name of the run.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is empty, truncated, a pickle, not JSON or not a history; the message names the file and
            the problem.
    """
    path = Path(path)
    raw = path.read_bytes()
    if not raw.strip():
        raise ValueError(f"{path} is empty, not a history")
    if raw.startswith((b"\x80", b"PK\x03\x04")):
        raise ValueError(f"{path} is a pickle or a PyTorch archive, which evertune never loads; a history is JSON")
    try:
        data = decode(raw)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON (truncated or corrupt?): {error}") from error
    runs = data.get("runs") if isinstance(data, dict) else None
    if not isinstance(runs, dict) or not runs:
        raise ValueError(f'{path} is not a history: expected {{"runs": {{name: run}}}} with at least one run')
    histories = {}
    for name, run in runs.items():
        try:
            histories[name] = History.from_dict(run)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}, run {name!r}: {error}") from error
    return histories


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _of_type(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} must be a {kind.__name__.lower()}, got a {type(value).__name__}")
    return value


def _names(names: Any) -> list[str]:
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"experiences must be a list of at least one name, got {names!r}")
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"experiences must have different names, got {doubles[0]!r} twice")
    return list(names)


def _scores(matrix: Any, experiences: list[str]) -> list[list[float]]:
    if isinstance(matrix, str | bytes | Mapping) or not hasattr(matrix, "__len__"):
        raise ValueError(f"accuracy_matrix must be a list of rows, got a {type(matrix).__name__}")
    rows: list[list[float]] = functional.as_matrix(matrix).tolist()
    width = len(experiences)
    if len(rows[0]) > width:
        raise ValueError(
            f"accuracy_matrix has {len(rows[0])} columns for {width} experiences ({', '.join(experiences)})"
        )
    for t, row in enumerate(rows):
        for k, score in enumerate(row):
            if score < 0 or score > 1:
                raise ValueError(f"scores must be in [0, 1], got {score} after update {t} on {experiences[k]!r}")
    return [row + [math.nan] * (width - len(row)) for row in rows]


def _drift_point(point: Any, index: int) -> dict[str, Any]:
    if not isinstance(point, Mapping) or not {"step", "score", "alarm", "threshold"} <= point.keys():
        raise ValueError(f"drift[{index}] must have step, score, alarm and threshold, got {point!r}")
    if not _is_count(point["step"]) or not isinstance(point["alarm"], bool):
        raise ValueError(f"drift[{index}] must have a count as step and true or false as alarm, got {point!r}")
    if not _is_number(point["score"]) or not _is_number(point["threshold"]):
        raise ValueError(f"drift[{index}] must have finite numbers as score and threshold, got {point!r}")
    return dict(point)


def _breakdown(seconds: Mapping[Any, Any]) -> dict[str, float]:
    for part, spent in seconds.items():
        if part not in PARTS:
            raise ValueError(f"breakdown must give the seconds of {', '.join(PARTS)}, got {part!r}")
        if not _is_number(spent) or spent < 0:
            raise ValueError(f"breakdown[{part!r}] must be a number of at least 0, got {spent!r}")
    return {part: float(seconds[part]) for part in PARTS if part in seconds}


def _untrained(found: Mapping[str, Any], experiences: list[str]) -> dict[str, Any]:
    if not found:
        return {}
    if not {"method", "accuracy_matrix", "seconds"} <= found.keys() or not isinstance(found["method"], str):
        raise ValueError(f"untrained must have method, accuracy_matrix and seconds, got {sorted(found)}")
    if not _is_number(found["seconds"]) or found["seconds"] < 0:
        raise ValueError(f"untrained['seconds'] must be a number of at least 0, got {found['seconds']!r}")
    return {**found, "accuracy_matrix": _scores(found["accuracy_matrix"], experiences)}


def _memory(memory: dict[str, Any]) -> dict[str, Any]:
    if not memory:
        return {}
    for key in ("size", "capacity"):
        if not _is_count(memory.get(key)):
            raise ValueError(f"memory[{key!r}] must be a count, got {memory.get(key)!r}")
    for key in ("per_experience", "per_class"):
        counts = memory.get(key, {})
        if not isinstance(counts, Mapping) or not all(_is_count(count) for count in counts.values()):
            raise ValueError(f"memory[{key!r}] must give a count for each name, got {counts!r}")
    return dict(memory)
