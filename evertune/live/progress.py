"""How far an update in progress has come, read from the files of its folder by another process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evertune.live.plan import Plan
from evertune.live.staging import STEPS, VERSION, is_claimed, trained
from evertune.live.versions import VERDICT
from evertune.utils.typed_json import read_json

STAGES = ("preparing", "training", "judging", "publishing")
"""What an update does, one after the other."""


@dataclass(frozen=True)
class Progress:
    """How far an update has come.

    Args:
        plan: Plan of the update.
        stage: What it does now, one of :data:`STAGES`.
        step: Number of optimizer steps so far; None before and after the training.
        steps: Number of optimizer steps in all; None if it is not known.
    """

    plan: Plan
    stage: str
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class _Steps:
    step: int
    steps: int | None = None


def progress_of(staging: Path) -> Progress | None:
    """How far the update in a folder has come; None if there is none. It may be interrupted: see
    :func:`~evertune.registry.lease.holder`.

    Args:
        staging: Folder of the update in progress: ``staging`` of a local registry, or ``work_dir``.

    Raises:
        ValueError: If the file with its plan is damaged.

    Example:
        >>> progress_of(Path("there/is/none"))
    """
    try:
        return _progress(staging)
    except FileNotFoundError:  # it has ended between two looks
        return None


def _progress(staging: Path) -> Progress | None:
    plan = Plan.load(staging)
    if plan is None:
        return None
    if trained(staging, plan) is not None:
        return Progress(plan, "publishing" if (staging / VERSION / VERDICT).is_file() else "judging")
    if not is_claimed(staging, plan):
        return Progress(plan, "preparing")
    try:
        noted = read_json(_Steps, (staging / STEPS).read_bytes())
    except (OSError, ValueError):  # not written yet, or being replaced
        return Progress(plan, "training")
    return Progress(plan, "training", noted.step, noted.steps)
