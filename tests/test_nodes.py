"""Two nodes with a network between them learn what one process learns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.namespaces import ADDRESSES, Nodes, available, two_nodes
from tests.shard_worker import make_bert
from tests.test_shard_exact import assert_same_weights

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(available()), reason=str(available()))]

RUNS = [
    {"method": "replay+ewc", "optimizer": optimizer, "accumulation": accumulation}
    for optimizer, accumulation in (("sgd", 1), ("adamw", 3))
]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def one_process(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_ranks("tests.shard_worker:learn_two", 1, folder=bert, out=str(folder), strategy="auto", runs=RUNS)
    return folder


def run_everywhere(nodes: Nodes, commands: Sequence[list[str]], folder: Path) -> None:
    """One command on each node, until all have ended well."""
    logs = [(folder / f"node{node}.log").open("w+") for node in range(2)]
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = [
        nodes.run_on(node, command, variables, stdout=log, stderr=subprocess.STDOUT)
        for node, (command, log) in enumerate(zip(commands, logs, strict=True))
    ]
    codes = [process.wait(400) for process in running]
    assert codes == [0, 0], "\n".join(log.read()[-4000:] for log in logs if not log.seek(0))


def torchrun(node: int, target: str, **arguments: Any) -> list[str]:
    """torchrun on a node with one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=test"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29500"]
    command += [f"--rdzv-conf=is_host={int(node == 0)}", f"--local-addr={ADDRESSES[node]}"]
    return [*command, "-m", "tests.nodes_worker", target, json.dumps(arguments)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_nodes_learn_what_one_process_learns(
    stage: int, nodes: Nodes, bert: str, one_process: Path, tmp_path: Path
) -> None:
    strategy = f"evertune_deepspeed_stage_{stage}"
    learn = {"folder": bert, "out": str(tmp_path), "strategy": strategy, "runs": RUNS}
    commands = [torchrun(node, "tests.shard_worker:learn_two", **learn) for node in range(2)]
    run_everywhere(nodes, commands, tmp_path)
    for run in RUNS:
        assert_same_weights(run, one_process, tmp_path)
