"""The lines of shell in which every launcher's command stands: what comes before it, and the container around it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evertune.launch.settings import LaunchSettings


def preamble(settings: LaunchSettings) -> list[str]:
    """What a shell does before the command: modules, the lines of ``setup``, and the environment variables.

    Variables come last, so that no module takes them back. They stand as they are: what the shell has to fill in
    (``export SCRATCH=/scratch/$USER``) is a line of ``setup``.

    Example:
        >>> from evertune.launch.settings import LaunchSettings
        >>> preamble(LaunchSettings(modules=["cuda/12.4"], environment={"NOTE": "two words"}))[0]
        'module load cuda/12.4'
    """
    modules = [f"module load {shlex.quote(module)}" for module in settings.modules]
    variables = [f"export {name}={shlex.quote(value)}" for name, value in settings.variables().items()]
    return [*modules, *settings.setup, *variables]


def contained(settings: LaunchSettings, words: Sequence[str]) -> list[str]:
    """A command inside of the container of the settings; as it is where they have none.

    The interpreter of this machine is not there in the container: where the settings name no other, its ``python`` is
    taken.

    Args:
        settings: with the container.
        words: the command, as :meth:`~evertune.launch.settings.LaunchSettings.node_command` makes it.

    Raises:
        ValueError: when the container's runtime is pyxis, which only SLURM has.
    """
    container = settings.container
    if container is None:
        return list(words)
    if container.runtime != "apptainer":
        raise ValueError(f"container.runtime {container.runtime!r} is part of SLURM: use 'apptainer' here")
    program = "python" if words[0] == sys.executable else words[0]
    mounts = [word for mount in container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *mounts, container.image, program, *words[1:]]


def line(settings: LaunchSettings, words: Sequence[str], *before: str) -> str:
    """A node's command after its preamble, in one line for a shell, which the command replaces.

    Args:
        settings: of the launch.
        words: the command.
        before: lines of shell that come first.
    """
    return " && ".join([*before, *preamble(settings), f"exec {shlex.join(contained(settings, words))}"])
