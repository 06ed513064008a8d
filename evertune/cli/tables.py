"""What commands print of versions: titled tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evertune.utils.terminal import foreign

if TYPE_CHECKING:
    from rich.console import Console

_LEFT = ("answer", "class", "experience", "label", "record", "text", "word")  # columns of words; others are numbers


def print_part(
    screen: Console, title: str, names: Sequence[str], rows: Sequence[Sequence[object]], most: int | None = None
) -> None:
    """Print a table under its title, after an empty line; nothing without rows.

    Args:
        screen: Where to print.
        title: The title.
        names: Names of the columns.
        rows: The cells, which may be foreign text.
        most: Rows that are printed, with the number of the others below; None for all.
    """
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if name in _LEFT else "right")
    for row in rows[:most]:
        table.add_row(*(foreign(cell) for cell in row))
    screen.print()
    screen.print(table)
    if most is not None and len(rows) > most:
        screen.print(f"and {len(rows) - most:,} more: --json, --out")
