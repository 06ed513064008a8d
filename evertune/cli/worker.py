"""The entry point of each rank, started by torchrun: ``python -m evertune.cli.worker fit --config stream.yaml``."""

from __future__ import annotations

import sys

from evertune.cli.main import main
from evertune.launch.supervisor.worker import run, with_layout

if __name__ == "__main__":
    run(main, with_layout(sys.argv[1:]))
