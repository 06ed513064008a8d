"""``evertune compare``: whether one version of a registry answers better than another, and where."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.cli.actions import REGISTRY, opened
from evertune.cli.tables import print_part
from evertune.registry.aliases import ALIASES
from evertune.utils.plugins import class_at
from evertune.utils.shares import percent
from evertune.utils.terminal import complain, console, foreign

if TYPE_CHECKING:
    from rich.console import Console

    from evertune.live.compare import Compared, Flip

_DESCRIPTION = """\
Let two versions of a registry answer the same records, and compare them: the paired test, the classes, what is taken
for what, and the records whose answer became wrong or right, with their text.

Exit code: 0 if the second version is no worse than chance explains, 1 if it is worse, 2 if nothing could be compared.
"""
_EPILOG = """\
example:
  evertune compare news 7 8 --data complaints.jsonl --out compare.html
"""
_N_ROWS = 8  # rows shown of each table
_WIDTH = 160  # characters after which a text is cut


def compare(arguments: Sequence[str]) -> int:
    """Compare two versions, print the result, and write the page and the JSON file that were asked for.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 if the second version is no worse, 1 if it is, 2 if nothing could be compared.
    """
    from evertune.live.compare import compare_versions
    from evertune.registry.registry import RegistryError

    options = _parser().parse_args(arguments)
    screen, status = console(), console(stderr=True)
    try:
        with status.status("opening the registry") as line:
            found = compare_versions(
                opened(options.registry),
                options.a,
                options.b,
                options.data,
                text=options.text,
                label=options.label,
                alpha=options.alpha,
                batch_size=options.batch_size,
                max_length=options.max_length,
                module_class=None if options.module_class is None else class_at(options.module_class),
                progress=line.update,
            )
        show(found, screen)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found.as_json(), indent=1, allow_nan=False), encoding="utf-8")
        if options.out is not None:
            from evertune.reports.compare import write_comparison

            screen.print(f"\nreport: {write_comparison(found, options.out)}", soft_wrap=True)
    except (OSError, ValueError, TypeError, ImportError, AttributeError, RegistryError) as error:
        complain("evertune compare", error)
        return 2
    return int(found.is_worse)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evertune compare",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, one_of = parser.add_argument, f"its number, or {', '.join(ALIASES)}"
    add("registry", metavar="REGISTRY", help=REGISTRY)
    add("a", nargs="?", default="previous", metavar="A", help=f"{one_of} (default: previous)")
    add("b", nargs="?", default="production", metavar="B", help=f"{one_of} (default: production)")
    add("--data", metavar="PATH", help="records with labels: a file or a folder (default: the held-out records of B)")
    add("--text", nargs="+", metavar="FIELD", help="fields that hold text (default: those that B was trained on)")
    add("--label", metavar="FIELD", help="the field of the label (default: the one that B was trained on)")
    add("--alpha", type=float, default=0.05, help="probability that chance is taken for a difference (default: 0.05)")
    add("--batch_size", type=int, default=64, metavar="N", help="records per forward pass (default: 64)")
    add("--max_length", type=int, metavar="N", help="tokens after which a text is cut (default: as B was trained)")
    add("--module_class", metavar="PATH", help="import path of a module that is not one of evertune's")
    add("--out", type=Path, metavar="FILE", help="also write an HTML page")
    add("--json", type=Path, metavar="FILE", help="also write all that was found as JSON")
    return parser


def show(found: Compared, screen: Console) -> None:
    """Print a comparison: the result first, then where the versions differ."""
    screen.print(foreign(found.headline, "bold red" if found.is_worse else "bold"))
    before, now = (f"version {number}" for number in found.versions)
    words = f"{found.records:,} records: {before} {percent(found.scores[0])}, {now} {percent(found.scores[1])}"
    screen.print(f"{words}; {len(found.worse):,} answers became worse, {len(found.better):,} better")
    if found.bad:
        screen.print(foreign(f"{found.bad:,} bad records were left out; the first: {found.first_bad}"))

    def part(title: str, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        print_part(screen, title, names, rows, _N_ROWS)

    changed = [one for one in found.classes if one.found[0] != one.found[1] and not math.isnan(sum(one.found))]
    part(
        "Classes: the share of their records that was found",
        ["class", "records", before, now, "change"],
        [[one.name, one.records, *map(percent, one.found), _points(one.found)] for one in changed],
    )
    part(
        "What is taken for what",
        ["label", "answer", before, now],
        [[one.label, one.answer, *one.records] for one in found.confusions if one.records[0] != one.records[1]],
    )
    for title, flips in (("Became worse", found.worse), ("Became better", found.better)):
        names = ["record", "label", before, now, "text"]
        part(title, names, [[one.id, _cut(one.label), *answers(one), _cut(one.text)] for one in flips])


def answers(flip: Flip) -> list[str]:
    """What both versions say of a record: the answer, or the score of a task without classes."""
    if any(flip.answers):
        return [_cut(answer) for answer in flip.answers]
    return [f"{score:.3f}" for score in flip.scores]


def _points(pair: tuple[float, float]) -> str:
    return f"{100 * (pair[1] - pair[0]):+.1f}"


def _cut(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}\N{HORIZONTAL ELLIPSIS}"
