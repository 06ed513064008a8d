"""`evertune launch`: what it would run, what it refuses, and runs on this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from evertune.cli.launch import launch
from evertune.launch import torchrun
from evertune.launch.settings import Container, LaunchSettings, TorchrunSettings
from evertune.registry.registry import Registry
from tests.cli.test_main import CONFIG, ROOT, check_outputs, evertune
from tests.cli.test_update import CONFIG as LIVE
from tests.helpers import live_worker
from tests.helpers.lightning_modules import TEXTS, tiny_bert

GOLDEN = Path(__file__).with_name("golden") / "torchrun.txt"
FIXED: dict[str, Any] = {"python": "/opt/venv/bin/python", "processes_per_node": 8}
PATIENCE = 120.0


def prepare(folder: Path) -> None:
    """A small BERT, a file of texts and `stream.yaml`."""
    tiny_bert(folder / "bert")
    rows = [{"text": text, "label": name} for name, texts in TEXTS.items() for text in texts * 4]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "stream.yaml").write_text(CONFIG)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shown(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a dry run prints."""

    def show(where: str, *arguments: str) -> str:
        assert launch([where, "--dry_run", "--processes_per_node=2", *arguments]) == 0
        return capsys.readouterr().out

    return show


# --- what would run


def test_a_dry_run_prints_the_command_of_this_machine(shown: Callable[..., str]) -> None:
    text = shown("local", "--environment.NOTE=two words", "--setup=[umask 077]", "--", "fit", "--out", "a b")
    shell, flag, script = shlex.split(text)
    assert (shell, flag) == ("bash", "-c")
    assert script.startswith("umask 077 && export OMP_NUM_THREADS=1 && ")
    assert " && export NOTE='two words' && exec " in script
    words = shlex.split(script)[-len(shlex.split(script.partition("exec ")[2])) :]
    assert words[:3] == [sys.executable, "-m", "evertune.launch.supervisor.node"]
    assert words[words.index("--") :] == ["--", "fit", "--out", "a b"]
    assert words[words.index("--nodes") + 1] == "1"
    assert words[words.index("--processes") + 1] == "2"
    assert re.fullmatch(r"127\.0\.0\.1:\d+", words[words.index("--master") + 1])


def test_runs_on_this_machine_do_not_meet(shown: Callable[..., str]) -> None:
    texts = [shown("local", "--", "fit") for _ in range(2)]
    assert len({re.search(r"--run_id (\S+)", text)[1] for text in texts}) == 2  # type: ignore[index]
    assert len({re.search(r"--master (\S+)", text)[1] for text in texts}) == 2  # type: ignore[index]
    assert "--master 127.0.0.1:1234 " in shown("local", "--port=1234", "--", "fit")


def test_options_come_from_the_configuration_and_the_command_line(here: Path, shown: Callable[..., str]) -> None:
    (here / "a.yaml").write_text("launch: {name: base, grace: 7, environment: {A: a}, slurm: {time: '1:00'}}\nout: run")
    (here / "b.yaml").write_text("launch:\n  name: night\n  slurm: {partition: big}")
    text = shown("local", "--environment.B=b", "--", "fit", "--config", "a.yaml", "--config=b.yaml")
    assert "--run_id night-" in text
    assert " --grace 7 " in text
    assert "export A=a && export B=b && " in text


def test_a_container_has_its_own_interpreter(shown: Callable[..., str]) -> None:
    options = ["--container.image=evertune.sif", "--container.mounts=[/data, '/a:/b']"]
    text = shown("local", *options, "--", "fit")
    wrapped = "exec apptainer exec --nv --bind /data --bind /a:/b evertune.sif"
    assert f"{wrapped} python -m evertune.launch.supervisor.node " in text
    text = shown("local", *options, "--python=/opt/bin/python", "--", "fit")
    assert f"{wrapped} /opt/bin/python -m evertune.launch.supervisor.node " in text


def test_the_processes_work_under_the_lease_of_a_watch(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERTUNE_LEASE", "0123")
    assert " && export EVERTUNE_LEASE=0123 && " in shown("torchrun", "--torchrun.hosts=[a, b]", "--", "update")


def test_the_updates_of_a_watch_are_launched(shown: Callable[..., str]) -> None:
    assert " -- update --config live.yaml" not in shown("local", "--", "watch")
    assert shown("local", "--", "watch", "--watch.poll=5").rstrip().endswith("-- update --watch.poll=5'")


def golden_cases() -> dict[str, list[str]]:
    fit = ["fit", "--config", "my stream.yaml"]
    over_ssh = TorchrunSettings(hosts=["node-a", "me@node-b"], folder="/work/my project")
    by_hand = TorchrunSettings(ssh="", folder="/work")
    everything = LaunchSettings(
        **FIXED,
        name="bert",
        nodes=2,
        min_nodes=1,
        port=29400,
        environment={"NCCL_DEBUG": "WARN", "NOTE": "it's $5"},
        modules=["cuda/12.4", "apptainer"],
        setup=["source /opt/site.sh", "ulimit -n 65536"],
        container=Container(image="/images/evertune.sif", mounts=["/data", "/scratch:/tmp"]),
        log_dir="/work/logs",
        shared_folders=["/work/runs", "/data"],
        interface="ib0",
        max_restarts=5,
        hang_timeout=90,
        silence_timeout=600.5,
        grace=60,
        torchrun=over_ssh,
    )
    cases = {
        "over SSH": LaunchSettings(**FIXED, torchrun=over_ssh),
        "over SSH, with everything": everything,
        "by hand": LaunchSettings(**FIXED, nodes=2, preflight=False, torchrun=by_hand),
    }
    return {name: torchrun.lines(settings, fit, run_id="evertune-1") for name, settings in cases.items()}


def test_the_lines_for_every_node_are_the_golden_ones() -> None:
    text = "\n".join("\n".join([f"# {name}", *lines, ""]) for name, lines in golden_cases().items())
    assert text == GOLDEN.read_text()


def test_lines_to_run_by_hand_come_with_what_to_do(shown: Callable[..., str]) -> None:
    first, *rest = shown("torchrun", "--nodes=2", "--", "fit").splitlines()
    assert first == "# In all lines, replace FIRST_NODE by the name or address of the first node."
    assert rest[0] == "# Node 0 of 2:"
    assert "--node_rank 0 " in rest[1]
    assert "--master FIRST_NODE:29500 " in rest[1]
    named = shown("torchrun", "--torchrun.hosts=[a, me@b]", "--torchrun.ssh=", "--", "fit").splitlines()
    assert named[::2] == ["# Node 0 of 2, on a:", "# Node 1 of 2, on me@b:"]
    assert all("--master a:29500 " in line for line in named[1::2])


def test_without_hosts_lines_are_only_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["torchrun", "--nodes=2", "--", "fit"]) == 2
    said = capsys.readouterr()
    assert "torchrun.hosts or torchrun.hostfile must name the 2 nodes" in said.err
    assert not said.out
    assert launch(["torchrun", "--nodes=2", "--torchrun.ssh=", "--", "fit"]) == 0
    assert capsys.readouterr().out.count("\nbash -c ") == 2


# --- hosts


@pytest.mark.parametrize(
    ("content", "hosts", "processes"),
    [
        ("a\nb\n", ["a", "b"], 3),
        ("# cluster\n\na slots=4  # old\nuser@b   slots = 4\n", ["a", "user@b"], 4),
    ],
)
def test_a_hostfile(tmp_path: Path, content: str, hosts: list[str], processes: int) -> None:
    (tmp_path / "hosts").write_text(content)
    given = None if "slots" in content else 3
    settings = LaunchSettings(
        processes_per_node=given, torchrun=TorchrunSettings(hostfile=str(tmp_path / "hosts"), folder="/work")
    )
    settings, found = torchrun.nodes_of(settings)
    assert (found, settings.nodes, settings.processes) == (hosts, len(hosts), processes)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("a slots=2\nb slots=4", {}, "slots must be the same for all hosts, got "),
        ("a slots=2\nb", {}, "slots must be the same for all hosts, got "),
        ("a slots=2", {"processes_per_node": 8}, "slots=2, got 8"),
        ("a cores=2", {}, "a line must be `name` or `name slots=8`, got 'a cores=2'"),
        ("a slots=0", {}, "got 'a slots=0'"),
        ("# nobody", {}, "names no host"),
        ("a\nb\na", {}, "each host must be named once, got a more than once"),
        ("a\nb", {"nodes": 3}, "nodes must be the number of hosts, 2, got 3"),
    ],
)
def test_a_bad_hostfile_is_refused(tmp_path: Path, content: str, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "hosts").write_text(content)
    hostfile = TorchrunSettings(hostfile=str(tmp_path / "hosts"))
    with pytest.raises(ValueError, match=re.escape(message)):
        torchrun.nodes_of(LaunchSettings(**settings, torchrun=hostfile))


# --- what is refused

REFUSED = {
    "cloud -- fit": "WHERE must be one of local, torchrun, slurm, kubernetes, got 'cloud'",
    "local": "the command to launch must follow `--`, as in `evertune launch local -- fit --config stream.yaml`",
    "local --": "the command to launch must follow `--`",
    "local fit --config a.yaml": "the command to launch must follow `--`",
    "local -- registry list": "the command must be one of fit, update, watch, got 'registry'",
    "local --nodes=2 -- fit": "nodes must be 1 on this machine, got 2",
    "local --nodes=2 -- watch --config good.yaml": "nodes must be 1 on this machine, got 2",
    "local --nodes=0 -- fit": "nodes must be positive, got 0",
    "local --nodse=1 -- fit": "--nodse",
    "local -- fit --config missing.yaml": "missing.yaml: ",
    "local -- fit -c unknown.yaml": "section `launch` of the configuration: Option 'nodse' is not accepted",
    "local -- fit -c inner.yaml": "Group 'slurm' does not accept option 'tme'",
    "local -- fit -c typed.yaml": 'key "nodes":',
    "local -- fit -c flat.yaml": "the section `launch` must be a mapping, got 3",
    "local --container.image=a --container.runtime=pyxis -- fit": "'pyxis' is part of SLURM: use 'apptainer'",
    "torchrun --torchrun.hostfile=missing -- fit": "torchrun.hostfile cannot be read: ",
    "torchrun --torchrun.hostfile=a --torchrun.hosts=[a] -- fit": "must not both be given",
    "torchrun --torchrun.hosts=[a,b] --torchrun.ssh=/no/such/ssh -- fit": "No such file or directory: '/no/such/ssh'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_work_is_refused(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, section in {
        "good": "{}",
        "unknown": "{nodse: 3}",
        "inner": "{slurm: {tme: 3}}",
        "typed": "{nodes: many}",
        "flat": "3",
    }.items():
        (here / f"{name}.yaml").write_text(f"launch: {section}")
    try:
        code: Any = launch(shlex.split(line.replace(" -- ", " --processes_per_node=1 -- ")))
    except SystemExit as end:
        code = end.code
    message = capsys.readouterr().err if isinstance(code, int) else code
    assert code != 0
    assert REFUSED[line] in message
    assert message.startswith("evertune launch")
    assert not (here / "evertune-logs").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch([]) == launch(["--help"]) == 0
    assert "kubernetes  a JobSet" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        launch(["slurm", "--help"])
    text = capsys.readouterr().out
    assert "--slurm.partition" in text
    assert "--kubernetes.image" not in text


# --- on this machine

SUPERVISOR = """#!/bin/sh
trap 'echo INT >> signals' INT; trap 'echo USR2 >> signals' USR2; trap 'echo TERM >> signals; exit 75' TERM
env > environment
echo $$ > pid
while ! [ -e code ]; do sleep 0.05; done
exit $(cat code)
"""


@pytest.fixture
def supervisor(here: Path) -> list[str]:
    """Options for a supervisor that only takes notes."""
    script = here / "supervisor"
    script.write_text(SUPERVISOR)
    script.chmod(0o755)
    return [f"--python={script}", "--processes_per_node=1"]


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_exit_code_of_this_machine_is_the_supervisors(here: Path, supervisor: list[str], code: int) -> None:
    (here / "code").write_text(str(code))
    assert launch(["local", *supervisor, "--environment.NOTE=two words", "--", "update"]) == code
    environment = (here / "environment").read_text().splitlines()
    assert {"NOTE=two words", "OMP_NUM_THREADS=1"} <= set(environment)


def test_signals_pass_through_to_the_supervisor(here: Path, supervisor: list[str]) -> None:
    notes = here / "signals"

    def send() -> None:
        until((here / "pid").exists)
        for name in ("USR2", "INT"):
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
            until(lambda name=name: notes.exists() and name in notes.read_text())  # type: ignore[misc]
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert launch(["local", *supervisor, "--", "fit"]) == 75
    sender.join()
    assert notes.read_text().split() == ["USR2", "INT", "TERM"]


def test_a_launch_ends_with_the_watch_that_made_it(
    here: Path, supervisor: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = os.pipe()
    monkeypatch.setenv("EVERTUNE_SUPERVISOR", str(theirs))

    def die() -> None:
        until((here / "pid").exists)
        os.close(ours)

    watch = threading.Thread(target=die)
    watch.start()
    assert launch(["local", *supervisor, "--", "update"]) == 75
    watch.join()
    os.close(theirs)
    assert "EVERTUNE_SUPERVISOR" not in (here / "environment").read_text()
    assert (here / "signals").read_text().split() == ["TERM"]


def test_a_supervisor_ends_with_a_launcher_that_is_killed(here: Path, supervisor: list[str]) -> None:
    launch_it = multiprocessing.get_context("fork").Process(target=launch, args=(["local", *supervisor, "--", "fit"],))
    launch_it.start()
    until(lambda: (here / "pid").exists() and bool((here / "pid").read_text()))
    launch_it.kill()
    launch_it.join()
    until(lambda: not Path(f"/proc/{(here / 'pid').read_text().strip()}").exists())


@pytest.mark.slow
def test_two_processes_learn_a_stream(tmp_path: Path) -> None:
    prepare(tmp_path)
    settings = ["--config", "stream.yaml", "--trainer.strategy=ddp", "--data.batch_size=2"]
    done = evertune(tmp_path, "launch", "local", "--processes_per_node=2", "--", "fit", *settings)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("report: run/report.html") == 1
    check_outputs(tmp_path / "run")


class Watching:
    """`evertune launch local -- watch` of a registry, as a service."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        options = ["--config=live.yaml", "--trainer.strategy=ddp", "--trainer.max_epochs=40"]
        options += ["--update.checkpoint_every_n_steps=10", "--watch.poll=0.5", "--watch.log=json"]
        command = ["launch", "local", "--processes_per_node=2", "--preflight=false", "--", "watch", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "evertune", *command],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stderr=log,
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in map(json.loads, lines) if line["event"] == name]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 4 * PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-6000:]
            time.sleep(0.05)

    def launcher(self) -> int:
        """The process that launches an update."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


def ranks(folder: Path) -> list[int]:
    """The processes that train in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"evertune.cli.worker" in (process / "cmdline").read_bytes() and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_watch_launches_its_updates_and_starts_those_that_are_preempted_again(tmp_path: Path) -> None:
    live_worker.prepare(tmp_path)
    live_worker.feed(tmp_path, "a", ["business", "sport"], n=60)
    (tmp_path / "live.yaml").write_text(LIVE)
    checkpoints = tmp_path / "registry" / "staging" / "checkpoints"
    watch = Watching(tmp_path)
    try:
        watch.until(lambda: any(checkpoints.glob("*")))
        assert ranks(tmp_path)
        os.kill(watch.launcher(), signal.SIGUSR2)
        watch.until(lambda: bool(watch.events("updated")))
        assert watch.events("updated")[0]["outcome"] == "interrupted"
        assert watch.log.read_text().count("asked to stop, saved step") == 1
        watch.until(lambda: bool(watch.events("promotion")))
        assert not watch.events("error")
        assert len(watch.events("update")) == 2

        live_worker.feed(tmp_path, "b", ["politics", "sport"], n=40)
        watch.until(lambda: any(checkpoints.glob("*")))
        watch.process.terminate()
        assert watch.process.wait(PATIENCE) == 0
        until(lambda: not ranks(tmp_path))
        assert any(checkpoints.glob("*"))
        assert watch.events("updated")[-1]["outcome"] == "interrupted"
        assert watch.log.read_text().count("asked to stop, saved step") == 2

        watch = Watching(tmp_path)
        watch.until(lambda: bool(watch.events("promotion")))
        assert not watch.events("error")
        os.kill(watch.process.pid, signal.SIGINT)
        assert watch.process.wait(PATIENCE) == 0
        assert Registry(tmp_path / "registry").aliases["production"] == 2
    finally:
        watch.process.kill()
        watch.process.wait()
    until(lambda: not ranks(tmp_path))
