"""What torchrun starts: ``python -m tests.nodes_worker package.module:function ARGUMENTS`` calls it with JSON."""

from __future__ import annotations

import importlib
import json
import sys

import torch


def main(target: str, arguments: str) -> None:
    torch.set_num_threads(1)
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(**json.loads(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
