"""``evertune keys``: the API keys of ``evertune serve`` and ``evertune ui``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from evertune.serve.keys import SCOPES, KeyFile
from evertune.utils.terminal import complain, console, foreign
from evertune.utils.typed_json import to_json

_EXAMPLES = """\
examples:
  evertune keys add keys.json --name web --scopes predict feedback --days 90 --rate 50
  evertune keys list keys.json
  evertune keys rotate keys.json 5f1c09ab --grace 48
  evertune keys revoke keys.json 5f1c09ab
  evertune serve --registry registry --access.keys keys.json

A key is printed once, and only its hash is kept. A running server notices a change within a second.
Exit codes: 0 done, 1 an error, 2 a wrong argument."""


def keys(arguments: Sequence[str]) -> int:
    """Run one of the actions.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0, or 1 after an error.
    """
    known = _parser().parse_args(list(arguments))
    file = KeyFile(known.file)
    try:
        match known.action:
            case "add":
                print(file.add(known.name, known.scopes, known.days, known.rate))
            case "rotate":
                print(file.rotate(known.id, known.grace))
            case "revoke":
                file.revoke(known.id)
            case "list":
                _list(file, known.json)
    except (OSError, ValueError) as error:
        complain(f"evertune keys {known.action}", error)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="evertune keys",
        description="API keys of `evertune serve` and `evertune ui`, in a file with their hashes.",
        epilog=_EXAMPLES,
        formatter_class=plain,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = {}
    for name, words in (
        ("add", "make a key and print it"),
        ("list", "show the keys: ids, names, scopes, expiry; never the keys themselves"),
        ("rotate", "make a new key like an old one, which keeps working for a while"),
        ("revoke", "delete a key"),
    ):
        whole = words[0].upper() + words[1:] + "."
        made[name] = actions.add_parser(name, help=words, description=whole, epilog=_EXAMPLES, formatter_class=plain)
        made[name].add_argument("file", type=Path, help="the file with the hashes")
    add = made["add"]
    add.add_argument("--name", required=True, help="who uses the key, for logs and metrics")
    add.add_argument("--scopes", nargs="+", choices=SCOPES, default=["predict"], help="what it may do: predict")
    add.add_argument("--days", type=float, help="days until it expires: never")
    add.add_argument("--rate", type=float, help="records a second that it may send, on average: any number")
    for name in ("rotate", "revoke"):
        made[name].add_argument("id", help="the id of the key: its part between the underscores")
    made["rotate"].add_argument("--grace", type=float, default=24.0, help="hours in which both keys work: 24")
    made["list"].add_argument("--json", action="store_true", help="print JSON, for machines")
    return parser


def _list(file: KeyFile, as_json: bool) -> None:
    now, known = datetime.now(UTC), file.read()
    if as_json:
        shown = ("id", "name", "scopes", "created", "expires", "rate")
        rows = [{**{name: to_json(getattr(key, name)) for name in shown}, "valid": key.is_valid(now)} for key in known]
        print(json.dumps(rows))
        return
    from rich.table import Table

    table = Table("id", "name", "scopes", "created", "expires", "rate", box=None)
    for key in known:
        expires = "never" if key.expires is None else key.expires.isoformat() if key.is_valid(now) else "expired"
        rate = "any" if key.rate is None else f"{key.rate:g}/s"
        table.add_row(*map(foreign, (key.id, key.name, " ".join(key.scopes), key.created.isoformat(), expires, rate)))
    console().print(table)
