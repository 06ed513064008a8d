"""Tables for the terminal that lose nothing, however narrow it is; quick to import."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

_BRIEF = 80  # characters of JSON that are shown as they are
_GAP = "  "
_ROOM = 30
"""Characters that the last column needs beside the others; with less, it moves to lines of its own."""


class Listing:
    """A table whose last column, the words, goes below the row where the terminal is too narrow for it.

    No cell is cut: rich would drop whole columns, and shorten a verdict to ``ref…``.

    Args:
        columns: Headers; all empty for none.
        rows: Cells, as many in a row as there are columns.
        right: Headers of the columns that are aligned to the right.

    Example::

        rich.print(Listing(["version", "verdict"], [[Text("1"), Text("passed")]], right=["version"]))
    """

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[Text]], right: Sequence[str] = ()) -> None:
        from rich.text import Text

        header = [[Text(column, "bold") for column in columns]] if any(columns) else []
        self._rows = [*header, *map(list, rows)]
        self._right = [column in right for column in columns]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        widths = [max(cell.cell_len for cell in column) for column in zip(*self._rows, strict=True)]
        head = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
        beside = head + min(widths[-1], _ROOM) <= options.max_width
        for row in self._rows:
            cells, words, indent = self._padded(row[:-1], widths), row[-1], 4
            if beside:
                first, *rest = words.wrap(console, options.max_width - head) or [Text()]
                cells, words, indent = [*cells, first], Text("\n").join(rest), head
            line = Text(_GAP).join(cells)
            line.rstrip()
            yield line
            if words.plain:
                yield Padding(words, (0, 0, 0, indent), expand=False)

    def _padded(self, cells: Sequence[Text], widths: Sequence[int]) -> list[Text]:
        padded = []
        for cell, width, right in zip(cells, widths, self._right, strict=False):
            copy = cell.copy()
            (copy.pad_left if right else copy.pad_right)(width - cell.cell_len)
            padded.append(copy)
        return padded


def brief(value: Any) -> str:
    """A value as JSON if that is short, else the number of entries in each part.

    Example:
        >>> brief({"line": 7})
        '{"line": 7}'
        >>> brief({"files": {f"inbox/{number}.jsonl": number for number in range(40)}, "run": 3})
        'files: 40 entries, run: 3'
    """
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _BRIEF or not isinstance(value, dict):
        return shorten(text, _BRIEF, placeholder="…")
    entries = {name: f"{len(part):,} entries" for name, part in value.items() if isinstance(part, dict | list)}
    return ", ".join(f"{name}: {entries.get(name) or shorten(str(part), _BRIEF)}" for name, part in value.items())
