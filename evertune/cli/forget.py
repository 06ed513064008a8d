"""``evertune forget``: erase records from a registry."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from evertune.cli.actions import REGISTRY, opened
from evertune.registry.registry import RegistryError
from evertune.utils.terminal import complain

_EXAMPLE = """example:
  evertune forget registry --id customer-17

exit codes: 0 erased, or not there; 1 errors"""


def forget(arguments: Sequence[str]) -> int:
    """Erase records.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 if no file of the registry holds the records now; 1 after an error.
    """
    from evertune.live.erasure import erase

    options = _parser().parse_args(list(arguments))
    try:
        registry = opened(options.registry)
        ids = [*options.id, *(options.ids.read_text().split("\n") if options.ids else ())]
        erasure = erase(registry, [id for id in ids if id], options.work_dir)
    except (RegistryError, OSError, ValueError) as error:
        complain("evertune forget", error)
        return 1
    if options.json:
        print(json.dumps({"ids": len(erasure.ids), "found": erasure.found, "versions": erasure.versions}))
    else:
        print(erasure.words)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evertune forget",
        description="Erase records from everything that a registry keeps: pending records, quarantine, held-out "
        "slices, replay memories and stored predictions. Weights are not changed.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("registry", metavar="REGISTRY", help=REGISTRY)
    parser.add_argument("--id", action="append", default=[], help="the id of a record; may be repeated")
    parser.add_argument("--ids", type=Path, metavar="FILE", help="a file with one id in each line")
    parser.add_argument(
        "--work_dir",
        type=Path,
        help="where updates are staged, if not in the registry; an update in progress is dropped",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    return parser
