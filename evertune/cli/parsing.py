"""The parser of commands with a configuration: errors take one line, and a misspelt name gets a suggestion."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from inspect import isclass, signature
from typing import TYPE_CHECKING, Any, NoReturn

from evertune.utils.plugins import class_at
from evertune.utils.terminal import complain

if TYPE_CHECKING:
    from evertune._lightning import LightningArgumentParser

_ROOMS = ("callbacks", "sources", "live.triggers", "live.alerts", "lightning_modules", "sources.masking")
"""Modules of evertune with the classes that a configuration names."""
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_UNKNOWN = re.compile(r"[Oo]ption '([\w.-]+)'(?: is not accepted)?|unrecognized arguments: (--[\w.-]+)")
_MISSING = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'|dot import path string: (\w+)")
_NOT_THIS = re.compile(
    r"Expected a <class 'NoneType'>|Not a valid subclass|Subclass types expect|^a (class path|dict) |^Subtypes|^Errors:"
    "|^Does not validate|^Given value"
)


def command_parser(**settings: Any) -> LightningArgumentParser:
    """A parser of LightningCLI whose errors take one line with a suggestion, and end with exit code 2.

    Args:
        settings: Arguments of ``LightningArgumentParser``, such as ``prog`` and ``description``.
    """
    made: LightningArgumentParser = _parser_class()(allow_abbrev=False, **settings)
    return made


@cache
def _parser_class() -> Any:
    from evertune._lightning import LightningArgumentParser

    class CommandParser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if not self.exit_on_error:  # one of those that jsonargparse makes for each class, to see whether it fits
                super().error(message, ex)
            complain(self.prog, f"{_one_line(message)}{_suggestion(message, self)} (see {self.prog} --help)")
            sys.exit(2)

    return CommandParser


def _one_line(message: str) -> str:
    """A message of jsonargparse without the types that a setting might also have had."""
    lines = [line.strip().removeprefix("- ") for line in message.replace("<class 'float'>", "number").splitlines()]
    words = " ".join(line for line in lines if line and not _NOT_THIS.search(line))
    return _CLASS.sub(r"\1", re.sub(r'^Parser key "([\w.]+)":?', r"\1:", words))


def _suggestion(message: str, parser: Any) -> str:
    """``"; did you mean ...?"``, or nothing."""
    wrong, known = "", list[str]()
    if found := _MISSING.search(message):
        wrong = found[2] or found[3]
        known = [*_names(found[1]), *(name for room in _ROOMS for name in _names(f"evertune.{room}"))]
    elif found := _UNKNOWN.search(message):
        wrong = found[1] or found[2]
        options = [option for option in parser._option_string_actions if option.startswith("--")]
        if of_class := _CLASS.search(message):
            known = _arguments(of_class[1])
        elif group := re.search(r"Group '([\w.]+)'", message):
            known = [option[len(group[1]) + 3 :] for option in options if option.startswith(f"--{group[1]}.")]
        else:
            known = options if wrong.startswith("--") else [option[2:] for option in options]
    near = get_close_matches(wrong, known, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _names(module: str) -> Iterable[str]:
    """The public classes of a module."""
    try:
        found = import_module(module)
    except Exception:  # only for a suggestion
        return []
    return [name for name in dir(found) if isclass(getattr(found, name, None)) and not name.startswith("_")]


def _arguments(path: str) -> list[str]:
    """The arguments of a class and of those that it derives from, given its import path."""
    try:
        found = class_at(path)
        return [argument for base in found.__mro__[:-1] for argument in signature(base).parameters]
    except Exception:  # only for a suggestion
        return []
