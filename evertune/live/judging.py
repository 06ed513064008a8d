"""Evaluates a new version and the one in production side by side, and lets the gate compare them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from evertune.gate.best import Best, still_best
from evertune.gate.comparison import FEW, Pair
from evertune.gate.evaluation import Evaluation
from evertune.gate.label_noise import learned_classes
from evertune.gate.predictions import Cost, Predictions
from evertune.gate.verdict import Check, Verdict
from evertune.live.evaluation import evaluate, evaluate_examples, measure, without_training
from evertune.live.no_training import measure_untrained, pretrained
from evertune.live.planning import PlannedUpdate
from evertune.live.setup import Setup, as_json
from evertune.live.slices import REVIEWED, draw, thin
from evertune.live.staging import VERSION
from evertune.live.training import MODEL, remembered
from evertune.live.versions import EVALUATION, VERDICT
from evertune.registry.version import Version
from evertune.sources.base import Row
from evertune.utils.files import write_atomically
from evertune.utils.typed_json import decode, foreign, to_json

_SHOWN = "trained on"
_ENOUGH = 500
"""Number of records in which wrong labels are looked for: the held-out ones, and as many trained-on ones as needed."""

T = TypeVar("T")


def judge(setup: Setup, update: PlannedUpdate, served: Version | None = None) -> Verdict:
    """The verdict on the version in the staging folder, which is written beside it. Judged again, it is the same.

    Args:
        setup: What all updates have in common.
        update: The update.
        served: The version that the new one would replace, where that is not the one it was trained from: the two are
            compared as well.
    """
    folder = setup.staging / VERSION
    if (folder / VERDICT).is_file():
        return parsed((folder / VERDICT).read_bytes(), folder / VERDICT, Verdict.from_dict)
    asked = _Asked.of(setup, update)
    challenger = setup.opened(folder / MODEL)
    said = evaluate(challenger, asked.slices, **setup.reading)
    before = _Production() if update.records.parent is None else _production(setup, update, asked, challenger, said)
    base = _base(setup, update, challenger)
    verdict = setup.gate.judge(
        before.said,
        said | before.shown,
        asked.new,
        before.costs,
        data_checks=update.records.checks(),
        trained=_SHOWN if before.shown else None,
        groups=setup.gate.groups(row for rows in asked.slices.values() for row in rows),
        best=before.best,
        remembered=before.remembered,
        untrained=_without_training(setup, asked, before.said),
        base=base,
        reviewed={
            name: {row["id"] for row in rows if row["record"].get(REVIEWED)}
            for name, rows in (asked.slices | {_SHOWN: asked.shown}).items()
        },
    )
    if served is not None:
        verdict = Verdict.of([*verdict.checks, *_against(setup, served, asked, said)])
    best: dict[str, Best] = {}
    if before.said is not None and update.plan.parent is not None and update.plan.teacher is None:
        past = {name: one for name, one in before.said.items() if name not in (asked.new, _SHOWN)}
        old = {name: Best(update.plan.parent, one) for name, one in past.items()} | setup.gate.standing(before.best)
        # Kept with the new version, as the version that made them may be deleted.
        best = {name: one for name, one in still_best(old, said, setup.gate.alpha).items() if name in asked.slices}
    measure_untrained(setup, folder, update.records.parent, asked.trained, asked.slices, said)
    # The verdict is written last: a resumed update takes it as proof that the evaluation is complete.
    write_atomically(folder / EVALUATION, as_json(Evaluation(said, best, base[1]).to_dict()))
    write_atomically(folder / VERDICT, as_json(to_json(verdict.to_dict())))
    return verdict


def parsed(content: bytes, name: str | Path, parse: Callable[[Any], T]) -> T:
    """A file of a version, parsed by a function that has not seen who wrote it.

    Raises:
        ValueError: If it cannot be parsed; the message names it.
    """
    with foreign(name):
        return parse(decode(content))


@dataclass(frozen=True)
class _Asked:
    """The records that the versions are asked about. The choice depends on the ids alone, so that a resumed update is
    judged on the same ones.

    Args:
        new: Name of the slice with those held out of this update.
        slices: The records of every slice, shortened.
        trained: All records of this update that were trained on.
        shown: Some of them, in which wrong labels are looked for as well.
    """

    new: str
    slices: dict[str, list[Row]]
    trained: list[Row]
    shown: list[Row]

    @classmethod
    def of(cls, setup: Setup, update: PlannedUpdate) -> _Asked:
        train, held_out, *_ = update.records.split
        new = update.plan.experience
        slices = thin(update.records.slices | {new: held_out}, setup.settings.max_evaluation)
        return cls(new, slices, train, sorted(train, key=draw)[: max(_ENOUGH - len(slices[new]), 0)])


@dataclass(frozen=True)
class _Production:
    """What production says of the same records, and what else is compared with it; nothing before the first version.

    Args:
        said: Its predictions by slice.
        shown: The new version's predictions on the records that it was trained on.
        best: The best predictions so far, where they are not production's.
        remembered: The predictions of both versions on remembered records.
        costs: The costs of both versions.
    """

    said: Mapping[str, Predictions] | None = None
    shown: dict[str, Predictions] = field(default_factory=dict)
    best: Mapping[str, Best] = field(default_factory=dict)
    remembered: Pair | None = None
    costs: tuple[Cost, Cost] | None = None


def _production(
    setup: Setup, update: PlannedUpdate, asked: _Asked, challenger: Any, said: Mapping[str, Predictions]
) -> _Production:
    production = update.records.parent
    assert production is not None
    module = setup.opened(setup.versions.folder(production) / MODEL)
    stored, shown, reading = setup.versions.evaluation(production), {_SHOWN: asked.shown}, setup.reading
    # Production's answers were stored when it was judged itself: only slices that it has not seen are predicted.
    known = {name: stored.slices[name] for name in asked.slices if name in stored.slices}
    unseen = {name: rows for name, rows in asked.slices.items() if name not in stored.slices}
    before = known | evaluate(module, unseen | shown, **reading)
    after = evaluate(challenger, shown, **reading)
    remembered_by_both = _on_memory(setup, production, module, challenger, [*said.values()])
    texts = [setup.text_of(row) for row in (update.records.split.held_out or asked.trained)[:8]]
    costs = measure(module, challenger, texts, max_length=reading["max_length"])
    return _Production(before, after, stored.best, remembered_by_both, costs)


def _against(setup: Setup, served: Version, asked: _Asked, said: Mapping[str, Predictions]) -> list[Check]:
    """The checks of the new version against another one than that it was trained from, on all slices."""
    stored = setup.versions.evaluation(served).slices
    before = {asked.new: said[asked.new]} | {name: stored[name] for name in asked.slices if name in stored}
    if unseen := {name: rows for name, rows in asked.slices.items() if name not in before}:
        before |= evaluate(setup.opened(setup.versions.folder(served) / MODEL), unseen, **setup.reading)
    groups = setup.gate.groups(row for rows in asked.slices.values() for row in rows)
    checks = setup.gate.judge(before, said, asked.new, groups=groups).checks
    return [
        replace(
            check,
            name=f"{check.name}, version {served.number}",
            words=f"against version {served.number}: {check.words}",
        )
        for check in checks
        if check.champion is not None
    ]


def _base(
    setup: Setup, update: PlannedUpdate, challenger: Any
) -> tuple[Mapping[str, Predictions], Mapping[str, Predictions]]:
    """What the version before and the new one make of general texts and probes; nothing if the gate names none.

    Before the first version there is the pretrained model.
    """
    base, parent = setup.base, update.records.parent
    if base is None:
        return {}, {}
    now, stored = base.asked_of(challenger), setup.versions.evaluation(parent).base
    if base.is_answered_by(stored):
        return stored, now
    before = None if parent is None else setup.versions.folder(parent) / MODEL
    return base.asked_of(pretrained(setup) if before is None else setup.opened(before)), now


def _on_memory(
    setup: Setup, production: Version, champion: Any, challenger: Any, said: Sequence[Predictions]
) -> Pair | None:
    """The predictions of both versions on remembered records of the classes of which few are held out."""
    memory = remembered(setup.versions.folder(production))
    if memory is None or not all(one.has_classes for one in said):
        return None
    held_out = Counter(name for one in said for label in one.labels for name in setup.task.label_names(label))
    missing = {name: FEW - held_out[name] for name in production.manifest.classes}
    slots = []
    for slot, name in enumerate(memory.labels):
        if name is not None and missing.get(name, 0) > 0:
            missing[name] -= 1
            slots.append(slot)
    if not slots:
        return None
    labels, examples = [str(memory.labels[slot]) for slot in slots], [memory[slot] for slot in slots]
    return evaluate_examples(champion, examples, labels), evaluate_examples(challenger, examples, labels)


def _without_training(
    setup: Setup, asked: _Asked, champion: Mapping[str, Predictions] | None
) -> dict[str, Predictions] | None:
    """The answers of the pretrained encoder without training, where the gate needs a second opinion: on a first
    version, and on classes that production has not learned."""
    if not callable(getattr(setup.model, "features", None)):
        return None
    if champion is not None:
        past = [said for name, said in champion.items() if name not in (asked.new, _SHOWN)]
        known = learned_classes(champion.values(), past)
        if all(known.issuperset(setup.task.label_names(setup.label_of(row))) for row in asked.trained):
            return None
    some = thin({name: rows for name, rows in asked.slices.items() if name != asked.new}, _ENOUGH)
    slices = some | {asked.new: asked.slices[asked.new], _SHOWN: asked.shown}
    return without_training(pretrained(setup), slices, **setup.reading)
