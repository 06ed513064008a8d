"""Prints foreign text safely: labels, names, reasons and ids come from records, and may hold markup or escapes.

A label is only text, but a terminal obeys escape sequences, rich reads square brackets as markup, and a reordering
character shows something else than what is there. Whatever a command prints goes through this module: :func:`console`
for results, :func:`complain` for errors, and :func:`guard` for the logs and warnings of the process.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from evertune.utils.secrets import without_secrets

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Control characters but tab and newline, line separators, what reorders text, and surrogates, which cannot be written.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


BROKEN_PIPE = 141
"""The exit code of a command whose reader stopped reading before it had ended."""


def visible(text: object) -> str:
    """A text that a terminal shows as it is: control characters are escaped, tabs and line breaks stay.

    Example:
        >>> print(visible("a\\x1b[31mb"))
        a\\x1b[31mb
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def foreign(text: object, style: str = "") -> Text:
    """The same as an element of rich, for cells of tables: its square brackets are not markup.

    Args:
        text: The text, or a value that becomes one.
        style: A style of rich for the whole of it, as in ``"bold red"``.
    """
    from rich.text import Text

    return Text(visible(text), style)


def console(stderr: bool = False, **settings: Any) -> Console:
    """A console of rich that reads no markup, and escapes the control characters of whatever it prints.

    Args:
        stderr: Print to standard error instead of standard output.
        settings: Further arguments of ``rich.console.Console``, such as ``width``.
    """
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

    class Safe(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(visible(text), **settings)

        def on_broken_pipe(self) -> None:
            _silence(self.file)  # rich itself would end the command with 1, which may be a verdict

        def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            # The last resort, for elements that no :func:`foreign` made: it comes after widths were measured.
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else visible(text), style, control)

    return Safe(stderr=stderr, markup=False, emoji=False, highlight=False, **settings)


def complain(program: str, words: object) -> None:
    """Print an error or a warning of a command to standard error, without secrets.

    Args:
        program: The command, such as ``"evertune update"``.
        words: What is wrong and what to do, or the error that says so.
    """
    if isinstance(words, BrokenPipeError):
        raise words
    print(f"{program}: {visible(without_secrets(str(words)))}", file=sys.stderr)


@contextmanager
def pipes() -> Iterator[None]:
    """Run a command whose reader may stop reading, as in ``evertune drift ... | head``: that is not an error.

    A command that had ended keeps its exit code; one that had not ends with 141, as the shell has it for SIGPIPE.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        _silence(sys.stdout)  # Python flushes again when it ends, and would report the pipe
        ended = error.__context__
        sys.exit(ended.code if isinstance(ended, SystemExit) else BROKEN_PIPE)


def _silence(file: IO[str]) -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def guard() -> None:
    """Escape control characters and mask secrets in all logs and warnings of this process, whoever writes them.

    Texts that the encoding of the terminal does not have are escaped too, rather than ending the command.
    """
    logging.setLogRecordFactory(_SafeRecord)
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # replaced by an object that is not a file, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class _SafeRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802
        return visible(without_secrets(super().getMessage()))


_plain_format = warnings.formatwarning


def _format_warning(message: Warning | str, *where: Any, **more: Any) -> str:
    return visible(without_secrets(_plain_format(message, *where, **more)))
