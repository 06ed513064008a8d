"""Two or more processes of a benchmark, as torchrun would start them on one machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_ranks(script: str, world_size: int, job: Mapping[str, Any], timeout: float, **variables: str) -> list[Any]:
    """Run ``script --worker JOB`` once per rank, and return what each wrote to ``RANK.json`` in the folder ``out``.

    Args:
        script: File of the benchmark.
        world_size: Number of ranks.
        job: What the ranks are to do; they get it as JSON, with the name of the folder as ``out``.
        timeout: Seconds that a rank may take.
        variables: More environment variables.

    Raises:
        SystemExit: If a rank fails, with the end of what it printed.
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as out:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        command, ranks = [sys.executable, script, "--worker", json.dumps({**job, "out": out})], []
        for rank in range(world_size):
            environment = os.environ | {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world_size)},
                **{"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                **variables,
            }
            log = (Path(out) / f"{rank}.log").open("w+")
            ranks.append((subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT), log))
        try:
            for process, log in ranks:
                if process.wait(timeout) != 0:
                    log.seek(0)
                    raise SystemExit(f"a rank has failed:\n{log.read()[-4000:]}")
        finally:
            for process, log in ranks:
                process.kill()
                process.wait()
                log.close()
        return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(world_size)]
