"""The shell lines around a launcher's command: the preamble before it, and the container that it runs in."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evertune.launch.settings import LaunchSettings


def preamble(settings: LaunchSettings) -> list[str]:
    """What a shell does before the command: modules, the lines of ``setup``, and the environment variables.

    Variables come last, so that no module overrides them. They are quoted: a value that the shell has to expand
    (``export SCRATCH=/scratch/$USER``) belongs into ``setup``.

    Example:
        >>> from evertune.launch.settings import LaunchSettings
        >>> preamble(LaunchSettings(modules=["cuda/12.4"], environment={"NOTE": "two words"}))[0]
        'module load cuda/12.4'
    """
    modules = [f"module load {shlex.quote(module)}" for module in settings.modules]
    variables = [f"export {name}={shlex.quote(value)}" for name, value in settings.variables().items()]
    return [*modules, *settings.setup, *variables]


def contained(settings: LaunchSettings, words: Sequence[str]) -> list[str]:
    """A command that runs in the container of the settings; unchanged if they have none.

    The interpreter of this machine does not exist in the container: unless the settings give another one, the
    container's ``python`` is used.

    Args:
        settings: Settings of the launch, with the container.
        words: Command, as :meth:`~evertune.launch.settings.LaunchSettings.node_command` returns it.

    Raises:
        ValueError: If the container's runtime is pyxis, which only SLURM has.
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
    """A node's preamble and command as one shell line. ``exec`` lets the command replace the shell.

    Args:
        settings: Settings of the launch.
        words: Command of the node.
        before: Shell lines to run first.
    """
    return " && ".join([*before, *preamble(settings), f"exec {shlex.join(contained(settings, words))}"])
