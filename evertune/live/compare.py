"""Two versions on the same records: which is better, beyond chance, in which classes, and on which records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np

from evertune.gate.comparison import PairedTest
from evertune.gate.predictions import Label, Predictions
from evertune.live.evaluation import evaluate
from evertune.live.slices import load_slice
from evertune.registry.registry import Registry
from evertune.registry.serving import load
from evertune.registry.version import Version
from evertune.sources.base import Row
from evertune.sources.values import text_value
from evertune.streams.tables import read_rows
from evertune.tasks.base import Task, task_of
from evertune.tasks.texts import truncation_length

Progress = Callable[[str], None]
_DATA = "data"


@dataclass(frozen=True)
class ClassChange:
    """The records of one class: the share that each version found (recall), and its share of right answers (precision).

    Args:
        name: Name of the class.
        records: Number of records with this label.
        found: Recall of both versions; NaN without records.
        right: Precision of both versions; NaN for one that never gave this answer.
    """

    name: str
    records: int
    found: tuple[float, float]
    right: tuple[float, float]


@dataclass(frozen=True)
class Confusion:
    """How many records of a class each version took for another class."""

    label: str
    answer: str
    records: tuple[int, int]


@dataclass(frozen=True)
class Flip:
    """A record on which the versions differ in score.

    Args:
        id: Id of the record, or its number in the file.
        text: Its text; a pair is joined by `` / ``.
        label: Its label.
        answers: The answers of both versions; empty for a task without classes.
        scores: The scores of both versions, 0 or 1 for classes.
        confidence: The probability of both answers; NaN for a task without classes.
    """

    id: str
    text: str
    label: Any
    answers: tuple[Label, Label]
    scores: tuple[float, float]
    confidence: tuple[float, float]


@dataclass(frozen=True)
class Compared:
    """Two versions on the same records.

    Args:
        versions: Numbers of the versions, the one to compare with first.
        records: Number of records.
        bad: Number of records of the file that were left out.
        first_bad: The reason of the first of them.
        scores: The mean score of each version, the accuracy if labels are classes.
        p_worse: Probability of such a loss by chance, if the second version were as good as the first.
        p_better: Probability of such a gain by chance.
        alpha: Probability below which a difference is taken for real.
        classes: The classes, the one that lost most first; empty for a task without classes.
        confusions: What is taken for what, the largest change first; single labels only.
        worse: Records with a lower score, the surest wrong answer or the largest loss first.
        better: Records with a higher score, likewise.
    """

    versions: tuple[int, int]
    records: int
    bad: int
    first_bad: str
    scores: tuple[float, float]
    p_worse: float
    p_better: float
    alpha: float
    classes: list[ClassChange]
    confusions: list[Confusion]
    worse: list[Flip]
    better: list[Flip]

    @property
    def is_worse(self) -> bool:
        """Whether the second version is worse than chance explains."""
        return self.p_worse < self.alpha

    @property
    def is_better(self) -> bool:
        """Whether the second version is better than chance explains."""
        return self.p_better < self.alpha

    @property
    def headline(self) -> str:
        """The result as a sentence."""
        before, now = self.versions
        change = 100 * (self.scores[1] - self.scores[0])
        if self.is_worse:
            return f"version {now} is worse than version {before} by {-change:.1f} points (p = {self.p_worse:.2g})"
        if self.is_better:
            return f"version {now} is better than version {before} by {change:.1f} points (p = {self.p_better:.2g})"
        p = min(self.p_worse, self.p_better)
        return f"no difference beyond chance between versions {before} and {now}: {change:+.1f} points (p = {p:.2g})"

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values; None for what is not a number."""
        found: dict[str, Any] = _finite(asdict(self))
        return {**found, "is_worse": self.is_worse, "is_better": self.is_better, "headline": self.headline}


def compare_versions(
    registry: Registry | str | PathLike[str],
    a: str | int = "previous",
    b: str | int = "production",
    data: Any = None,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    alpha: float = 0.05,
    batch_size: int = 64,
    max_length: int | None = None,
    module_class: Any = None,
    progress: Progress | None = None,
) -> Compared:
    """Let two versions of a registry predict the same records, one after the other, and compare their answers.

    The test is paired: McNemar's for labels that are classes (1947, exact), and Fisher's randomisation test (1935) for
    scores. Only one model is in memory at a time.

    Args:
        registry: A registry, or its folder or URL.
        a: The version to compare with: its number, or an alias. Default: ``previous``.
        b: The other one. Default: ``production``.
        data: Records with labels: a file, a folder, rows or a dataset. By default the held-out records of ``b``.
        text: Field with the text, or the two fields of a pair. Default: as the version was trained, else ``text``.
        label: Field with the label. Default: as the version was trained, else ``label``.
        alpha: Probability with which chance alone may be taken for a difference. Default: 0.05.
        batch_size: Records per forward pass. Default: 64.
        max_length: Maximum number of tokens. Default: as the version was trained.
        module_class: Class of the module if it is not a built-in one.
        progress: Called with what is being done.

    Raises:
        RegistryError: If the registry or a version does not exist or is damaged.
        ValueError: If ``a`` and ``b`` are the same version, ``alpha`` is not between 0 and 1, or there are no records
            with labels.

    Example::

        found = compare_versions("registry", 7, 8, "complaints.jsonl")
        print(found.headline, found.worse[0].text)
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    registry = registry if isinstance(registry, Registry) else Registry(str(registry))
    versions = registry.version(a), registry.version(b)
    if versions[0].number == versions[1].number:
        raise ValueError(f"{a} and {b} are both version {versions[0].number}: name two versions")
    fields = _Fields.of(versions[1], text, label)
    say = progress or (lambda _: None)
    rows: list[Row] | None = None if data is not None else _held_out(registry, versions[1])
    bad, first_bad, said = 0, "", []
    for version in versions:
        say(f"version {version.number}: loading")
        module = load(registry, version.number, module_class=module_class).module
        if rows is None:
            rows, bad, first_bad = _rows_of(data, fields, task_of(module))
        say(f"version {version.number}: {len(rows):,} records")
        length = truncation_length(max_length or fields.max_length, module.tokenizer, module)
        slices = {_DATA: rows}
        said.append(evaluate(module, slices, fields.text, fields.label, batch_size, length)[_DATA])
        del module
    assert rows is not None
    return _compared((versions[0].number, versions[1].number), rows, fields, (said[0], said[1]), alpha, bad, first_bad)


@dataclass(frozen=True)
class _Fields:
    """Where the records have their text and their label, and how much of a text a version reads."""

    text: str | list[str]
    label: str
    max_length: int | None

    @classmethod
    def of(cls, version: Version, text: str | Sequence[str] | None, label: str | None) -> _Fields:
        config = version.manifest.config
        schema, data = (
            part if isinstance(part, Mapping) else {} for part in (config.get("schema"), config.get("data"))
        )
        several = version.text_fields if text is None else [text] if isinstance(text, str) else list(text)
        return cls(
            several if len(several) > 1 else several[0], label or schema.get("label", "label"), data.get("max_length")
        )

    @property
    def texts(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else self.text


def _held_out(registry: Registry, version: Version) -> list[Row]:
    rows = {row["id"]: row for entry in version.slices() for row in load_slice(registry.store, entry)}
    if not rows:
        raise ValueError(f"version {version.number} has no held-out records: name a file of records with labels (data)")
    return list(rows.values())


def _rows_of(data: Any, fields: _Fields, task: Task) -> tuple[list[Row], int, str]:
    """The records of a file, how many of them are bad, and the reason of the first."""
    columns = {**dict.fromkeys(fields.texts, text_value), fields.label: task.check_label}
    found = read_rows(data, columns, on_bad_row="skip")
    rows: list[Row] = [{"id": str(number), "record": dict(row)} for number, row in enumerate(found.dataset, 1)]
    return rows, len(found.bad_rows), found.bad_rows[0].reason if found.bad_rows else ""


def _compared(
    versions: tuple[int, int],
    rows: list[Row],
    fields: _Fields,
    said: tuple[Predictions, Predictions],
    alpha: float,
    bad: int,
    first_bad: str,
) -> Compared:
    test = PairedTest(alpha)
    old, now = said
    change = now.score - old.score
    # A wrong answer that is sure does the most harm; a task without classes has the size of the change alone.
    weight = np.nan_to_num(np.where(change < 0, now.confidence, old.confidence))
    order = sorted(np.flatnonzero(change).tolist(), key=lambda row: (-abs(change[row]), -weight[row], row))
    flips = [_flip(rows[row], row, fields, said) for row in order]
    with_classes = old.has_classes and now.has_classes
    return Compared(
        versions,
        len(rows),
        bad,
        first_bad,
        (old.accuracy, now.accuracy),
        test.p_value(old, now),
        test.p_value(now, old),
        alpha,
        _classes(said) if with_classes else [],
        _confusions(said) if with_classes else [],
        [flip for flip in flips if flip.scores[1] < flip.scores[0]],
        [flip for flip in flips if flip.scores[1] > flip.scores[0]],
    )


def _flip(row: Row, place: int, fields: _Fields, said: tuple[Predictions, Predictions]) -> Flip:
    old, now = said
    return Flip(
        row["id"],
        " / ".join(str(row["record"][name]) for name in fields.texts),
        row["record"][fields.label],
        (old.predicted[place], now.predicted[place]),
        (float(old.score[place]), float(now.score[place])),
        (float(old.confidence[place]), float(now.confidence[place])),
    )


def _classes(said: tuple[Predictions, Predictions]) -> list[ClassChange]:
    (true, given_before, both_before), (_, given_now, both_now) = said[0].class_counts(), said[1].class_counts()

    def change(name: str) -> ClassChange:
        found = _share(both_before[name], true[name]), _share(both_now[name], true[name])
        right = _share(both_before[name], given_before[name]), _share(both_now[name], given_now[name])
        return ClassChange(name, true[name], found, right)

    classes = [change(name) for name in true | given_before | given_now]
    return sorted(classes, key=lambda one: (_lost(one.found), -one.records, one.name))


def _lost(pair: tuple[float, float]) -> float:
    change = pair[1] - pair[0]
    return math.inf if math.isnan(change) else change


def _confusions(said: tuple[Predictions, Predictions]) -> list[Confusion]:
    counts = [
        Counter(
            (label, answer)
            for label, answer in zip(one.labels, one.predicted, strict=True)
            if isinstance(label, str) and isinstance(answer, str) and label != answer
        )
        for one in said
    ]
    found = [Confusion(*pair, (counts[0][pair], counts[1][pair])) for pair in counts[0] | counts[1]]
    return sorted(
        found, key=lambda one: (-abs(one.records[1] - one.records[0]), -max(one.records), one.label, one.answer)
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
