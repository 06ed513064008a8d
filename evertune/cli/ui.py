"""``evertune ui``: a small web page over a registry."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from evertune.cli.actions import opened
from evertune.cli.parsing import command_parser
from evertune.utils.terminal import complain

if TYPE_CHECKING:
    from evertune._lightning import LightningArgumentParser

_EPILOG = (
    "Example: evertune ui --registry registry --allow_changes --live live.yaml, then open http://127.0.0.1:8080. "
    "Exit codes: 0 after SIGTERM or SIGINT, 1 if it cannot start, 2 a wrong setting."
)

logger = logging.getLogger("evertune.ui")


def ui(arguments: Sequence[str]) -> int:
    """Show a registry until a signal ends it.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 after SIGTERM or SIGINT; 1 if it cannot start; 2 for a wrong setting.
    """
    from evertune.live.telemetry import log_to
    from evertune.registry.store import RegistryError
    from evertune.ui.settings import UiSettings
    from evertune.utils.extras import library

    parser = _parser()
    parsed = parser.parse_args(list(arguments))
    try:
        made = parser.instantiate(parsed)
        settings = UiSettings(**{field.name: getattr(made, field.name) for field in fields(UiSettings)})
        made.access.check_for(made.server)
    except ValueError as error:
        complain("evertune ui", error)
        return 2
    try:
        for name in ("starlette", "uvicorn", "jinja2"):
            library(name, "ui")
        opened(settings.registry)
        log_to(as_json=None if made.server.log == "auto" else made.server.log == "json")
        from evertune.ui.server import run

        run(settings, made.server, made.access)
    except (RegistryError, OSError, ValueError, ModuleNotFoundError) as error:
        complain("evertune ui", error)
        return 1
    return 0


def _parser() -> LightningArgumentParser:
    from evertune._lightning import ActionConfigFile  # type: ignore[attr-defined]
    from evertune.serve.settings import AccessSettings, ServerSettings
    from evertune.ui.settings import UiSettings

    parser = command_parser(
        prog="evertune ui",
        description="Show the versions, updates and records of a registry as a web page, on this machine.",
        epilog=_EPILOG,
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with the settings below")
    parser.add_class_arguments(UiSettings, skip={"allow_changes"})
    parser.add_argument(
        "--allow_changes",
        "--allow-changes",
        action="store_true",
        help="let the page promote, roll back, have records checked again, and label them",
    )
    # What is ignored here is not accepted: nothing is drained, and no records are counted.
    parser.add_class_arguments(ServerSettings, "server", skip={"drain"})
    parser.add_class_arguments(AccessSettings, "access", skip={"rate"})
    parser.set_defaults({"server.port": 8080})
    return parser
