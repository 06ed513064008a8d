"""Run a function on several real processes, as a launcher would."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.processes import FORKS, as_started_by_a_shell


def run_ranks(target: str, world_size: int, timeout: float = 1_200, **arguments: Any) -> list[Any]:
    """Call ``target`` ("package.module:function") with JSON ``arguments`` on ``world_size`` processes.

    Each process gets the environment a launcher sets (``LOCAL_RANK``, ``WORLD_SIZE``, ...), so that
    ``Trainer(devices=world_size, accelerator="cpu", strategy="ddp")`` joins them over gloo. Returns what the
    function returned (as JSON) on each rank; a rank that fails raises with its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = []
        for rank in range(world_size):
            environment = os.environ | {
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            log, result = folder / f"log{rank}", folder / f"result{rank}"
            process = FORKS.Process(target=_rank, args=(target, json.dumps(arguments), environment, log, result))
            process.start()
            ranks.append((process, log))
        failures = []
        for rank, (process, log) in enumerate(ranks):
            process.join(timeout if not failures else 20)
            code: int | str | None = process.exitcode
            if code is None:
                process.kill()
                process.join()
                code = "timeout"
            if code != 0:
                failures.append(f"rank {rank} ended with {code}:\n{log.read_text()[-6000:]}")
        if failures:
            raise RuntimeError("\n".join(failures))
        return [json.loads((folder / f"result{rank}").read_text()) for rank in range(world_size)]


def _rank(target: str, arguments: str, environment: dict[str, str], log: Path, result: Path) -> None:
    """What runs in a rank."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    as_started_by_a_shell()
    os.environ.clear()
    os.environ.update(environment)
    import torch

    from evertune.utils.ranks import leave

    torch.set_num_threads(1)
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    result.write_text(json.dumps(value))
    leave()
