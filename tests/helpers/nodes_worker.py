"""What torchrun starts: ``python -m tests.helpers.nodes_worker MODULE:FUNCTION ARGUMENTS`` calls it with JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys

import torch

from evertune.launch.supervisor.worker import run


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    target, settings = arguments
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(**json.loads(settings))


if __name__ == "__main__":
    if "EVERTUNE_NODE_DIR" in os.environ:  # a supervisor has started torchrun
        run(main, sys.argv[1:])
    main(sys.argv[1:])
