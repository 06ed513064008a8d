"""What each rank of a run executes: ``python -m evertune.cli.worker fit --config stream.yaml``, started by torchrun."""

from __future__ import annotations

import sys

from evertune.cli.main import main
from evertune.launch.supervisor.worker import run, with_layout

if __name__ == "__main__":
    run(main, with_layout(sys.argv[1:]))
