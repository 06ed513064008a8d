"""``evertune export``: write a version for other runtimes, and check that it still answers the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from evertune.cli.actions import REGISTRY, opened
from evertune.cli.quiet import quiet
from evertune.export.manifest import Check, ExportManifest, Format, Quantize
from evertune.registry.registry import RegistryError
from evertune.utils.terminal import complain, console
from evertune.utils.typed_json import to_json

REFUSED = 4
"""The exit code of an export that answers worse than allowed, as of an update that the gate refuses."""

_EXAMPLES = """\
examples:
  evertune export registry 8 --format onnx --quantize int8 --output intents-int8
  evertune export registry production --format safetensors --output intents
  evertune serve --model intents-int8

The export is compared with its version on the held-out records of the registry, or on those of --data.
Exit codes: 0 exported, 1 an error, 2 a wrong argument, 4 it answers worse than allowed, and nothing is written."""


def export(arguments: Sequence[str]) -> int:
    """Export a version.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 if the export is written, 1 after an error, 4 if it answers worse than allowed.
    """
    from evertune.export.exporting import RefusedExportError
    from evertune.export.exporting import export as write

    known = _parser().parse_args(list(arguments))
    try:
        with quiet():
            made = write(
                opened(known.registry).version(known.version),
                known.output,
                format=known.format,
                quantize=known.quantize,
                data=known.data,
                text=known.text[0] if known.text and len(known.text) == 1 else known.text,
                label=known.label,
                max_records=known.max_records,
                min_agreement=known.min_agreement,
                max_score_drop=known.max_score_drop / 100,
            )
    except RefusedExportError as error:
        _show(known, error.check, None)
        complain("evertune export", f"refused, and nothing is written: {error}")
        return REFUSED
    except (RegistryError, OSError, ValueError, ModuleNotFoundError) as error:
        complain("evertune export", error)
        return 1
    assert made.manifest.check is not None
    _show(known, made.manifest.check, made.manifest)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evertune export",
        description="Write a version for other runtimes, and check that it still answers the same.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("registry", metavar="REGISTRY", help=REGISTRY)
    add("version", metavar="VERSION", help="its number, or an alias, such as production")
    add("--format", type=_format, choices=get_args(Format), default="onnx", help="default: onnx")
    add(
        "--quantize",
        choices=get_args(Quantize),
        help="with onnx, 8-bit weights and matrix products, or 4-bit weights (default: fp32)",
    )
    add("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write; it must not exist")
    add("--data", metavar="FILE", help="records to check it on (default: those that the registry holds out)")
    add(
        "--text", nargs="+", metavar="FIELD", help="the field with the text, or both of a pair (default: the version's)"
    )
    add("--label", metavar="FIELD", help="the field with the label (default: the version's)")
    add(
        "--max_records",
        type=int,
        metavar="N",
        help="held-out records to check it on (default: 1000, or 100 if it generates texts)",
    )
    add(
        "--min_agreement",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="share of the records that it must answer like its version (default: 0.95)",
    )
    add(
        "--max_score_drop",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="percentage points of its score that it may lose; that of a classifier is its accuracy (default: 0.5)",
    )
    add("--json", action="store_true", help="print JSON, for machines")
    return parser


def _format(name: str) -> str:
    if name == "gguf":
        from evertune.export.formats import GGUF

        raise argparse.ArgumentTypeError(GGUF)
    return name


def _show(known: argparse.Namespace, check: Check, manifest: ExportManifest | None) -> None:
    """Print the two models side by side."""
    if known.json:
        print(json.dumps({"written": None if manifest is None else str(known.output), "check": to_json(check)}))
        return
    from rich.table import Table

    kind = known.format if known.quantize is None else f"{known.format}-{known.quantize}"
    table = Table("", f"version {known.version}", kind, box=None, pad_edge=False, header_style="dim")
    if check.score is not None and check.source_score is not None:
        table.add_row("score", f"{check.source_score:.1%}", f"{check.score:.1%}")
    old, new = check.source_cost, check.cost
    table.add_row("size, MB", f"{old.size_bytes / 1e6:.1f}", f"{new.size_bytes / 1e6:.1f}")
    table.add_row("one text, ms", f"{old.latency_ms:.1f}", f"{new.latency_ms:.1f}")
    table.add_row("32 texts, ms", f"{old.batch_ms:.1f}", f"{new.batch_ms:.1f}")
    screen = console()
    screen.print(table)
    screen.print(f"same answer on {check.agreement:.1%} of {check.records:,} records; {check.threads} threads")
    if manifest is not None:
        screen.print(f"written: {known.output}", soft_wrap=True)
