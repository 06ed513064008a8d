"""``evertune quarantine``: look at the records that were set aside, have them checked again, or delete them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

from evertune.cli.actions import NOTHING, REGISTRY, opened, with_actions
from evertune.registry.journal import Journal
from evertune.registry.reasons import Reasons
from evertune.registry.registry import RegistryError
from evertune.sources.base import Row, SourceError
from evertune.utils.terminal import complain, visible

_EXAMPLES = """examples:
  evertune quarantine list --registry registry
  evertune quarantine show 000003:5f1c09ab33d2 --registry registry
  evertune quarantine retry --config live.yaml --reason "no time zone"
  evertune quarantine drop --kind unreadable --registry registry

exit codes: 0 done, 3 no such record (or none that is good now), 1 an error, 2 a wrong argument"""


def quarantine(arguments: Sequence[str]) -> int:
    """Run one of the actions of ``evertune quarantine``.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0; 3 if there is no such record, or none of them is good now; 1 after an error.
    """
    known = _parser().parse_args(list(arguments))
    try:
        if known.action == "retry":
            return _retry(known)
        registry = opened(known.registry)
        journal = Journal(registry.store, registry.check_lease)
        if known.action == "drop":
            with registry.lease("evertune quarantine drop"):
                return _drop(journal, known)
        return (_list if known.action == "list" else _show)(journal, known)
    except (RegistryError, SourceError, OSError, ValueError) as error:
        complain(f"evertune quarantine {known.action}", error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser, actions = with_actions(
        "evertune quarantine",
        "Look at the records that were set aside, have them checked again, or delete them.",
        _EXAMPLES,
        {
            "list": "list the reasons, the commonest first, with the number of records and an example",
            "show": "show records whole, with their reasons",
            "retry": "check records again under the schema as it is now; good ones are pending again",
            "drop": "delete records for good; they no longer count as bad",
        },
    )
    for name, action in actions.items():
        action.add_argument("--registry", required=name != "retry", help=REGISTRY)
        action.add_argument(
            "references", nargs="*", metavar="REFERENCE", help="such as 000003:5f1c09ab33d2 (default: all)"
        )
        action.add_argument("--kind", help="only of this kind: refused, unreadable, unlearnable, batch, dropped, ...")
        action.add_argument("--reason", metavar="TEXT", help="only those with this text in their reason")
    config = "the YAML file of `evertune update`, with the schema"
    actions["retry"].add_argument("--config", "-c", required=True, help=config)
    actions["drop"].add_argument("--all", action="store_true", help="all of them, where nothing else is said")
    return parser


def _chosen(found: Mapping[str, Row], known: argparse.Namespace) -> dict[str, Row]:
    """The records that the arguments name.

    Raises:
        ValueError: If a reference is unknown.
    """
    if missing := [reference for reference in known.references if reference not in found]:
        raise ValueError(f"there is no {missing[0]} in quarantine; `evertune quarantine list --json` lists all")
    return {
        reference: row
        for reference, row in found.items()
        if (not known.references or reference in known.references)
        and known.kind in (None, row["kind"])
        and (known.reason is None or known.reason in row["reason"])
    }


def _list(journal: Journal, known: argparse.Namespace) -> int:
    chosen = _chosen(journal.references(), known)
    if known.json:
        print(json.dumps([{"reference": reference, **row} for reference, row in chosen.items()], indent=2))
        return 0
    first = {row["origin"]: reference for reference, row in reversed(chosen.items())}
    reasons = Reasons(chosen.values()).all
    for reason in reasons:
        print(visible(f"{reason.count:>7}  {reason.kind:<11}  {reason.words}"))
        print(visible(f"{'':22}such as {first[reason.origin]}, from {reason.origin}"))
    print(f"{len(chosen)} records are in quarantine" if chosen else "no record is in quarantine")
    return 0


def _show(journal: Journal, known: argparse.Namespace) -> int:
    chosen = _chosen(journal.references(), known)
    for reference, row in chosen.items():
        print(json.dumps({"reference": reference, **row}, indent=None if known.json else 2))
    return 0 if chosen else NOTHING


def _retry(known: argparse.Namespace) -> int:
    from evertune.cli.quiet import quiet
    from evertune.cli.update import updater_from

    place = [] if known.registry is None else ["--registry", known.registry]
    with quiet():
        updater, _ = updater_from(["--config", known.config, *place], "evertune quarantine retry")
    chosen = _chosen(updater.journal.references(), known)
    if known.kind is None and not known.references:
        chosen = {reference: row for reference, row in chosen.items() if row["kind"] != "superseded"}
    released, reasons = updater.retry(chosen)
    if known.json:
        print(json.dumps({"pending": released, "still_in_quarantine": reasons}, indent=2))
    else:
        print(f"{len(released)} of {len(chosen)} records are pending again")
        left = [{**chosen[reference], "reason": reason} for reference, reason in reasons.items()]
        if left:
            print(visible(f"the others stay in quarantine: {Reasons(left).words()}"))
        if released:
            print(visible(f"to learn them: evertune update --config {known.config}"))
    return 0 if released else NOTHING


def _drop(journal: Journal, known: argparse.Namespace) -> int:
    if not (known.references or known.kind or known.reason or known.all):
        raise ValueError("say which: references, --kind, --reason, or --all")
    chosen = _chosen(journal.references(), known)
    journal.drop(chosen)
    print(json.dumps({"dropped": list(chosen)}) if known.json else f"{len(chosen)} records are deleted from quarantine")
    return 0 if chosen else NOTHING
