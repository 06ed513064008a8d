"""``evertune distil``: make a smaller version of the one in production, and promote it if it is no worse."""

from __future__ import annotations

from collections.abc import Sequence

from evertune.cli.quiet import quiet, say_progress
from evertune.cli.update import DISTIL, updater_from
from evertune.utils.terminal import complain, console


def distil(arguments: Sequence[str]) -> int:
    """Make a smaller version.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 if it was promoted, 4 if the gate refused it, 1 after an error.
    """
    from evertune.registry.registry import RegistryError
    from evertune.utils.processes import end_with_supervisor

    end_with_supervisor()
    with quiet(), say_progress(as_json=False):
        try:
            updater, options = updater_from(arguments, DISTIL)
            outcome = updater.distil(options.student, dry_run=options.dry_run)
        except (RegistryError, OSError, ValueError) as error:
            complain("evertune distil", error)
            return 1
    screen = console()
    if outcome.verdict is not None:
        screen.print(outcome.verdict.table())
    screen.print(outcome.words, soft_wrap=True)
    return outcome.code
