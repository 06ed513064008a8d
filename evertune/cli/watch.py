"""``evertune watch``: keep a registry up to date as records arrive."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

logger = logging.getLogger("evertune.live")


def watch(arguments: Sequence[str], launcher: Sequence[str] = (), grace: float = 0.0) -> int:
    """Watch as the section ``watch`` of a configuration of ``evertune update`` describes.

    Each update runs in a child process, ``evertune update`` with the same arguments, and so reads the configuration
    again.

    Args:
        arguments: Arguments of the command, without its name.
        launcher: Words to put before ``update`` if updates are launched elsewhere, as in
            ``["launch", "slurm", "--wait", "--"]``.
        grace: Minimum time in seconds that an update gets to end; the section ``watch`` may give it more.

    Returns:
        The exit code: 0 after SIGTERM or SIGINT; 1 if it cannot start, or has lost the registry to another process.
    """
    from evertune.cli.update import updater_from
    from evertune.live.telemetry import log_to
    from evertune.live.watch import Watch
    from evertune.registry.store import RegistryError

    command = [sys.executable, "-m", "evertune", *launcher, "update", *arguments]
    log_to()  # with the defaults, so that errors in the configuration are logged as well
    try:
        updater, options = updater_from(arguments, "evertune watch")
        settings = options.watch
        if settings.log != "auto":
            log_to(as_json=settings.log == "json")
        return Watch(updater, command, replace(settings, grace=max(settings.grace, grace))).run()
    except (RegistryError, OSError, ValueError, ModuleNotFoundError) as error:
        logger.error("evertune watch: %s", error, extra={"event": "error"})
        return 1
