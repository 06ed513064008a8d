"""A run whose processes are killed, stopped and cut off ends as one that nobody disturbed, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.lightning_modules import WORDS, tiny_bert
from tests.helpers.namespaces import ADDRESSES, INTERFACE, Nodes, available, two_nodes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LABELS = ["business", "sport", "politics"]
EPOCHS, BATCHES = 2, 10  # steps of an epoch
STEPS = [(label, step) for label in LABELS for step in range(EPOCHS * BATCHES)]
STRATEGIES = {"ddp": "ddp", "zero_2": "evertune_deepspeed_stage_2", "zero_3": "evertune_deepspeed_stage_3"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT and a file of texts, no two of which are alike."""
    folder = tmp_path_factory.mktemp("chaos")
    tiny_bert(folder / "bert")
    rows = []
    for number in range(BATCHES * 8 * len(LABELS)):
        digits = [WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(3)]
        label = LABELS[number % len(LABELS)]
        rows += [{"text": " ".join(digits), "label": label, "split": split} for split in ("train", "test")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


class Run:
    """``evertune fit`` on two ranks: on one node, or, with ``nodes``, one on each of two.

    Args:
        workspace: with the model and the texts.
        folder: where the run writes.
        nodes: two of them, or None.
        strategy: of the trainer.
        dropout: of the model.
        seconds: that a step takes at least.
        options: of the supervisor.
    """

    def __init__(
        self,
        workspace: Path,
        folder: Path,
        nodes: Nodes | None = None,
        strategy: str = "ddp",
        dropout: float = 0.1,
        seconds: float = 0.1,
        **options: Any,
    ) -> None:
        self.folder, self.nodes = folder, nodes
        self.out, self.told = folder / "out", folder / "told"
        self.supervisors: dict[int, subprocess.Popen[bytes]] = {}
        self._config(workspace, strategy, dropout, seconds)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        defaults = {"max_restarts": 3, "grace": 60, "hang_timeout": 45, "silence_timeout": 300}
        self._options = [word for name, value in (defaults | options).items() for word in (f"--{name}", str(value))]

    def _config(self, workspace: Path, strategy: str, dropout: float, seconds: float) -> None:
        methods = [
            {"class_path": "evertune.callbacks.Replay", "init_args": {"memory_size": 24}},
            {"class_path": "evertune.callbacks.EWC", "init_args": {"ewc_lambda": 10.0, "n_examples": 16}},
            {
                "class_path": "tests.helpers.chaos_worker.Told",
                "init_args": {"folder": str(self.told), "seconds": seconds},
            },
        ]
        settings = {
            "seed_everything": 0,
            "out": str(self.out),
            "checkpoint_every_n_steps": 3,
            "model": {
                "class_path": "tests.helpers.resume_worker.Classifier",
                "init_args": {"model_name_or_path": str(workspace / "bert"), "dropout": dropout, "learning_rate": 1e-3},
            },
            "data": {
                "source": str(workspace / "rows.jsonl"),
                "scenario": "class_incremental",
                "class_order": LABELS,
                "n_experiences": len(LABELS),
                "split_column": "split",
                "batch_size": 4,
            },
            "trainer": {
                "max_epochs": EPOCHS,
                "accelerator": "cpu",
                "strategy": STRATEGIES[strategy],
                "callbacks": methods,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "stream.yaml").write_text(yaml.safe_dump(settings))

    def start(self, node: int) -> None:
        """Start the supervisor of a node, or start it again."""
        master = ADDRESSES[0] if self.nodes else "127.0.0.1"
        layout = {"nodes": 2, "processes": 1} if self.nodes else {"nodes": 1, "processes": 2}
        command = [
            sys.executable,
            "-m",
            "evertune.launch.supervisor.node",
            "--node_rank",
            str(node),
            "--run_id",
            "chaos",
        ]
        command += [word for name, number in layout.items() for word in (f"--{name}", str(number))]
        command += ["--master", f"{master}:{self._port}", "--log_dir", str(self.folder / "logs"), *self._options]
        command += ["--", "fit", "--config", str(self.folder / "stream.yaml")]
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (self.folder / f"node-{node}.txt").open("ab") as output:
            if self.nodes:
                variables |= {"GLOO_SOCKET_IFNAME": INTERFACE}
                started = self.nodes.run_on(node, command, variables, stdout=output, stderr=subprocess.STDOUT)
            else:
                started = subprocess.Popen(command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT)
        self.supervisors[node] = started

    def kill_supervisor(self, node: int) -> float:
        """Kill the supervisor of a node, and with it all that it has started there; returns when."""
        gone = self.supervisors.pop(node)
        gone.kill()
        gone.wait()
        return time.time()

    def lines(self, rank: int) -> list[dict[str, Any]]:
        """What a rank has told."""
        path = self.told / f"rank-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, step: int, rank: int, not_from: Collection[int] = ()) -> int:
        """Wait until a rank is at a step of the stream, or beyond; returns its process, which is none of some."""

        def there() -> int | None:
            for told in self.lines(rank)[-1:]:
                if told["pid"] not in not_from and STEPS.index((told["experience"], told["step"])) >= step:
                    return int(told["pid"])
            return None

        return int(self.until(f"rank {rank} is at step {step}", there))

    def until(self, what: str, there: Callable[[], Any], timeout: float = 300) -> Any:
        """Wait for something; what it returns. The run must not end before."""
        deadline = time.monotonic() + timeout
        while not (found := there()):
            ended = {node: code for node, one in self.supervisors.items() if (code := one.poll()) is not None}
            assert not ended, f"waited until {what}, but supervisors have ended: {ended}\n{self.output()}"
            assert time.monotonic() < deadline, f"waited too long until {what}\n{self.output()}"
            time.sleep(0.03)
        return found

    def wait(self, timeout: float = 400) -> None:
        """Wait until all supervisors have ended well."""
        for node, process in self.supervisors.items():
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            assert code == 0, f"node {node} ended with {code}\n{self.output()}"

    def said(self, node: int, words: str) -> list[float]:
        """When the supervisor of a node, or its torchrun, has said words of a pattern: seconds since the epoch."""
        times = []
        log = self.folder / "logs" / "chaos" / f"node-{node}.log"
        for line in log.read_text().splitlines() if log.exists() else []:
            if re.search(words, line):
                times.append(datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S").timestamp())
        for line in (self.folder / f"node-{node}.txt").read_text().splitlines():
            if re.search(words, line) and (found := re.match(r"[EWI](\d{4} \d\d:\d\d:\d\d\.\d+)", line)):
                when = datetime.strptime(f"{datetime.now().year}{found[1]}", "%Y%m%d %H:%M:%S.%f")
                times.append(when.timestamp())
        return times

    def assert_detected(self, event: float, words: str, nodes: Collection[int]) -> None:
        """Something has been said on one of the nodes in the minute after an event."""
        after = [when - event for node in nodes for when in self.said(node, words) if when - event > -1]
        assert after, f"nobody said {words!r}\n{self.output()}"
        print(f"{words!r} was said {min(after):.1f} s after the event")
        assert min(after) < 60

    def output(self) -> str:
        """The end of what the supervisors have printed."""
        return "\n".join(f"{path}:\n{path.read_text()[-5000:]}" for path in sorted(self.folder.glob("node-*.txt")))

    def end(self) -> None:
        """Kill what is left."""
        for process in self.supervisors.values():
            process.kill()
            process.wait()


@contextmanager
def running(workspace: Path, folder: Path, on: str, **settings: Any) -> Iterator[Run]:
    """A run that has been started, on "one" node or "two"."""
    if on == "two":
        if reason := available():
            pytest.skip(reason)
        with two_nodes() as nodes:
            yield from _run(Run(workspace, folder, nodes, **settings), range(2))
    else:
        yield from _run(Run(workspace, folder, **settings), range(1))


def _run(run: Run, nodes: range) -> Iterator[Run]:
    try:
        for node in nodes:
            run.start(node)
        yield run
    finally:
        run.end()


@dataclass
class Step:
    """A step of the stream as a rank has told it.

    Attributes:
        attempt: the same on all ranks that took it together.
        examples: the tokens of each.
    """

    attempt: str
    examples: list[list[int]]


def history(run: Run, rank: int) -> tuple[list[Step], list[int]]:
    """The steps of a rank that count, and where its processes have started.

    Who starts at a step discards those from there on, and must have all those before.
    """
    steps: list[Step] = []
    starts: dict[int, int] = {}
    for line in run.lines(rank):
        place = STEPS.index((line["experience"], line["step"]))
        if line.get("start"):
            starts.setdefault(line["pid"], place)
            assert place <= len(steps), f"rank {rank} lost steps: it has {len(steps)} and goes on with {line}"
            del steps[place:]
        elif place == len(steps) - 1 and steps[-1].attempt == line["attempt"]:  # gradients are accumulated
            steps[-1].examples += line["examples"]
        else:
            assert place == len(steps), f"rank {rank} is at {line} after {len(steps)} steps"
            steps.append(Step(line["attempt"], line["examples"]))
    return steps, list(starts.values())


def together(run: Run) -> list[list[list[int]]]:
    """The examples of each step that counts, over all ranks there were; rank 0 was always there."""
    others: dict[tuple[str, int], list[list[int]]] = {}
    for line in run.lines(1):
        if "examples" in line:
            key = (line["attempt"], STEPS.index((line["experience"], line["step"])))
            others.setdefault(key, []).extend(line["examples"])
    steps, _ = history(run, 0)
    return [sorted(step.examples + others.get((step.attempt, place), [])) for place, step in enumerate(steps)]


@pytest.fixture(scope="module")
def undisturbed(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs that nobody disturbs, on one node, made when first asked for."""
    made: dict[str, Run] = {}

    def make(strategy: str = "ddp", **settings: Any) -> Run:
        key = f"{strategy}{settings}"
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            with running(workspace, folder, "one", strategy=strategy, seconds=0.0, **settings) as run:
                run.wait()
            made[key] = run
        return made[key]

    return make


def assert_as_undisturbed(run: Run, expected: Run, events: int) -> None:
    """The same examples in the same steps, the same weights, learning state and scores, in so many more attempts."""
    for rank in range(2):
        steps, starts = history(run, rank)
        reference, _ = history(expected, rank)
        print(f"rank {rank} started at steps {starts}")
        assert len(starts) > events
        assert all(place > 0 for place in starts[1:]), "it began anew instead of going on from a checkpoint"
        assert len(reference) == len(STEPS)
        assert [step.examples for step in steps] == [step.examples for step in reference]
    kept, twins = (
        {path.relative_to(one.folder): path for path in (*one.out.glob("model/*"), *one.told.glob("*/*/*"))}
        for one in (run, expected)
    )
    assert kept.keys() == twins.keys()
    for name, path in kept.items():
        if path.suffix == ".safetensors":
            assert_same_tensors(path, twins[name])
        else:
            assert path.read_bytes() == twins[name].read_bytes(), name
    assert scores(run) == scores(expected)


def scores(run: Run) -> Any:
    return json.loads((run.out / "history.json").read_text())["runs"]["run"]["accuracy_matrix"]


def assert_same_tensors(one: Path, other: Path) -> None:
    tensors, twins = load_file(one), load_file(other)
    assert tensors.keys() == twins.keys()
    for name, value in tensors.items():
        assert torch.equal(value, twins[name]), f"{one} {name}"


def signal_rank(run: Run, pid: int, number: signal.Signals) -> float:
    """Signal a rank; returns when."""
    assert str(run.folder) in Path(f"/proc/{pid}/cmdline").read_text()
    print(f"{number.name} to process {pid}")
    os.kill(pid, number)
    return time.time()


@pytest.mark.parametrize(("on", "strategy"), [("one", "ddp"), ("two", "zero_2")])
def test_a_rank_killed_at_ten_steps(
    on: str, strategy: str, workspace: Path, undisturbed: Callable[..., Run], tmp_path: Path
) -> None:
    seed = f"{on} {strategy}"
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(5, len(STEPS) - 1), 10))
    victims = [chance.randrange(2) for _ in steps]
    print(f"seed {seed!r}: kills ranks {victims} at steps {steps}")
    killed: list[int] = []
    events = []
    with running(workspace, tmp_path, on, strategy=strategy, max_restarts=20) as run:
        for step, rank in zip(steps, victims, strict=True):
            pid = run.wait_for(step, rank, killed)
            events.append(signal_rank(run, pid, signal.SIGKILL))
            killed.append(pid)
        run.wait()
    for event in events:
        run.assert_detected(event, "exitcode: -9", range(2 if on == "two" else 1))
    assert_as_undisturbed(run, undisturbed(strategy), events=10)


@pytest.mark.parametrize(("on", "strategy"), [("one", "zero_3"), ("two", "ddp")])
def test_a_rank_that_is_stopped(
    on: str, strategy: str, workspace: Path, undisturbed: Callable[..., Run], tmp_path: Path
) -> None:
    with running(workspace, tmp_path, on, strategy=strategy) as run:
        stopped = run.wait_for(27, rank=1)
        event = signal_rank(run, stopped, signal.SIGSTOP)
        run.wait()
    node = 1 if on == "two" else 0
    run.assert_detected(event, rf"rank 1 \(process {stopped} .* state T", [node])
    run.assert_detected(event, r"furthest behind: rank 1 .* stack: \w+ \(", [node])
    assert_as_undisturbed(run, undisturbed(strategy), events=1)


@pytest.mark.parametrize(
    ("node", "seconds", "hang_timeout", "strategy"),
    [(1, 75, None, "ddp"), (0, 75, 10, "zero_2"), (1, 30, 10, "ddp")],
    ids=["one_that_is_not_first", "the_first", "for_a_short_time"],
)
def test_the_network_of_a_node_is_cut(
    node: int,
    seconds: float,
    hang_timeout: float | None,
    strategy: str,
    workspace: Path,
    undisturbed: Callable[..., Run],
    tmp_path: Path,
) -> None:
    """No connection ends: the ranks wait for each other until somebody sees that they do."""
    options = {} if hang_timeout is None else {"hang_timeout": hang_timeout}
    with running(workspace, tmp_path, "two", strategy=strategy, **options) as run:
        assert run.nodes
        run.wait_for(27, rank=0)
        event = time.time()
        run.nodes.cut(node)
        time.sleep(seconds)
        run.nodes.restore(node)
        run.wait()
    for one in range(2):
        run.assert_detected(event, rf"rank {one} .* has made no progress .* stack: \w+ \(", [one])
    assert_as_undisturbed(run, undisturbed(strategy), events=1)


LOST = "exitcode: 1|torchrun has ended and is restarted"
"""What the other node says: its rank has lost the other one, or torchrun its meeting point."""


@pytest.mark.parametrize("node", [0, 1])
def test_the_supervisor_of_a_node_is_killed_and_started_again(
    node: int, workspace: Path, undisturbed: Callable[..., Run], tmp_path: Path
) -> None:
    with running(workspace, tmp_path, "two", strategy="zero_2") as run:
        run.wait_for(27, rank=0)
        event = run.kill_supervisor(node)
        time.sleep(5)
        run.start(node)
        run.wait()
    run.assert_detected(event, LOST, [1 - node])
    assert_as_undisturbed(run, undisturbed("zero_2"), events=1)


@pytest.mark.parametrize(("strategy", "comes_back"), [("ddp", False), ("zero_2", True)])
def test_a_node_is_lost_and_the_other_goes_on_alone(
    strategy: str, comes_back: bool, workspace: Path, undisturbed: Callable[..., Run], tmp_path: Path
) -> None:
    """The same examples in every step, and the same weights but for rounding; ranks that drop out would differ."""
    seconds = 0.8 if comes_back else 0.1  # there is something left to do for a node that comes back
    with running(workspace, tmp_path, "two", strategy=strategy, dropout=0.0, seconds=seconds, min_nodes=1) as run:
        before = run.wait_for(27, rank=0)
        event = run.kill_supervisor(1)
        if comes_back:
            run.wait_for(30, rank=0, not_from=[before])
            run.start(1)
        run.wait()
    run.assert_detected(event, LOST, [0])
    expected = undisturbed(strategy, dropout=0.0)
    _, starts = history(run, 0)
    assert all(place > 0 for place in starts[1:])
    assert len(starts) == 2 + comes_back
    assert together(run) == together(expected)
    for file in ("model.safetensors", "head.safetensors"):
        weights, twins = (load_file(one.out / "model" / file) for one in (run, expected))
        for name, value in twins.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
