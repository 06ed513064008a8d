"""``evertune review``: the records that a version is least sure of, to be labelled; those it can label itself."""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.cli.actions import NOTHING, REGISTRY, opened, with_actions
from evertune.cli.inputs import input_of, missing_in
from evertune.live.review import is_labelled, read_queue, sureness_of, without_suggestion, write_queue
from evertune.live.slices import REVIEWED, is_declared
from evertune.registry.aliases import ALIASES
from evertune.registry.registry import RegistryError
from evertune.utils.terminal import complain, console

if TYPE_CHECKING:
    from evertune.registry.serving import Served

_EXAMPLES = """examples:
  evertune review choose --registry news --input unlabelled.jsonl --queue queue.jsonl --n 50
  evertune review take --queue queue.jsonl --output inbox/reviewed.jsonl
  evertune review accept --registry news --input unlabelled.jsonl --output inbox/sure.jsonl --precision 0.97

In between, somebody fills in `label` in the lines of the queue; `suggested` is what the version says.
exit codes: 0 done, 3 no such record, 1 an error, 2 a wrong argument"""


def review(arguments: Sequence[str]) -> int:
    """Run one of the actions of ``evertune review``.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0; 3 if there is no record to review or to take; 1 after an error.
    """
    from evertune.sources.base import SourceError

    known = _parser().parse_args(list(arguments))
    try:
        return {"choose": _choose, "take": _take, "accept": _accept}[known.action](known)
    except (RegistryError, OSError, ValueError, TypeError, ImportError, SourceError) as error:
        complain(f"evertune review {known.action}", error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser, actions = with_actions(
        "evertune review",
        "Label the records that a version is least sure of.",
        _EXAMPLES,
        {
            "choose": "write the records that a version is least sure of, to be labelled",
            "take": "move the records of a queue that have a label to a file, from which an update learns them",
            "accept": "write the records that a version is sure enough of, with the label that it gives them",
        },
    )
    choose, take, accept = actions["choose"], actions["take"], actions["accept"]
    for action in (choose, accept):
        action.add_argument("--registry", required=True, help=REGISTRY)
        action.add_argument("--version", default="production", help=f"its number, or {', '.join(ALIASES)}")
        action.add_argument("--input", required=True, metavar="PATH", help="records without labels: a file or a folder")
        action.add_argument(
            "--text", nargs="+", metavar="FIELD", help="fields that the task reads (default: as trained)"
        )
        action.add_argument("--batch_size", type=int, default=32, metavar="N", help="records per pass (default: 32)")
    choose.add_argument("--n", type=int, default=50, help="how many records (default: 50)")
    accept.add_argument(
        "--precision", type=float, default=0.95, help="share of the labels that must be right (default: 0.95)"
    )
    for action in (take, accept):
        action.add_argument(
            "--output", required=True, type=Path, metavar="FILE", help="where labelled records go, .jsonl"
        )
    for action in (choose, take):
        action.add_argument("--queue", required=True, type=Path, metavar="FILE", help="the records to label, .jsonl")
    for action in actions.values():
        action.add_argument("--label", default="label", metavar="FIELD", help="the field of the label (default: label)")
    return parser


def _choose(known: argparse.Namespace) -> int:
    from evertune.drift.comparison.records import read_records
    from evertune.registry.serving import load

    if known.n < 1:
        raise ValueError(f"--n must be positive, got {known.n}")
    if known.queue.exists():
        raise ValueError(f"{known.queue} exists, and its labels would be lost: take them first, or name another file")
    served = load(opened(known.registry), known.version)
    fields = known.text or served.version.text_fields
    counts = {"read": 0, "bad": 0}
    usable = _usable(read_records(known.input), fields, counts)
    found = heapq.nsmallest(known.n, _judged(served, usable, fields, known), key=lambda line: line["sureness"])
    if not found:
        complain("evertune review choose", f"{counts['read']:,} records were read, and none has {', '.join(fields)}")
        return NOTHING
    write_queue(known.queue, found)
    if known.json:
        print(json.dumps({"queue": str(known.queue), "chosen": len(found), **counts}))
        return 0
    left_out = f", {counts['bad']:,} left out because they cannot be read" if counts["bad"] else ""
    screen = console()
    screen.print(f"{len(found):,} of {counts['read']:,} records are in {known.queue}{left_out}", soft_wrap=True)
    screen.print(
        f"fill in {known.label!r}, then: evertune review take --queue {known.queue} --output ...", soft_wrap=True
    )
    if not is_declared(REVIEWED, served.version.manifest.config.get("schema") or {}):
        screen.print(
            f"declare {REVIEWED}: bool | None among the fields of the schema, or the gate may take their labels for "
            "wrong ones",
            soft_wrap=True,
        )
    return 0


def _usable(records: Iterator[Any], fields: Sequence[str], counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The records with something to read, each text once."""
    seen = set()
    for record in records:
        counts["read"] += 1
        if record.value is None or missing_in(record.value, fields) is not None:
            counts["bad"] += 1
            continue
        key = json.dumps([record.value[name] for name in fields])
        if key not in seen:
            seen.add(key)
            yield record.value


def _judged(
    served: Served, records: Iterator[dict[str, Any]], fields: Sequence[str], known: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The records with what the version says of them, and how sure it is."""
    several = bool(getattr(served.module, "multi_label", False))
    while chunk := list(islice(records, known.batch_size)):
        inputs = [input_of(record, fields) for record in chunk]
        for record, answer in zip(chunk, served.predict(inputs, batch_size=len(inputs)), strict=True):
            label, sureness = sureness_of(answer, several)
            added = {"suggested": label, "sureness": round(sureness, 6), "version": served.version.number}
            yield {**record, **added, known.label: None}


def _accept(known: argparse.Namespace) -> int:
    from evertune.drift.comparison.records import read_records
    from evertune.live.pseudo_labels import labeller_of

    _check_is_new(known.output)
    registry = opened(known.registry)
    version = registry.version(known.version)
    fields, counts = known.text or version.text_fields, {"read": 0, "bad": 0}
    labeller = labeller_of(registry, version, fields, known.label, known.precision)
    found = labeller.label(list(_usable(read_records(known.input), fields, counts)), known.batch_size)
    if found.records:
        write_queue(known.output, found.records)
    if known.json:
        print(json.dumps({"accepted": len(found.records), "abstained": found.abstained, **counts}))
    else:
        screen = console()
        screen.print(labeller.threshold.words, soft_wrap=True)
        screen.print(
            f"{len(found.records):,} of {counts['read']:,} records are in {known.output}, {found.abstained:,} are not "
            f"sure enough, {counts['bad']:,} cannot be read",
            soft_wrap=True,
        )
    return 0 if found.records else NOTHING


def _check_is_new(output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} exists: name a new file, since a source may have read it already")


def _take(known: argparse.Namespace) -> int:
    _check_is_new(known.output)
    lines = read_queue(known.queue)
    labelled = [line for line in lines if is_labelled(line, known.label)]
    waiting = [line for line in lines if not is_labelled(line, known.label)]
    if not labelled:
        complain(
            "evertune review take", f"none of the {len(lines):,} records of {known.queue} has a {known.label!r} yet"
        )
        return NOTHING
    write_queue(known.output, [{**without_suggestion(line), REVIEWED: True} for line in labelled])
    write_queue(known.queue, waiting)
    agree = sum(line[known.label] == line.get("suggested") for line in labelled)
    if known.json:
        print(json.dumps({"taken": len(labelled), "waiting": len(waiting), "as_suggested": agree}))
        return 0
    words = f"{len(labelled):,} records are in {known.output}, {agree:,} of them labelled as suggested"
    console().print(f"{words}; {len(waiting):,} wait in {known.queue}", soft_wrap=True)
    return 0
