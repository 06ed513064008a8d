"""Run a function on several real processes, as a launcher would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_ENTRY = """
import importlib, json, os, sys
import torch
from evertune.utils.ranks import leave
torch.set_num_threads(1)
module, function, arguments, result = sys.argv[1:]
value = getattr(importlib.import_module(module), function)(**json.loads(arguments))
with open(result, "w") as file:
    json.dump(value, file)
leave()
"""
_ROOT = Path(__file__).resolve().parents[2]


def run_ranks(target: str, world_size: int, timeout: float = 300, **arguments: Any) -> list[Any]:
    """Call ``target`` ("package.module:function") with JSON ``arguments`` on ``world_size`` processes.

    Each process gets the environment a launcher sets (``LOCAL_RANK``, ``WORLD_SIZE``, ...), so that
    ``Trainer(devices=world_size, accelerator="cpu", strategy="ddp")`` joins them over gloo. Returns what the
    function returned (as JSON) on each rank; a rank that fails raises with its output.
    """
    module, function = target.split(":")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
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
                "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            log = (Path(folder) / f"log{rank}").open("w+")
            command = [sys.executable, "-c", _ENTRY, module, function, json.dumps(arguments), f"{folder}/result{rank}"]
            process = subprocess.Popen(command, env=environment, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT)
            ranks.append((process, log))
        failures = []
        for rank, (process, log) in enumerate(ranks):
            try:
                code = process.wait(timeout if not failures else 20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = "timeout"
            if code != 0:
                log.seek(0)
                failures.append(f"rank {rank} ended with {code}:\n{log.read()[-6000:]}")
            log.close()
        if failures:
            raise RuntimeError("\n".join(failures))
        return [json.loads((Path(folder) / f"result{rank}").read_text()) for rank in range(world_size)]
