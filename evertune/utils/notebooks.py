"""Tables in HTML, as notebooks show the value of a cell. All text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from evertune.utils.terminal import visible

MAX_ROWS = 20
"""Rows and columns of a long table that a notebook shows: the newest."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a title.

    Args:
        title: A sentence above the table.
        columns: Headers; all empty for none.
        rows: Cells, as many in a row as there are columns; None for an empty one.

    Example:
        >>> table("two", ["name"], [["a < b"]])
        '<p><b>two</b></p><table><thead><tr><th>name</th></tr></thead><tbody><tr><td>a &lt; b</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{_text(column)}</th>" for column in columns) if any(columns) else ""
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    thead = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f"<p><b>{_text(title)}</b></p><table>{thead}<tbody>{body}</tbody></table>"


def _text(cell: object) -> str:
    return "" if cell is None else escape(visible(cell))
