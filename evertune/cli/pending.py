"""``evertune pending``: look at the records that wait for the next update, or take some of them out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from evertune.cli.actions import NOTHING, REGISTRY, opened, with_actions
from evertune.live.backlog import by_origin, pending_segments
from evertune.registry.journal import Journal
from evertune.registry.registry import RegistryError
from evertune.registry.segments import Segment
from evertune.sources.base import Row
from evertune.utils.terminal import complain, visible

_EXAMPLES = """examples:
  evertune pending list --registry registry
  evertune pending show --id t-17 --registry registry
  evertune pending drop --origin poisoned.jsonl --reason "wrong labels" --registry registry

exit codes: 0 done, 3 no such record, 1 an error, 2 a wrong argument"""


def pending(arguments: Sequence[str]) -> int:
    """Run one of the actions of ``evertune pending``.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0; 3 if there is no such record; 1 after an error.
    """
    known = _parser().parse_args(list(arguments))
    try:
        registry = opened(known.registry)
        journal = Journal(registry.store, registry.check_lease)
        if known.action == "drop":
            with registry.lease("evertune pending drop"):
                return _drop(journal, pending_segments(registry), known)
        return (_list if known.action == "list" else _show)(journal, pending_segments(registry), known)
    except (RegistryError, OSError, ValueError) as error:
        complain(f"evertune pending {known.action}", error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser, actions = with_actions(
        "evertune pending",
        "Look at the records that wait for the next update, or take some of them out.",
        _EXAMPLES,
        {
            "list": "list where the pending records come from, segment by segment",
            "show": "show pending records whole",
            "drop": "take records out: they go to quarantine, and no update learns them",
        },
    )
    for action in actions.values():
        action.add_argument("--registry", required=True, help=REGISTRY)
        action.add_argument("--id", action="append", default=[], help="the record with this id; can be repeated")
        action.add_argument("--origin", metavar="TEXT", help="records with this text in their origin, such as a file")
        action.add_argument("--segment", type=int, help="records of this segment")
    actions["drop"].add_argument("--reason", default="", help="why, for the quarantine")
    actions["drop"].add_argument("--all", action="store_true", help="all of them, where nothing else is said")
    return parser


def _chosen(journal: Journal, segments: Sequence[Segment], known: argparse.Namespace) -> list[Row]:
    return [
        row
        for row in journal.records(segments, numbered=True)
        if (not known.id or row["id"] in known.id)
        and (known.origin is None or known.origin in row["origin"])
        and known.segment in (None, row["segment"])
    ]


def _list(journal: Journal, segments: Sequence[Segment], known: argparse.Namespace) -> int:
    rows = _chosen(journal, segments, known)
    found = by_origin(rows)
    if known.json:
        print(
            json.dumps(
                [{"segment": number, "from": place, "records": n} for (number, place), n in found.items()], indent=2
            )
        )
        return 0
    for (number, place), n in found.items():
        print(visible(f"{n:>7}  segment {number}, from {place}"))
    print(f"{len(rows)} records are pending")
    return 0


def _show(journal: Journal, segments: Sequence[Segment], known: argparse.Namespace) -> int:
    rows = _chosen(journal, segments, known)
    for row in rows:
        print(json.dumps(row, indent=None if known.json else 2))
    return 0 if rows else NOTHING


def _drop(journal: Journal, segments: Sequence[Segment], known: argparse.Namespace) -> int:
    if not (known.id or known.origin or known.segment is not None or known.all):
        raise ValueError("say which: --id, --origin, --segment, or --all")
    rows = _chosen(journal, segments, known)
    reason = f"dropped by hand{': ' if known.reason else ''}{known.reason}"
    journal.withdraw([{**row, "kind": "dropped", "reason": reason} for row in rows])
    if known.json:
        print(json.dumps({"dropped": [row["id"] for row in rows]}))
    else:
        print(f"{len(rows)} records are in quarantine now; `evertune quarantine retry` brings them back")
    return 0 if rows else NOTHING
