"""``evertune completion``: a script that completes commands and options in bash and zsh."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress

_SCRIPT = """\
_evertune() {{
    local word=${{COMP_WORDS[COMP_CWORD]}}
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    local options
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _evertune evertune
"""


def completion(arguments: Sequence[str]) -> int:
    """Print the script.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0.
    """
    parser = argparse.ArgumentParser(
        prog="evertune completion",
        description="Print a script that completes commands and options. Exit codes: 0, or 2 for a wrong argument.",
        epilog="Example: evertune completion bash > ~/.local/share/bash-completion/completions/evertune",
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    shell = parser.parse_args(list(arguments)).shell
    overview = _help([])
    commands = re.findall(r"^ {4}([a-z]+) ", overview, flags=re.MULTILINE)
    cases = "\n".join(f'        {name}) options="{" ".join(_options(name))}" ;;' for name in commands)
    before = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    print(before + _SCRIPT.format(commands=" ".join(commands), cases=cases), end="")
    return 0


def _options(command: str) -> list[str]:
    return sorted(set(re.findall(r"(?<![\w`-])--[a-z][\w.]*", _help([command]))))


def _help(words: list[str]) -> str:
    from evertune.cli.main import main

    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        main([*words, "--help"])
    return shown.getvalue()
