"""What the commands on a registry's records have in common: their actions, their registry, and their exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from evertune.registry.registry import Registry, RegistryError

NOTHING = 3
"""The exit code of a command that found no record to act on."""
REGISTRY = "its folder, or its URL: s3://bucket/registry"


def with_actions(
    program: str, description: str, examples: str, actions: Mapping[str, str]
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of a command with several actions, and the parser of each, with ``--json``.

    Args:
        program: Name of the command.
        description: What it is for, as a sentence.
        examples: Examples and exit codes: the end of every help.
        actions: What each action does, by its name, without a capital and a full stop.
    """
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=description, epilog=examples, formatter_class=plain)
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    parsers = {}
    for name, words in actions.items():
        whole = words[0].upper() + words[1:] + "."
        parsers[name] = commands.add_parser(name, help=words, description=whole, epilog=examples, formatter_class=plain)
        parsers[name].add_argument("--json", action="store_true", help="print JSON, for machines")
    return parser, parsers


def opened(place: str) -> Registry:
    """The registry at a place.

    Raises:
        RegistryError: If there is none.
    """
    registry = Registry(place)
    if not registry.store.list():
        raise RegistryError(f"there is no registry at {registry.store.root}: check the path, and that it is mounted")
    return registry
