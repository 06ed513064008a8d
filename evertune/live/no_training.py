"""What no training would give on the records of a registry: a closed-form classifier, kept from version to version."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evertune.gate.predictions import Predictions
from evertune.lightning_modules.analytic import AnalyticHead
from evertune.lightning_modules.analytic_classification import AnalyticClassificationModule
from evertune.live.evaluation import features_of_rows
from evertune.live.setup import Setup, as_json
from evertune.live.slices import thin
from evertune.live.training import starting_module
from evertune.registry.version import Version
from evertune.sources.base import Row
from evertune.utils.files import write_atomically
from evertune.utils.typed_json import from_json, read_json

_FOLDER = "untrained"
_SUMS, _ABOUT = "head.safetensors", "head.json"
UNTRAINED = f"{_FOLDER}/accuracy.json"
"""The file of a version that says what no training would give."""
_SETTINGS = ("model_name_or_path", "pooling")
"""Hyperparameters of a module on which its features depend before it is trained."""
_ENOUGH = 500
"""Held-out records on which versions are compared with the classifier."""

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
    """What the sums of a classifier are over.

    Args:
        classes: Its classes.
        settings: Settings of the encoder.
    """

    classes: list[str]
    settings: dict[str, str]


def words_of(content: Any) -> str:
    """The comparison in a version's file :data:`UNTRAINED`, as a message for people."""
    return from_json(NoTraining, content).words


def pretrained(setup: Setup) -> Any:
    """The module before any training, for its features."""
    module = starting_module(setup.model, None)
    if not getattr(module, "classes", True) and hasattr(module, "add_classes"):
        module.add_classes(["any"])  # a head has to have a row; the features do not depend on it
    return setup.placed(module)


def keep_sums(before: Path, folder: Path) -> None:
    """Copy the sums of a version to one that has learned the same records."""
    if (before / _FOLDER).is_dir():
        shutil.copytree(before / _FOLDER, folder / _FOLDER, ignore=shutil.ignore_patterns(Path(UNTRAINED).name))


def measure_untrained(
    setup: Setup,
    folder: Path,
    parent: Version | None,
    rows: Sequence[Row],
    slices: Mapping[str, list[Row]],
    said: Mapping[str, Predictions],
) -> None:
    """Compare a new version with a classifier that has learned the same records in closed form.

    The sums of the classifier are those of the version before and the records of this update. They are written to the
    folder of the new version, with the result. Nothing is written if the settings leave it out, the module has no
    features or is not trained itself, labels are not single classes, or the version before has no such sums.

    Args:
        setup: What all updates have in common.
        folder: Folder of the new version.
        parent: The version that the update starts from.
        rows: Records that the update was trained on.
        slices: Held-out records by the name of their slice.
        said: The new version's predictions for them.
    """
    model, labels = setup.model, [setup.label_of(row) for row in rows]
    if not setup.settings.untrained or isinstance(model, AnalyticClassificationModule):
        return
    if not callable(getattr(model, "features", None)) or not all(isinstance(label, str) for label in labels):
        return
    known = _About([], {name: str(model.hparams.get(name)) for name in _SETTINGS})
    before = None if parent is None else setup.versions.folder(parent) / _FOLDER
    if before is not None:
        if not (before / _ABOUT).is_file():
            return
        stored = read_json(_About, (before / _ABOUT).read_bytes())
        if stored.settings != known.settings:
            return
        known = stored
    classes = list(dict.fromkeys([*known.classes, *labels]))
    some = [(name, row) for name, chosen in thin(dict(slices), _ENOUGH).items() for row in chosen]
    try:
        module = pretrained(setup)
        features = torch.from_numpy(features_of_rows(module, [*rows, *(row for _, row in some)], **setup.reading))
    except (TypeError, KeyError, AttributeError) as error:
        logger.warning("what no training would give is not known: %s: %s", type(error).__name__, error)
        return
    head = AnalyticHead(features.shape[1], len(known.classes) or len(classes))
    if before is not None:
        head.load_state_dict(load_file(before / _SUMS))
        head.grow(len(classes))
    numbers = {name: number for number, name in enumerate(classes)}
    head.update(features[: len(rows)], torch.tensor([numbers[label] for label in labels]))
    head.solve()
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), folder / _FOLDER / _SUMS)
    (folder / _FOLDER / _ABOUT).write_text(json.dumps(asdict(_About(classes, known.settings))) + "\n", encoding="utf-8")
    if some:
        answers = head(features[len(rows) :]).argmax(1).tolist()
        right = sum(classes[answer] == setup.label_of(row) for answer, (_, row) in zip(answers, some, strict=True))
        correct = {name: dict(zip(one.ids, one.correct.tolist(), strict=True)) for name, one in said.items()}
        found = NoTraining(
            right / len(some), sum(bool(correct[name][row["id"]]) for name, row in some) / len(some), len(some)
        )
        write_atomically(folder / UNTRAINED, as_json(asdict(found)))
