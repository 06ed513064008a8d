"""What no training would give on the records of a registry: a closed-form classifier, kept from version to version."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evertune.gate.predictions import Predictions
from evertune.lightning_modules.analytic import AnalyticHead
from evertune.live.evaluation import features_of_rows
from evertune.sources.base import Row
from evertune.utils.typed_json import read_json

FOLDER = "untrained"
_SUMS, _ABOUT = "head.safetensors", "head.json"
_SETTINGS = ("model_name_or_path", "pooling")
"""Hyperparameters of a module that its features depend on before it is trained."""

logger = logging.getLogger("evertune.live")


@dataclass(frozen=True)
class NoTraining:
    """The accuracy of a version beside that of the classifier, on the same held-out records.

    Args:
        accuracy: Share of the records on which the classifier is right.
        of_version: Share on which the version is.
        records: Number of the records.
    """

    accuracy: float
    of_version: float
    records: int

    @property
    def words(self) -> str:
        """The comparison, as a message for people."""
        return (
            f"without training (LDA over the pretrained encoder), {100 * self.accuracy:.1f} % of {self.records} "
            f"held-out records are right; with it, {100 * self.of_version:.1f} %"
        )


@dataclass(frozen=True)
class _About:
    """What the sums in a folder are over."""

    classes: list[str]
    settings: dict[str, str]


def learn(
    module: Any, rows: Sequence[Row], parent: Path | None, folder: Path, label: str, **reading: Any
) -> tuple[AnalyticHead, list[str]] | None:
    """Add the records of an update to the classifier of the version before, and write it to a folder.

    Args:
        module: The pretrained module, with a ``tokenizer`` and ``features(batch)``.
        rows: Records that the update is trained on.
        parent: Folder of the classifier of the version before; None for a first version.
        folder: Folder to write.
        label: Field with the label.
        reading: ``text``, ``batch_size`` and ``max_length``, as for :func:`~evertune.live.evaluation.evaluate`.

    Returns:
        The classifier and its classes; None if the version before has none, of this encoder.
    """
    settings = {name: str(module.hparams.get(name)) for name in _SETTINGS}
    known = _About([], settings)
    if parent is not None:
        if not (parent / _ABOUT).is_file():
            return None
        known = read_json(_About, (parent / _ABOUT).read_bytes())
        if known.settings != settings:
            return None
    features = torch.from_numpy(features_of_rows(module, rows, **reading))
    labels = [str(row["record"][label]) for row in rows]
    classes = list(dict.fromkeys([*known.classes, *labels]))
    head = AnalyticHead(features.shape[1], len(known.classes) or len(classes))
    if parent is not None:
        head.load_state_dict(load_file(parent / _SUMS))
        head.grow(len(classes))
    numbers = {name: number for number, name in enumerate(classes)}
    head.update(features, torch.tensor([numbers[name] for name in labels]))
    head.solve()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), folder / _SUMS)
    (folder / _ABOUT).write_text(json.dumps(asdict(_About(classes, settings))) + "\n", encoding="utf-8")
    return head, classes


def compare(
    module: Any,
    head: AnalyticHead,
    classes: Sequence[str],
    slices: Mapping[str, Sequence[Row]],
    said: Mapping[str, Predictions],
    label: str,
    **reading: Any,
) -> NoTraining | None:
    """Compare a version with the classifier on held-out records; None without records.

    Args:
        module: The pretrained module.
        head: The classifier.
        classes: Its classes.
        slices: Records by the name of their slice.
        said: Predictions of the version for these records, and possibly for others.
        label: Field with the label.
        reading: As for :func:`learn`.
    """
    rows = [row for chosen in slices.values() for row in chosen]
    if not rows:
        return None
    answers = head(torch.from_numpy(features_of_rows(module, rows, **reading))).argmax(1).tolist()
    right = [classes[answer] == row["record"][label] for answer, row in zip(answers, rows, strict=True)]
    of_version = []
    for name, chosen in slices.items():
        places = {one: place for place, one in enumerate(said[name].ids)}
        of_version += [bool(said[name].correct[places[row["id"]]]) for row in chosen]
    return NoTraining(sum(right) / len(rows), sum(of_version) / len(rows), len(rows))
