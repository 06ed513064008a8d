"""The folder of an update in progress: how far it has come, by the marks that it has left there."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evertune.live.plan import Plan
from evertune.utils.files import delete, write_atomically
from evertune.utils.typed_json import read_json

CHECKPOINTS = "checkpoints"
STEPS = "steps.json"
VERSION = "version"
_TRAINED = "trained.json"
_STARTED = "started.json"

logger = logging.getLogger("evertune.live")


@dataclass
class _Trained:
    """The content of the file that says that an update is trained."""

    plan: str
    steps: int
    classes: list[str]
    seconds: dict[str, float]


def trained(staging: Path, plan: Plan) -> dict[str, Any] | None:
    """The results that :func:`~evertune.live.training.train` wrote when it finished this plan; None if it has not."""
    path = staging / _TRAINED
    if not path.is_file():
        return None
    try:
        found = read_json(_Trained, path.read_bytes())
    except ValueError as error:
        logger.warning("%s is damaged (%s): update %d is trained again", path, error, plan.version)
        return None
    return asdict(found) if found.plan == plan.identity else None


def results(staging: Path, plan: Plan) -> dict[str, Any]:
    """The results of :func:`~evertune.live.training.train`, which has finished this plan."""
    found = trained(staging, plan)
    assert found is not None
    return found


def claim(staging: Path, plan: Plan) -> None:
    """Delete what an update of another plan has left in the folder, and mark it as this one's."""
    if not is_claimed(staging, plan):
        for name in (_TRAINED, VERSION, CHECKPOINTS, STEPS):
            delete(staging / name)
        write_atomically(staging / _STARTED, _mark(plan))


def is_claimed(staging: Path, plan: Plan) -> bool:
    """Whether the training of this plan has begun."""
    mark = staging / _STARTED
    return mark.is_file() and mark.read_bytes() == _mark(plan)


def finish(staging: Path, plan: Plan, steps: int, classes: Sequence[str], seconds: Mapping[str, float]) -> None:
    """Mark an update as trained: its weights and its learning state are complete.

    Args:
        staging: Folder of the update in progress.
        plan: Plan of the update.
        steps: Number of optimizer steps.
        classes: Names of the classes that the module knows.
        seconds: What the time was spent on.
    """
    content = {"plan": plan.identity, "steps": steps, "classes": list(classes), "seconds": dict(seconds)}
    write_atomically(staging / _TRAINED, json.dumps(content).encode())


def _mark(plan: Plan) -> bytes:
    return json.dumps({"plan": plan.identity}).encode()
