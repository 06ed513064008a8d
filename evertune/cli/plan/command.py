"""``evertune plan``: what training a model takes on each GPU under each strategy, without any GPU at hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from evertune.cli.plan.gpus import GPUS
from evertune.cli.plan.request import read_request
from evertune.cli.plan.strategies import choose, rows_of, what_would_fit
from evertune.cli.plan.table import as_json, print_plan
from evertune.utils.terminal import complain


def plan(arguments: Sequence[str]) -> int:
    """Print what a model needs on each GPU under each strategy. Its weights are never read.

    Args:
        arguments: Arguments of the command, without its name.

    Returns:
        The exit code: 0 if the model fits (under the strategy that the configuration names, or else under any), 1 if
        it does not, 2 if the question cannot be answered.
    """
    options = _parser().parse_args(arguments)
    try:
        request = read_request(options)
        shape = request.shape()
        rows = rows_of(shape, request)
    except (OSError, ValueError, TypeError) as error:
        complain("evertune plan", error)
        return 2
    choice = choose(rows, request.strategy)
    advice = [] if choice is not None else what_would_fit(shape, request)
    if options.json:
        print(json.dumps(as_json(shape, request, rows, choice, advice), indent=1))
    else:
        print_plan(shape, request, rows, choice, advice)
    return 0 if choice is not None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evertune plan",
        description="What a model needs of each GPU under each strategy. Only its configuration is read, never its "
        "weights. Exit codes: 0 it fits, 1 it does not, 2 the question cannot be answered.",
        epilog="Example: evertune plan --model bert-base-uncased --nodes 2 --gpus 8 --gpu_memory a100",
    )
    parser.add_argument("--config", type=Path, help="the YAML file of `evertune fit` or `evertune update`")
    parser.add_argument(
        "--model", dest="model_name_or_path", metavar="NAME", help="on the hub, a folder, or package:NAME/FOLDER"
    )
    parser.add_argument("--nodes", type=int, help="machines (1)")
    parser.add_argument("--gpus", type=int, help="GPUs of each (1)")
    parser.add_argument("--gpu_memory", metavar="GIB|NAME", help=f"of a GPU: GiB, or one of {', '.join(GPUS)}")
    parser.add_argument(
        "--method", nargs="*", metavar="NAME", help="what is learned with: ewc, replay, or the path of a class"
    )
    parser.add_argument("--precision", help="of the Trainer (32-true)")
    parser.add_argument("--batch_size", type=int, help="new examples at a time on each GPU (32)")
    parser.add_argument("--seq_length", type=int, help="tokens of an example (128)")
    parser.add_argument("--accumulate_grad_batches", type=int, help="of the Trainer (1)")
    parser.add_argument("--freeze_layers", type=int, help="of the module: 0 trains all, -1 the head only")
    parser.add_argument("--classes", type=int, help="rows of the head")
    parser.add_argument("--memory_size", type=int, help="examples in the replay memory")
    parser.add_argument("--examples", type=int, help="new examples of an update, of which Distillation keeps answers")
    parser.add_argument("--replay_ratio", type=float, help="old examples per new one, with replay (1)")
    parser.add_argument(
        "--estimation_batch_size", type=int, help="examples at a time when the importance is estimated (16 for ewc)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    return parser
