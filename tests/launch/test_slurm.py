"""``evertune launch slurm``: its scripts byte for byte, and what becomes of them on a real cluster."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evertune.launch import slurm
from evertune.launch.settings import Container, LaunchSettings, SlurmSettings
from evertune.metrics.history import load_history
from evertune.registry.registry import Registry
from tests.cli.test_update import CONFIG as LIVE
from tests.helpers.lightning_modules import TEXTS, tiny_bert
from tests.helpers.live_worker import feed, prepare
from tests.helpers.slurm_cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
FIT = ["fit", "--config", "stream.yaml"]
SCRIPTS: dict[str, LaunchSettings] = {
    "plain": LaunchSettings(
        nodes=2, processes_per_node=8, python="python", slurm=SlurmSettings(time="1-12:00:00", partition="normal")
    ),
    "modules": LaunchSettings(
        name="nightly",
        nodes=2,
        min_nodes=1,
        processes_per_node=2,
        python="python",
        modules=["cuda/12.4", "gcc/13"],
        setup=["source /opt/venv/bin/activate"],
        environment={"HF_HOME": "/data/two words"},
        shared_folders=["/data"],
        interface="ib0",
        log_dir="logs",
        grace=60.5,
        slurm=SlurmSettings(
            time="90",
            account="research",
            qos="high",
            gpus_per_node=0,
            cpus_per_task=16,
            memory="64G",
            options={"comment": "two words", "exclusive": ""},
            requeue=False,
        ),
    ),
    "apptainer": LaunchSettings(
        nodes=2, processes_per_node=8, container=Container(image="images/evertune.sif", mounts=["/data", "/models:/m"])
    ),
    "pyxis": LaunchSettings(
        nodes=2,
        processes_per_node=8,
        container=Container(image="evertune:latest", runtime="pyxis", mounts=["/data", "/models:/m"]),
        slurm=SlurmSettings(cpus_per_task=32),
    ),
    "array": LaunchSettings(
        processes_per_node=1,
        python="python",
        preflight=False,
        slurm=SlurmSettings(
            seeds=[0, 1],
            sweep={"model.init_args.learning_rate": [1e-5, 0.01], "data.scenario": ["it's $HOME", None]},
            parallel=2,
        ),
    ),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    running = SlurmCluster()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stream.yaml").write_text("out: runs/nightly\n")


@pytest.fixture
def here(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, for commands that this process runs."""
    for name in set(os.environ) - set(cluster.environment):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setattr(slurm, "_POLL", 0.2)
    return cluster


# --- scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name: str) -> None:
    golden = Path(__file__).with_name("golden") / f"slurm-{name}.sbatch"
    assert slurm.script(SCRIPTS[name], FIT) == golden.read_text()
    subprocess.run(["bash", "-n", golden], check=True)


def test_dry_run_prints_the_script_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm.run(SCRIPTS["plain"], FIT, dry_run=True, wait=True) == 0
    assert capsys.readouterr().out == slurm.script(SCRIPTS["plain"], FIT)
    assert [path.name for path in Path().iterdir()] == ["stream.yaml"]


def test_no_gpus_are_asked_for_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("slurm", "settings"):
        monkeypatch.setattr(f"evertune.launch.{module}.gpu_count", lambda: 0)
    assert "gpus" not in slurm.script(LaunchSettings(), FIT)
    for module in ("slurm", "settings"):
        monkeypatch.setattr(f"evertune.launch.{module}.gpu_count", lambda: 4)
    assert "\n#SBATCH --gpus-per-node=4\n" in slurm.script(LaunchSettings(), FIT)


@pytest.mark.parametrize(
    ("command", "out"),
    [
        (FIT, "runs/nightly"),
        (["fit", "--config=stream.yaml", "--out", "there/"], "there"),
        (["fit", "--config=stream.yaml", "--out=there"], "there"),
        (["fit", "--config", "stream.yaml", "--config", "more.yaml"], "more"),
        (["fit"], "evertune-run"),
    ],
)
def test_each_run_of_an_array_has_a_folder_of_its_own(command: list[str], out: str) -> None:
    Path("more.yaml").write_text("out: more\n")
    folders = re.findall(r"--out=([^ )]+)\)", slurm.script(LaunchSettings(slurm=SlurmSettings(seeds=[3, 5])), command))
    assert folders == [f"{out}/0-seed=3", f"{out}/1-seed=5"]


@pytest.mark.parametrize(
    ("settings", "command", "message"),
    [
        ({"name": "a/b"}, FIT, "name must be letters, digits and `.+-_`, as it is part of file names, got 'a/b'"),
        (
            {"port": 65000},
            FIT,
            "port must be at most 64536, as each job uses one of the 1000 ports from there on, got 65000",
        ),
        ({"slurm": {"gpus_per_node": -1}}, FIT, "slurm.gpus_per_node must be at least 0, got -1"),
        ({"slurm": {"cpus_per_task": 0}}, FIT, "slurm.cpus_per_task must be at least 1, got 0"),
        ({"slurm": {"seeds": [1], "parallel": 0}}, FIT, "slurm.parallel must be at least 1, got 0"),
        ({"slurm": {"parallel": 2}}, FIT, "slurm.parallel limits an array: give slurm.seeds or slurm.sweep with it"),
        (
            {"slurm": {"time": "an hour"}},
            FIT,
            "slurm.time must be as in '90' (minutes), '12:00:00' or '1-12:00",
        ),
        ({"slurm": {"time": "3"}}, FIT, "slurm.time must be longer than grace=120 and 60 seconds, got '3': SLURM may"),
        (
            {"slurm": {"options": {"array": "0-3"}}},
            FIT,
            "slurm.options must not set 'array', which follows from `slurm.seeds` and",
        ),
        (
            {"slurm": {"sweep": {"data.n": []}}},
            FIT,
            "slurm.sweep must have at least one value for 'data.n', got an empty list",
        ),
        (
            {"slurm": {"seeds": [1]}},
            ["update"],
            "slurm.seeds and slurm.sweep are for `fit` only, got 'update': a registry",
        ),
    ],
)
def test_what_makes_no_job_is_refused(settings: dict[str, Any], command: list[str], message: str) -> None:
    made = LaunchSettings(**{**settings, "slurm": SlurmSettings(**settings.get("slurm", {}))})
    with pytest.raises(ValueError, match=re.escape(message)):
        slurm.script(made, command)


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="sbatch is not on the PATH"):
        slurm.run(SCRIPTS["plain"], FIT, dry_run=False, wait=False)


# --- on a cluster, with a program in the place of the supervisor


def program(what: str) -> str:
    """An executable: it records that it was started and goes on with some lines of Python."""
    path = Path("supervisor").absolute()
    path.write_text(
        f"""#!{sys.executable} -IS
import json, os, signal, sys, time
node, attempt = int(os.environ["SLURM_NODEID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
task = os.environ.get("SLURM_ARRAY_TASK_ID")
def record(**facts):
    with open("records", "a") as file:
        file.write(json.dumps(dict(node=node, attempt=attempt, task=task, **facts)) + "\\n")
def wait_for(*numbers):
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    record(waits=True)
    record(signal=signal.Signals(signal.sigwait(numbers)).name)
record(arguments=sys.argv[1:])
{what}
"""
    )
    path.chmod(0o755)
    return str(path)


def settings(what: str, **others: Any) -> LaunchSettings:
    chosen = others.pop("slurm", {})
    return LaunchSettings(
        processes_per_node=2, python=program(what), slurm=SlurmSettings(gpus_per_node=0, **chosen), **others
    )


def records(key: str) -> list[dict[str, Any]]:
    path = Path("records")
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if key in record]


def until(reached: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def submitted(capsys: pytest.CaptureFixture[str]) -> str:
    """The number of the job that was submitted."""
    match = re.match(r"job (\d+): ", capsys.readouterr().out)
    assert match
    return match[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_slurm_takes_every_script(name: str, here: SlurmCluster) -> None:
    file = Path("job.sbatch")
    file.write_text(slurm.script(SCRIPTS[name], FIT))
    here.run("sbatch", "--test-only", str(file))


def test_one_supervisor_on_each_node(here: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    what = "print(os.environ['NOTE'], flush=True); sys.exit(3 if node == 0 else 0)"
    command = [*FIT, "--data.source", "it's $HOME", "--seed_everything=1"]
    made = settings(what, nodes=2, environment={"NOTE": "two words"}, slurm={"options": {"comment": "two words"}})
    assert slurm.run(made, command, dry_run=False, wait=True) == 3
    told = capsys.readouterr().out.splitlines()
    job = re.fullmatch(r"job (\d+): (evertune-logs/evertune-.*\.sbatch)", told[0])
    assert job
    assert told[1:3] == [f"  squeue --jobs {job[1]}", f"  tail -F evertune-logs/evertune-{job[1]}.out"]
    assert told[-1] == f"job {job[1]}: FAILED (NonZeroExitCode)"
    assert Path(job[2]).read_text() == slurm.script(made, command)
    assert "Comment=two words" in here.run("scontrol", "show", "job", job[1])
    assert Path(f"evertune-logs/evertune-{job[1]}.out").read_text().count("two words\n") == 2
    started = sorted(records("arguments"), key=lambda record: record["node"])
    for node, record in enumerate(started):
        expected = made.node_command(command, node_rank=str(node), master="127.0.0.1", run_id=f"evertune-{job[1]}-0")
        expected[expected.index("--master") + 1] = f"127.0.0.1:{29500 + int(job[1])}"
        assert record["arguments"] == expected[1:]
    assert len(started) == 2


def test_a_preempted_job_goes_on(here: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    what = "wait_for(signal.SIGUSR2, signal.SIGTERM) if attempt == 0 else None; sys.exit(4 if attempt else 75)"
    assert slurm.run(settings(what, nodes=2), FIT, dry_run=False, wait=False) == 0
    job = submitted(capsys)
    until(lambda: len(records("waits")) == 2)
    here.run("scancel", "--signal=USR2", job)
    assert slurm._wait(job) == 4
    assert [record["signal"] for record in records("signal")] == ["SIGUSR2"] * 2
    assert sorted(record["attempt"] for record in records("arguments")) == [0, 0, 1, 1]
    ids = {words[words.index("--run_id") + 1] for words in (record["arguments"] for record in records("arguments"))}
    assert ids == {f"evertune-{job}-0", f"evertune-{job}-1"}


def test_a_cancelled_job_stays_cancelled(here: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    made = settings("wait_for(signal.SIGTERM); time.sleep(0.5); sys.exit(75)", nodes=2)
    assert slurm.run(made, FIT, dry_run=False, wait=False) == 0
    job = submitted(capsys)
    until(lambda: len(records("waits")) == 2)
    here.run("scancel", job)
    assert slurm._wait(job) == 75
    assert here.job(job)["JobState"] == "CANCELLED"
    assert [record["signal"] for record in records("signal")] == ["SIGTERM"] * 2
    assert (
        "srun: error: 127.0.0.2: task 1: Exited with exit code 75"
        in Path(f"evertune-logs/evertune-{job}.out").read_text()
    )


def test_a_job_that_is_cancelled_in_the_queue_is_no_success(
    here: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm.run(settings("", slurm={"options": {"hold": ""}}), FIT, dry_run=False, wait=False) == 0
    job = submitted(capsys)
    here.run("scancel", job)
    assert slurm._wait(job) == 1
    assert records("arguments") == []


def test_sigterm_cancels_the_job_that_is_waited_for(here: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        until(lambda: len(records("waits")) == 1 and signal.getsignal(signal.SIGTERM) is not before)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert slurm.run(settings("wait_for(signal.SIGTERM); sys.exit(1)"), FIT, dry_run=False, wait=True) == 1
    thread.join()
    assert here.job(submitted(capsys))["JobState"] == "CANCELLED"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_an_array_of_seeds_and_values(here: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    what = """
if attempt == 0 and task in ("1", "2"):
    os.kill(os.getpid(), signal.SIGUSR2 if task == "1" else signal.SIGTERM)  # too early: nobody handles it
sys.exit(int(task))
"""
    sweep = {"model.init_args.name": ["it's $HOME", [1, "two"]]}
    made = settings(what, slurm={"seeds": [7, 8], "sweep": sweep, "parallel": 3})
    assert slurm.run(made, FIT, dry_run=False, wait=True) == 3
    job = submitted(capsys)
    runs = {int(record["task"]): record["arguments"] for record in records("arguments")}
    command = {task: words[words.index("--") + 1 :] for task, words in runs.items()}
    assert sorted(command) == [0, 1, 2, 3]
    assert command[0] == [
        *FIT,
        "--seed_everything=7",
        "--model.init_args.name=it's $HOME",
        "--out=runs/nightly/0-seed=7-name=it_s_HOME",
    ]
    assert command[3][3:5] == ["--seed_everything=8", '--model.init_args.name=[1, "two"]']
    again = [record["task"] for record in records("arguments") if record["attempt"] == 1]
    assert sorted(again) == ["1", "2"]  # and no other
    ports = {words[words.index("--master") + 1] for words in runs.values()}
    assert len(ports) == 4
    assert {path.name for path in Path("evertune-logs").glob("*.out")} == {f"evertune-{job}_{n}.out" for n in range(4)}


def test_what_slurm_refuses_is_told(here: SlurmCluster, capfd: pytest.CaptureFixture[str]) -> None:
    made = settings("", slurm={"partition": "none"})
    assert slurm.run(made, FIT, dry_run=False, wait=True) == 1
    assert "invalid partition specified: none" in capfd.readouterr().err


@pytest.mark.slow
def test_a_more_urgent_job_takes_the_nodes(here: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    what = "wait_for(signal.SIGTERM) if attempt == 0 else None; time.sleep(1); sys.exit(0 if attempt else 75)"
    assert slurm.run(settings(what, nodes=2), FIT, dry_run=False, wait=False) == 0
    job = submitted(capsys)
    until(lambda: len(records("waits")) == 2)
    here.run("sbatch", "-p", "urgent", "--nodes=2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    assert slurm._wait(job) == 0
    assert here.job(job)["Restarts"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("requeue", [True, False])
def test_before_its_time_is_up_a_job_is_asked_to_save(
    requeue: bool, here: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    what = "wait_for(signal.SIGUSR2) if attempt == 0 else None; sys.exit(0 if attempt else 75)"
    made = settings(what, nodes=2, grace=30.0, slurm={"time": "2", "requeue": requeue})
    assert slurm.run(made, FIT, dry_run=False, wait=True) == (0 if requeue else 75)
    assert here.job(submitted(capsys))["Restarts"] == str(int(requeue))


@pytest.mark.slow
def test_with_min_nodes_the_job_outlives_a_node(here: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    what = "record(waits=True); time.sleep(100 if node else 15); record(done=True)"
    assert slurm.run(settings(what, nodes=2, min_nodes=1), FIT, dry_run=False, wait=False) == 0
    job = submitted(capsys)
    until(lambda: len(records("waits")) == 2)
    try:
        here.run("scontrol", "update", "NodeName=127.0.0.2", "State=DOWN", "Reason=test")
        time.sleep(5)
        assert here.job(job)["JobState"] == "RUNNING"
        slurm._wait(job)
        assert [record["node"] for record in records("done")] == [0]
        assert here.job(job)["Restarts"] == "0"
    finally:
        here.run("scontrol", "update", "NodeName=127.0.0.2", "State=RESUME", check=False)  # it may have come back


# --- on a cluster, with training

STREAM = """
seed_everything: 0
out: undisturbed
checkpoint_every_n_steps: 10
model:
  class_path: evertune.lightning_modules.SequenceClassificationModule
  init_args: {model_name_or_path: bert, dropout: 0.1, learning_rate: 0.001}
data:
  source: rows.jsonl
  scenario: class_incremental
  n_experiences: 3
  class_order: [business, sport, politics]
  batch_size: 2
trainer:
  max_epochs: 8
  accelerator: cpu
  strategy: evertune_deepspeed_stage_2
  callbacks:
    - class_path: evertune.callbacks.Replay
      init_args: {memory_size: 6}
    - class_path: evertune.callbacks.EWC
      init_args: {ewc_lambda: 10.0, n_examples: 8}
    - class_path: tests.helpers.slurm_worker.SlowWhile
      init_args: {file: slow}
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
launch:
  nodes: 2
  processes_per_node: 1
  interface: lo
  hang_timeout: 300
  shared_folders: [.]
  slurm: {gpus_per_node: 0}
"""


def evertune(cluster: SlurmCluster, folder: Path, *arguments: str, code: int = 0) -> str:
    """What a command of evertune in a folder prints."""
    done = subprocess.run(
        [sys.executable, "-m", "evertune", *arguments],
        cwd=folder,
        env=cluster.environment | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(path.read_text()[-8000:] for path in folder.glob("evertune-logs/*.out"))
    assert done.returncode == code, done.stdout + done.stderr + logs
    return done.stdout


def bits(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def fitted(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a ``fit`` has run on two nodes, undisturbed."""
    folder = tmp_path_factory.mktemp("fitted")
    tiny_bert(folder / "bert")
    rows = [{"text": text, "label": name} for name, texts in TEXTS.items() for text in texts * 20]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "stream.yaml").write_text(STREAM)
    evertune(cluster, folder, "launch", "slurm", "--wait", "--", *FIT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a signal", "its time is up", "killed"])
def test_a_disturbed_fit_ends_in_the_same_bits(how: str, fitted: Path, cluster: SlurmCluster) -> None:
    out = fitted / how.replace(" ", "-")
    launch = ["launch", "slurm", "--preflight", "false", "--", *FIT, "--out", out.name]
    match = re.search(r"^job (\d+): ", evertune(cluster, fitted, *launch), re.MULTILINE)
    assert match
    job, log = match[1], fitted / "evertune-logs" / f"evertune-{match[1]}.out"
    until((out / "run" / "state-1").is_dir, timeout=600)
    slow = fitted / "slow"
    slow.touch()
    until(lambda: [*out.glob("run/checkpoints-*/step-*")], timeout=120)  # not "**": folders may vanish meanwhile
    if how == "a signal":
        cluster.run("scancel", "--signal=USR2", job)
    elif how == "killed":
        cluster.run("scancel", "--signal=KILL", job)
    else:
        minutes = next(int(part) for part in cluster.job(job)["RunTime"].split(":")[1:2])
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 1}")
    if how == "killed":
        cluster.wait_for(job, "CANCELLED")
        slow.unlink()
        evertune(cluster, fitted, "launch", "slurm", "--preflight", "false", "--wait", *launch[4:])
    else:
        cluster.wait_for(job, "PENDING", timeout=300)
        assert "asked to stop, saved step" in log.read_text()
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
        slow.unlink()
        cluster.wait_for(job, "COMPLETED", "FAILED", timeout=600)
        assert (cluster.job(job)["ExitCode"], cluster.job(job)["Restarts"]) == ("0:0", "1"), log.read_text()
    assert bits(out / "model") == bits(fitted / "undisturbed" / "model")
    mine, theirs = (load_history(folder / "history.json")["run"] for folder in (out, fitted / "undisturbed"))
    assert str(mine.accuracy_matrix) == str(theirs.accuracy_matrix)
    assert mine.memory == theirs.memory


@pytest.mark.slow
def test_an_update_passes_its_exit_code_on(tmp_path: Path, cluster: SlurmCluster) -> None:
    prepare(tmp_path)
    feed(tmp_path, "a", ["business", "sport"], n=60)
    (tmp_path / "live.yaml").write_text(LIVE)
    options = ["--nodes=2", "--processes_per_node=1", "--slurm.gpus_per_node=0", "--interface=lo", "--preflight=false"]
    launch = ["launch", "slurm", *options, "--wait", "--", "update", "--config", "live.yaml", "--trainer.strategy=ddp"]
    evertune(cluster, tmp_path, *launch)
    assert Registry(tmp_path / "registry").aliases == {"production": 1}
    evertune(cluster, tmp_path, *launch, code=3)
    feed(tmp_path, "b", ["politics", "sport"], n=40)
    evertune(cluster, tmp_path, *launch, "--gate.min_accuracy=1.0", code=4)
    assert Registry(tmp_path / "registry").aliases == {"production": 1, "refused": 2}
