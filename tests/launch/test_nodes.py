"""Two nodes with a network between them learn what one process learns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.callbacks.test_shard_exact import assert_same_weights
from tests.cli.test_main import CONFIG, ROOT, check_outputs, evertune, scores
from tests.helpers.distributed import run_ranks
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.helpers.namespaces import ADDRESSES, INTERFACE, Nodes, available, two_nodes
from tests.helpers.shard_worker import make_bert

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(available()), reason=str(available()))]

RUNS = [
    {"method": "replay+ewc", "optimizer": optimizer, "accumulation": accumulation}
    for optimizer, accumulation in (("sgd", 1), ("adamw", 3))
]
VARIABLES = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


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
    run_ranks("tests.helpers.shard_worker:learn_two", 1, folder=bert, out=str(folder), strategy="auto", runs=RUNS)
    return folder


def run_everywhere(nodes: Nodes, command: Callable[[int], list[str]], folder: Path) -> str:
    """A command on each node, until all have ended well; what they have printed."""
    logs = [folder / f"node-{node}.txt" for node in range(2)]
    running = []
    for node, path in enumerate(logs):
        with path.open("w") as log:
            started = nodes.run_on(node, command(node), VARIABLES, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        running.append(started)
    codes = [process.wait(500) for process in running]
    printed = "\n".join(path.read_text()[-8000:] for path in logs)
    assert codes == [0, 0], printed
    return printed


def torchrun(node: int, folder: Path) -> list[str]:
    """torchrun on a node, with one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=test"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29500", f"--rdzv-conf=is_host={int(node == 0)}"]
    return [*command, f"--local-addr={ADDRESSES[node]}", "-m", "tests.helpers.nodes_worker"]


def supervisor(node: int, folder: Path) -> list[str]:
    """The supervisor of a node, with one process; the preflight comes before it."""
    command = [
        sys.executable,
        "-m",
        "evertune.launch.supervisor.node",
        "--nodes=2",
        f"--node_rank={node}",
        "--processes=1",
    ]
    command += [f"--master={ADDRESSES[0]}:29500", "--run_id=test", f"--log_dir={folder / 'logs'}", "--max_restarts=0"]
    command += ["--grace=60", "--hang_timeout=45", "--silence_timeout=300"]
    return [*command, "--preflight", f"--shared={folder}", "--module=tests.helpers.nodes_worker", "--"]


@pytest.mark.parametrize(
    ("start", "stage"), [(torchrun, 1), (torchrun, 3), (supervisor, 1), (supervisor, 2), (supervisor, 3)]
)
def test_two_nodes_learn_what_one_process_learns(
    start: Callable[[int, Path], list[str]], stage: int, nodes: Nodes, bert: str, one_process: Path, tmp_path: Path
) -> None:
    settings = {"folder": bert, "out": str(tmp_path), "strategy": f"evertune_deepspeed_stage_{stage}", "runs": RUNS}
    what = ["tests.helpers.shard_worker:learn_two", json.dumps(settings)]
    run_everywhere(nodes, lambda node: [*start(node, tmp_path), *what], tmp_path)
    for run in RUNS:
        assert_same_weights(run, one_process, tmp_path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT, a file of texts, a configuration, and what one process learns from them."""
    folder = tmp_path_factory.mktemp("workspace")
    tiny_bert(folder / "bert")
    rows = [{"text": text, "label": name} for name, texts in TEXTS.items() for text in texts * 4]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "stream.yaml").write_text(CONFIG)
    done = evertune(folder, "fit", "--config", "stream.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    history, alone = check_outputs(one), check_outputs(other)
    assert str(history.accuracy_matrix) == str(alone.accuracy_matrix)
    assert history.memory == alone.memory
    for mine, theirs in zip(scores(one), scores(other), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_launch_of_a_fit_on_two_nodes(stage: int, nodes: Nodes, workspace: Path, tmp_path: Path) -> None:
    """``evertune launch torchrun``, with a command in place of ssh that goes to the other namespace."""
    ssh = tmp_path / "ssh.sh"
    cases = "\n".join(f"{address}) name={name};;" for address, name in zip(ADDRESSES, nodes.names, strict=True))
    ssh.write_text(f'case "$1" in\n{cases}\nesac\nshift\nexec ip netns exec $name sh -c "$*"\n')
    launch = ["--torchrun.ssh", f"sh {ssh}", "--torchrun.hosts", json.dumps(list(ADDRESSES))]
    launch += ["--interface", INTERFACE, "--processes_per_node", "1", "--shared_folders", json.dumps([str(workspace)])]
    launch += ["--environment", json.dumps(VARIABLES), "--log_dir", str(tmp_path / "logs")]
    out = tmp_path / "out"
    fit = ["fit", "--config", "stream.yaml", "--data.batch_size", "2", "--out", str(out)]
    fit += ["--trainer.strategy", f"evertune_deepspeed_stage_{stage}"]
    done = evertune(workspace, "launch", "torchrun", *launch, "--", *fit)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "report: " in done.stdout
    assert_same_run(out, workspace / "run")
