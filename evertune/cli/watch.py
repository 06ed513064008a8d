"""``evertune watch``: keep a registry up to date as records arrive."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evertune.live.watch import WatchSettings

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
        settings = _settings(vars(options)["watch"])
        if settings.log != "auto":
            log_to(as_json=settings.log == "json")
        return Watch(updater, command, replace(settings, grace=max(settings.grace, grace))).run()
    except (RegistryError, OSError, ValueError, ArgumentError, ModuleNotFoundError) as error:
        logger.error("evertune watch: %s", error, extra={"event": "error"})
        return 1


def _settings(section: Mapping[str, Any]) -> WatchSettings:
    """The section ``watch``, parsed here rather than by ``evertune update``, which does not need its secrets."""
    from jsonargparse import ArgumentParser

    from evertune.live.watch import WatchSettings

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(WatchSettings, "watch")
    settings: WatchSettings = parser.instantiate(parser.parse_object({"watch": section}))["watch"]
    return settings
