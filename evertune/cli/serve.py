"""``evertune serve``: answer requests over HTTP with the version in production."""

from __future__ import annotations

import asyncio
import logging
import socket
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from evertune.cli.parsing import command_parser
from evertune.sources.masking import Masker
from evertune.utils.plugins import load_classes
from evertune.utils.terminal import complain

if TYPE_CHECKING:
    from evertune._lightning import LightningArgumentParser
    from evertune.serve.service import Service
    from evertune.serve.settings import AccessSettings

_EPILOG = (
    "Example: evertune serve --registry registry --server.port 8000, then: curl http://127.0.0.1:8000/predict -H "
    "'Content-Type: application/json' -d '{\"text\": \"Shares fell.\"}'. Exit codes: 0 after SIGTERM or SIGINT (with "
    "--check: everything works), 1 if it cannot start, 2 a wrong setting."
)

logger = logging.getLogger("evertune.serve")


def serve(arguments: Sequence[str]) -> int:
    """Serve until a signal ends it.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 after SIGTERM or SIGINT; 1 if it cannot start.
    """
    return _serve(arguments)


def _serve(
    arguments: Sequence[str],
    listening: socket.socket | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> int:
    """Serve in this process, or start the workers; a worker gets the socket that they share."""
    from evertune.live.telemetry import log_to
    from evertune.registry.store import RegistryError

    parser = _parser()
    parsed = parser.parse_args(list(arguments))
    try:
        made = parser.instantiate(parsed)
    except ValueError as error:
        complain("evertune serve", error)
        return 2
    if not made.check:
        log_to(as_json=None if made.server.log == "auto" else made.server.log == "json")
    try:
        made.access.check_for(made.server)
        if made.workers != 1 and listening is None and not made.check:
            from evertune.serve.workers import Workers

            return Workers(partial(_serve, list(arguments)), made.workers).run(made.server)
        service = _service(made)
        if made.check:
            return _check(service, made.access)
        from evertune.serve.server import run

        run(service, made.server, made.access, listening=listening, on_start=on_start)
    except (RegistryError, OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        if made.check:
            complain("evertune serve", error)
        else:
            logger.error("evertune serve: %s", error, extra={"event": "error"})
        return 1
    return 0


def _parser() -> LightningArgumentParser:
    from jsonargparse.typing import PositiveInt

    from evertune._lightning import ActionConfigFile  # type: ignore[attr-defined]
    from evertune.registry.serving import Precision
    from evertune.serve.settings import (
        AccessSettings,
        BatchSettings,
        DriftSettings,
        LimitSettings,
        LogSettings,
        OnnxSettings,
        ServerSettings,
        TrafficSettings,
    )

    load_classes()  # so that a configuration can name the maskers of plug-ins
    parser = command_parser(
        prog="evertune serve",
        description="Answer requests over HTTP with the version in production, and follow its alias.",
        epilog=_EPILOG,
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with the settings below")
    parser.add_argument("--registry", type=str | None, default=None, help="the folder, or its URL, with the versions")
    parser.add_argument("--model", type=str | None, default=None, help="an export to serve instead of a registry")
    parser.add_argument("--alias", type=str, default="production", help="the alias to follow, or a version's number")
    parser.add_argument("--poll", type=float, default=5.0, help="seconds between two looks at the alias")
    parser.add_argument("--wait", action="store_true", help="wait for the first version if there is none yet")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ...: a GPU if there is one")
    parser.add_argument("--precision", type=Precision, default="32", help="32, or bf16 where the processor has it")
    parser.add_argument(
        "--workers", type=PositiveInt, default=1, help="processes that share the port, each with its own model"
    )
    parser.add_argument("--launch", type=dict[str, Any], default={}, help="settings of `evertune launch`")
    parser.add_argument("--check", action="store_true", help="load everything, answer one text, and end")
    parser.add_class_arguments(ServerSettings, "server")
    parser.add_class_arguments(AccessSettings, "access")
    parser.add_class_arguments(BatchSettings, "batching")
    parser.add_class_arguments(OnnxSettings, "onnx")
    parser.add_class_arguments(LimitSettings, "limits")
    parser.add_class_arguments(TrafficSettings, "traffic")
    parser.add_class_arguments(DriftSettings, "drift")
    parser.add_class_arguments(LogSettings, "log")
    parser.add_argument(
        "--masker", type=Masker | None, default=None, help="takes personal data out of the log: PatternMasker"
    )
    return parser


def _service(made: Namespace | Any) -> Service:
    from evertune.serve.log import RequestLog
    from evertune.serve.service import Service
    from evertune.utils.extras import library

    for name in ("starlette", "uvicorn"):
        library(name, "serve")
    return Service(
        made.registry,
        made.alias,
        model=made.model,
        batching=made.batching,
        limits=made.limits,
        traffic=made.traffic,
        drift=made.drift,
        log=None if made.log.path is None else RequestLog(made.log, made.masker),
        poll=made.poll,
        wait=made.wait,
        device=made.device,
        precision=made.precision,
        onnx=made.onnx,
    )


def _check(service: Service, access: AccessSettings) -> int:
    """Start everything but the socket."""
    from evertune.serve.access import Access
    from evertune.serve.messages import One

    Access(access)

    async def once() -> int:
        await service.start()
        try:
            (answer,) = await service.predict(One(text="a text"))
        finally:
            await service.close()
        return answer.version

    version = asyncio.run(once())
    print(f"ok: version {version} answers")
    return 0
