"""Foreign text on a terminal: markup is not read, and nothing is obeyed."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import warnings

import pytest
import rich
from rich.table import Table
from rich.text import Text

from evertune.gate.verdict import Check, Verdict
from evertune.utils.terminal import complain, console, foreign, guard, visible

KINDS = {
    "markup that closes nothing": "[/x]",
    "markup": "[red]sale[/red]",
    "a link": "[link=https://evil.example]sale[/link]",
    "an emoji code": ":warning:",
    "a colour": "\x1b[31mred",
    "a title": "\x1b]0;owned\x07",
    "one-byte escapes": "\x9b31m\x90",
    "a carriage return": "refused\rpromoted",
    "a backspace": "no\b\byes",
    "reordering": "abc\u202egnp\u2066",
    "a lone surrogate": "a\udc80",
    "a line separator": "a\u2028b",
}
kinds = pytest.mark.parametrize("text", KINDS.values(), ids=KINDS)


def unsafe(written: str) -> list[str]:
    allowed = "\n\t"
    return [
        char for char in written if (not char.isprintable() or char in "\u202e\u2066\u2028") and char not in allowed
    ]


@kinds
def test_text_is_shown_as_it_is(text: str) -> None:
    assert unsafe(visible(text)) == []
    assert visible("naïve: 新闻\tone\ntwo") == "naïve: 新闻\tone\ntwo"
    assert foreign(text).plain == visible(text)


@kinds
@pytest.mark.parametrize("colour", [True, False])
def test_a_console_shows_whatever_it_is_given(text: str, colour: bool) -> None:
    table = Table(text)
    table.add_row(text, end_section=True)
    table.add_row(Text(text), style="bold")
    file = io.StringIO()
    screen = console(file=file, width=200, force_terminal=colour)
    for part in (text, table, foreign(text, "bold red")):
        screen.print(part)
    plain = Text.from_ansi(file.getvalue()).plain if colour else file.getvalue()
    assert plain.count(visible(text)) >= 4
    assert unsafe(plain) == []
    assert ("\x1b[1;31m" in file.getvalue()) == colour  # its own colours work


@kinds
def test_the_table_of_a_verdict_can_be_printed_by_rich(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(rich, "_console", rich.console.Console(file=file, width=200))
    checks = [Check("forgetting", text, 0.9, 0.8, 0.05, 0.01, False, text, "model")]
    rich.print(Verdict(False, checks).table())
    assert visible(text) in file.getvalue() and unsafe(file.getvalue()) == []


@kinds
def test_errors_logs_and_warnings_of_a_command(text: str) -> None:
    program = (
        "import logging, sys, warnings; from evertune.utils.terminal import complain, guard; guard();"
        "text = eval(sys.argv[1]); complain('evertune update', ValueError(text));"
        "logging.getLogger('any').warning('log %s', text); warnings.warn('warned ' + text); print(text)"
    )
    done = subprocess.run([sys.executable, "-c", program, ascii(text)], capture_output=True, check=True)
    err = done.stderr.decode()
    for line in (f"evertune update: {visible(text)}", f"log {visible(text)}", f"warned {visible(text)}"):
        assert line in err
    assert unsafe(err.replace("\r\n", "\n")) == []


def test_guarding_twice_changes_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    factory, formatting = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        guard()
        guard()
        assert warnings.formatwarning("\x1b", UserWarning, "file.py", 1, "") == "file.py:1: UserWarning: \\x1b\n"
        complain("evertune", "\x1b")
        assert capsys.readouterr().err == "evertune: \\x1b\n"
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = formatting
