"""``evertune drift``: report whether new records differ from old ones, since when, and how."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.utils.terminal import complain, console, foreign

if TYPE_CHECKING:
    from rich.console import Console

    from evertune.drift.comparison.comparison import Comparison, Example, SetAside

_DESCRIPTION = """\
Compare new records with old ones. The old ones arm a detector; the new ones are scanned in order.

Exit code: 0 without drift, 1 where a detector raised an alarm, 2 where nothing could be decided: a setting, a file that
cannot be read, no usable or too few records.
"""

_EPILOG = """\
example:
  evertune drift --reference last-month.jsonl --current today.jsonl --label intent --out drift.html

Records are lines of JSON or CSV (also .gz) or rows of Parquet. Bad ones are counted and set aside. A reference of more
records than --reference_size is sampled at random where --block_size is 1, which claims that records are independent;
with larger blocks its last records are taken, in order. New records always stay in order.
"""

_N_ROWS = 8  # rows shown of each table
_N_EXAMPLES = 2  # examples shown of each side
_WIDTH = 160  # characters after which an example is cut


def drift(arguments: Sequence[str]) -> int:
    """Compare two sets of records, print the result, and write the page and the JSON file that were asked for.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 without drift, 1 with drift, 2 if nothing could be decided.
    """
    from evertune.sources.base import SourceError

    options = _parser().parse_args(arguments)
    screen = console()
    try:
        found = _compare(options)
        show(found, screen)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found.as_json(), indent=1, allow_nan=False), encoding="utf-8")
        if options.out is not None:
            from evertune.reports.drift import write_drift_report

            screen.print(f"\nreport: {write_drift_report(found, options.out)}", soft_wrap=True)
    except (OSError, ValueError, TypeError, ImportError, SourceError) as error:
        complain("evertune drift", error)
        return 2
    return int(found.drift_detected)


def _parser() -> argparse.ArgumentParser:
    from evertune.drift.comparison.watching import DETECTORS, OF_NUMBERS

    parser = argparse.ArgumentParser(
        prog="evertune drift",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--reference", required=True, metavar="PATH", help="what was normal: a file, a folder, or package:NAME/PATH")
    add("--current", required=True, metavar="PATH", help="what may differ")
    add("--text", nargs="+", default=["text"], metavar="FIELD", help="fields that hold text (default: text)")
    add("--label", metavar="FIELD", help="the field of the label: its shares are watched by a detector of their own")
    add("--value", metavar="FIELD", help=f"a numeric field, for the detectors {', '.join(OF_NUMBERS)}")
    add("--detector", default="mmd", choices=list(DETECTORS), metavar="NAME", help=f"one of {', '.join(DETECTORS)}")
    add(
        "--features",
        default="ngrams",
        metavar="ngrams|MODEL",
        help="hashed words, or a folder or hub name of an encoder",
    )
    add("--arl", type=float, default=10_000, help="mean number of records up to a false alarm (default: 10000)")
    add("--window", type=int, metavar="N", help="records in a test (default: the detector's)")
    add("--reference_size", type=int, metavar="N", help="records to arm with (default: all up to 2000)")
    add("--block_size", type=int, default=1, metavar="N", help="records alike because they came together (default: 1)")
    add("--ignore", nargs="+", default=[], metavar="FIELD", help="fields that the explanation leaves out")
    add("--seed", type=int, default=0, help="of samples and detectors (default: 0)")
    add("--out", type=Path, metavar="FILE", help="also write an HTML page")
    add("--json", type=Path, metavar="FILE", help="also write all that was found as JSON")
    return parser


def _compare(options: argparse.Namespace) -> Comparison:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from evertune.drift.comparison.comparing import compare

    featuriser: Any = None  # `compare` then hashes n-grams, which needs no model
    if options.features != "ngrams":
        from evertune.drift.featurisers import FrozenEncoder
        from evertune.utils.locate import locate

        featuriser = FrozenEncoder(locate(options.features))
    screen = console(stderr=True)  # so that piping stdout keeps only the result
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def progress(side: str, n: int) -> None:
            bar.update(task, description=f"{side}: {n:,} records")

        return compare(
            options.reference,
            options.current,
            text=options.text,
            label=options.label,
            value=options.value,
            detector=options.detector,
            featuriser=featuriser,
            arl=options.arl,
            window_size=options.window,
            reference_size=options.reference_size,
            block_size=options.block_size,
            ignore=options.ignore,
            seed=options.seed,
            progress=progress,
        )


def show(found: Comparison, screen: Console) -> None:
    """Print a comparison: the decision first, then what changed."""

    from evertune.drift.comparison.wording import decision, false_alarms

    screen.print(foreign(decision(found), "bold red" if found.drift_detected else "bold green"))
    screen.print(_facts(found))
    for line in false_alarms(found):
        screen.print(foreign(line))
    for title, aside in ((found.reference, found.set_aside_reference), (found.current, found.set_aside_current)):
        if aside.n:
            screen.print(foreign(f"{title}: {_set_aside(aside)}", "yellow"))
    _show_changes(found, screen)
    for title, examples in (("Typical of before", found.examples_before), ("Typical of now", found.examples_after)):
        if examples:
            screen.print(foreign(f"\n{title}", "bold"))
        for example in examples[:_N_EXAMPLES]:
            screen.print(foreign(_one_line(example)))


def _facts(found: Comparison) -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("reference", foreign(f"{found.n_reference:,} records of {found.reference}"))
    table.add_row("current", foreign(f"{found.n_current:,} records of {found.current}"))
    table.add_row("features", foreign(found.features))
    for scan in found.scans:
        alarms = f"{len(scan.alarms):,} alarm{'s' * (len(scan.alarms) > 1)}" if scan.alarms else "no alarm"
        if scan.alarms:
            first = scan.alarms[0]
            alarms += f", first at record {first.record:,} = {first.origin}"
        armed = f"{scan.detector}, armed with {scan.n_reference:,} records for one false alarm in {scan.arl:,.0f}"
        table.add_row(foreign(scan.of), foreign(f"{armed}: {scan.n_tests:,} tests, {alarms}"))
    return table


def _show_changes(found: Comparison, screen: Console) -> None:
    from rich.table import Table

    from evertune.drift.comparison.wording import described, sure
    from evertune.reports.summary import percent

    changes = found.attribution
    screen.print(foreign(f"\nWhat differs: {changes.n_before:,} records before, {changes.n_after:,} now", "bold"))
    fields = [change for change in changes.fields if sure(change)]  # significant after the correction for many fields
    if changes.tokens:
        tokens = Table("word", "before", "now", "z", "p, corrected", box=None, pad_edge=False, header_style="dim")
        for token in changes.tokens[:_N_ROWS]:
            tokens.add_row(
                foreign(token.token),
                f"{token.before:,}",
                f"{token.after:,}",
                f"{token.z:+.1f}",
                f"{token.p_corrected:.2g}",
            )
        screen.print(tokens)
    if changes.topics:
        topics = Table("topic", "before, %", "now, %", "z", box=None, pad_edge=False, header_style="dim")
        for topic in changes.topics[:_N_ROWS]:
            words = foreign(" ".join(topic.words))
            topics.add_row(words, percent(topic.before), percent(topic.after), f"{topic.z:+.1f}")
        screen.print(topics)
    if fields:
        table = Table("field", "change", "p, corrected", box=None, pad_edge=False, header_style="dim")
        for change in fields[:_N_ROWS]:
            table.add_row(foreign(change.name), foreign(described(change)), f"{change.p_corrected:.2g}")
        screen.print(table)
    if not (changes.tokens or fields):
        screen.print("no word and no field beyond chance")


def _set_aside(aside: SetAside) -> str:
    reasons = ", ".join(f"{n} {reason}" for reason, n in aside.reasons.items())
    return f"{aside.n:,} records set aside ({reasons}); first: {aside.first}"


def _one_line(example: Example) -> str:
    text = " ".join(example.text.split())
    cut = text if len(text) <= _WIDTH else text[:_WIDTH].rstrip() + " …"
    return f"  {example.origin}{f' [{example.label}]' if example.label else ''}: {cut}"
