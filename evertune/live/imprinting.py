"""Between two updates: production learns, without training, to name classes that it does not know."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from evertune.gate.verdict import Check
from evertune.live.backlog import Backlog
from evertune.live.evaluation import features_of_rows
from evertune.live.judging import judge
from evertune.live.new_classes import new_classes, note_refused, words_of
from evertune.live.outcome import Outcome
from evertune.live.plan import Plan, clear
from evertune.live.planning import PlannedUpdate
from evertune.live.publishing import publish_if_passed
from evertune.live.records import Records, Split
from evertune.live.seconds import timed
from evertune.live.setup import Setup
from evertune.live.staging import VERSION, claim
from evertune.live.staging import finish as mark_trained
from evertune.live.training import LEARNING, MODEL
from evertune.registry.version import Version
from evertune.sources.base import Row, Source

if TYPE_CHECKING:
    from evertune.registry.mlflow import MLflowMirror

_STAGING = "imprinting"


class _Shown(Records):
    """The records by which production learns to name new classes. They stay pending, and the next update checks them
    and holds some out."""

    @cached_property
    def split(self) -> Split:
        """All of them are used."""
        return Split(self.rows, [], [], 0)

    def checks(self) -> list[Check]:
        """None, since nothing is trained on them yet."""
        return []


def imprint(
    setup: Setup,
    backlog: Backlog,
    source: Source,
    mirror: MLflowMirror | None,
    seconds: dict[str, float],
    dry_run: bool,
) -> Outcome | None:
    """Publish production with a row for each class that it does not know yet, if the gate lets it pass.

    The row of a class is the mean of production's features of its pending records (Qi, Brown and Lowe 2018, "Low-Shot
    Learning with Imprinted Weights"); everything else stays as it is. The records stay pending. A version that is
    refused is not published. If the process dies, nothing has changed, or the version is published and not in
    production; in either case it is made again.

    Args:
        setup: What all updates have in common.
        backlog: The records that are not learned yet.
        source: Source that is notified of what is committed.
        mirror: Second registry that receives the version.
        seconds: What the time is spent on; added to.
        dry_run: Judge only.

    Returns:
        The outcome; None if no class is due.
    """
    classes, production = new_classes(setup, backlog), setup.registry.production
    if not classes or production is None:
        return None
    # No closed-form classifier is measured beside it: the records count as learned when they are trained on.
    own = replace(setup, staging=setup.staging / _STAGING, settings=replace(setup.settings, untrained=False))
    clear(own.staging)
    plan = _plan(own, production, words_of(classes))
    shown = {row["id"]: row for rows in classes.values() for row in rows}
    update = PlannedUpdate(plan, own, _Shown(own, [], production, [{**row, "segment": 0} for row in shown.values()]))
    with timed(seconds, "train"):
        _stage(own, plan, production, classes)
    with timed(seconds, "evaluate"):
        verdict = judge(own, update)
    what = f"{plan.reason}: the version"
    outcome = publish_if_passed(own, update, verdict, what, source, mirror, seconds, dry_run)
    if not verdict.passed:
        note_refused(setup, production.number, classes)
    return outcome


def name_classes(module: Any, classes: Mapping[str, Sequence[Row]], **reading: Any) -> None:
    """Add classes to a module with a cosine head, each with the mean of the features of its records as its row.

    Args:
        module: A module with ``features`` and its weights.
        classes: The records of each class.
        reading: How records are read: the other arguments of :func:`~evertune.live.evaluation.features_of_rows`.
    """
    module.add_classes(list(classes))
    for name, rows in classes.items():
        features = torch.from_numpy(features_of_rows(module, rows, **reading))
        row = F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1)
        with torch.no_grad():
            module.head.weight[module.classes.index(name)] = row.to(module.head.weight)


def _plan(setup: Setup, production: Version, reason: str) -> Plan:
    consumed = production.manifest.consumed
    plan = Plan(
        version=setup.registry.next_number(),
        parent=production.number,
        kind="imprinting",
        after=consumed,
        consumed=consumed,
        offset=production.manifest.offset,
        reason=reason,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=setup.config_digest,
    )
    plan.save(setup.staging)
    return plan


def _stage(setup: Setup, plan: Plan, production: Version, classes: Mapping[str, Sequence[Row]]) -> None:
    """Write production with the new rows to the staging folder; its learning state is that of production."""
    folder, target = setup.versions.folder(production), setup.staging / VERSION
    claim(setup.staging, plan)
    module = setup.opened(folder / MODEL)
    name_classes(module, classes, **setup.reading)
    module.save_pretrained(target / MODEL)
    if (folder / LEARNING).is_dir():
        shutil.copytree(folder / LEARNING, target / LEARNING)
    mark_trained(setup.staging, plan, 0, module.classes, {})
