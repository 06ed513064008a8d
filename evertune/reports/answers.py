"""The answers of the version in production to the held-out records: by class, what is mistaken for what, and the worst.

A version's ``evaluation.json`` holds its predictions, and the slices of the registry hold the records.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evertune.gate.evaluation import Evaluation
from evertune.gate.predictions import Label, Predictions
from evertune.live.slices import load_slice
from evertune.live.versions import EVALUATION
from evertune.registry.registry import RegistryError

if TYPE_CHECKING:
    from evertune.registry.registry import Registry
    from evertune.registry.version import Version

MAX_CLASSES = 40
MAX_CONFUSIONS = 12
MAX_WORST = 10
MAX_TEXT = 300  # characters of a text on the page

_UNSURE = 0.25
"""Quantile of the confidence of right answers; a wrong answer above it contradicts the label with confidence."""


@dataclass(frozen=True)
class ClassAnswers:
    """The answers to the records of one class.

    Args:
        name: Name of the class.
        records: Number of records with this label.
        found: Share of them that got this answer (recall); NaN without records.
        right: Share of the records with this answer whose label it is (precision); NaN if it was never the answer.
    """

    name: str
    records: int
    found: float
    right: float


@dataclass(frozen=True)
class Wrong:
    """A record with a wrong answer.

    Args:
        id: Id of the record.
        slice: Slice that it is in.
        label: Its label.
        predicted: The answer.
        confidence: Probability of the answer; NaN for a task without classes.
        suspect: Whether the answer is so sure that the label may be what is wrong.
        text: Text of the record; empty if the slice cannot be read.
    """

    id: str
    slice: str
    label: Label
    predicted: Label
    confidence: float
    suspect: bool
    text: str = ""


@dataclass(frozen=True)
class Answers:
    """The answers of a version to all held-out records.

    Args:
        records: Number of records.
        classes: Answers by class, the worst first; empty for a task without classes.
        confusions: Label, answer and number of records, the most frequent first; single labels only.
        wrong: All records with a wrong answer, the surest first.
    """

    records: int
    classes: list[ClassAnswers]
    confusions: list[tuple[str, str, int]]
    wrong: list[Wrong]

    @property
    def suspects(self) -> list[Wrong]:
        """The records whose label may be wrong."""
        return [one for one in self.wrong if one.suspect]


def answers_of(registry: Registry, version: Version) -> Answers | None:
    """The answers that a version gave when the gate judged it; None if they were not kept.

    Raises:
        RegistryError: If the file with its predictions is damaged.
    """
    said = predictions_of(version)
    if said is None:
        return None
    with_classes = [one for one in said.values() if one.has_classes]
    wrong = sorted(_wrong(said), key=lambda one: (-one.confidence if one.confidence == one.confidence else 0, one.id))
    texts = _texts(registry, version, {one.slice for one in wrong})
    confusions = Counter(
        (one.label, one.predicted) for one in wrong if isinstance(one.label, str) and isinstance(one.predicted, str)
    )
    return Answers(
        sum(map(len, said.values())),
        _by_class(with_classes),
        [
            (label, predicted, n)
            for (label, predicted), n in sorted(confusions.items(), key=lambda item: (-item[1], item))
        ]
        if with_classes
        else [],
        [replace(one, text=texts.get((one.slice, one.id), "")) for one in wrong],
    )


def predictions_of(version: Version) -> dict[str, Predictions] | None:
    """The predictions of a version by the name of their slice; None if they were not kept.

    Raises:
        RegistryError: If the file with them is damaged.
    """
    if EVALUATION not in version.manifest.files:
        return None
    try:
        return dict(Evaluation.from_dict(json.loads(version.read(EVALUATION))).slices)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RegistryError(f"{EVALUATION} of version {version.number} cannot be read: {error}") from error


def write_suspects(registry: Registry | str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """Write the held-out records whose label production contradicts with confidence, as JSON lines for relabelling.

    Each line has ``id``, ``slice``, ``text``, ``label``, ``predicted`` and ``confidence``, the surest first. Either the
    label or the answer is wrong.

    Args:
        registry: A registry, its folder or its URL.
        out: File to write; its folders are created.

    Returns:
        The number of records.

    Raises:
        ValueError: If nothing is in production, or its predictions were not kept.
        RegistryError: If the registry is damaged.
    """
    from evertune.registry.registry import Registry as Opened

    opened = registry if isinstance(registry, Opened) else Opened(os.fspath(registry))
    production = opened.production
    answers = None if production is None else answers_of(opened, production)
    if answers is None:
        raise ValueError(f"{opened.store.root} has no version in production whose predictions were kept")
    keys = ("id", "slice", "text", "label", "predicted", "confidence")
    lines = [json.dumps({key: getattr(one, key) for key in keys}, ensure_ascii=False) for one in answers.suspects]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def _wrong(said: dict[str, Predictions]) -> Iterator[Wrong]:
    """The records with a wrong answer. A label is suspect if the answer is as sure as most right ones."""
    with_classes = [one for one in said.values() if one.has_classes]
    sure = np.concatenate([np.empty(0), *(one.confidence[one.correct] for one in with_classes)])
    enough = float(np.quantile(sure, _UNSURE)) if len(sure) else math.inf
    for name, one in said.items():
        if not one.has_classes:
            continue
        for place in np.flatnonzero(~one.correct).tolist():
            confidence = float(one.confidence[place])
            yield Wrong(one.ids[place], name, one.labels[place], one.predicted[place], confidence, confidence >= enough)


def _by_class(said: Sequence[Predictions]) -> list[ClassAnswers]:
    labels, answers, both = Counter[str](), Counter[str](), Counter[str]()
    for one in said:
        for total, counts in zip((labels, answers, both), one.class_counts(), strict=True):
            total.update(counts)
    classes = [
        ClassAnswers(name, labels[name], _share(both[name], labels[name]), _share(both[name], answers[name]))
        for name in labels | answers
    ]
    return sorted(classes, key=lambda one: (math.inf if math.isnan(one.found) else one.found, one.name))


def _texts(registry: Registry, version: Version, slices: set[str]) -> dict[tuple[str, str], str]:
    """The text of each record of some slices, by slice and id. A slice that cannot be read has none."""
    texts: dict[tuple[str, str], str] = {}
    try:
        entries = version.slices()
    except RegistryError:
        return texts
    for entry in entries:
        if entry.name not in slices:
            continue
        try:
            rows = load_slice(registry.store, entry)
        except (OSError, ValueError):
            continue
        for row in rows:
            parts = [str(row["record"].get(name, "")) for name in version.text_fields]
            texts[entry.name, row["id"]] = " / ".join(part for part in parts if part)
    return texts


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
