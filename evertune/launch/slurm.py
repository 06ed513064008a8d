"""``evertune launch slurm``: a job that is requeued until it is complete, or an array of such jobs."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evertune.launch.local import forwarded
from evertune.launch.settings import config_files, shell_words
from evertune.launch.shell import contained, preamble
from evertune.utils.gpus import gpu_count
from evertune.utils.processes import PREEMPTED

if TYPE_CHECKING:
    from evertune.launch.settings import Container, LaunchSettings

_OWN = {
    "array": "`slurm.seeds` and `slurm.sweep`",
    "nodes": "`nodes`",
    "ntasks": "`nodes`: one supervisor runs on each",
    "ntasks-per-node": "`processes_per_node`: one supervisor runs on each node and starts them",
    "output": "`log_dir`",
    "signal": "`grace`",
}
"""Options of sbatch that evertune sets itself, and the settings from which it derives them."""

_ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "PREEMPTED",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "BOOT_FAIL",
}
_POLL = 5.0  # seconds between two requests for the state of a job
_EARLY = 60  # seconds: SLURM may send a signal this much earlier than requested
_PORTS = 1000  # a job uses one of this many ports, from `port` on, so that two jobs can share a node


def run(settings: LaunchSettings, command: Sequence[str], *, dry_run: bool, wait: bool) -> int:
    """Submit a job to SLURM.

    With ``wait``, SIGTERM and SIGINT cancel the job; SIGUSR2 is forwarded to it, so that it saves and is requeued.

    Args:
        settings: Settings of the launch.
        command: Command of every rank.
        dry_run: Only print the script.
        wait: Wait until the job has ended for good, however often it is requeued.

    Returns:
        With ``wait`` the exit code of the job (the highest of an array), else 0; the exit code of sbatch if SLURM
        rejects the job.

    Raises:
        ValueError: If the settings are invalid, or sbatch is not installed.
    """
    text = script(settings, command)
    if dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on the PATH: start this where SLURM is, or print the job with --dry_run")
    folder = Path(settings.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{settings.name}-{datetime.now():%Y%m%d-%H%M%S-%f}.sbatch"
    file.write_text(text)
    submitted = subprocess.run(["sbatch", "--parsable", file], stdout=subprocess.PIPE, text=True, check=False)
    if submitted.returncode != 0:
        return submitted.returncode
    job = submitted.stdout.strip().partition(";")[0]  # the name of the cluster may follow
    output = folder / f"{settings.name}-{job}{'_*' if _is_array(settings) else ''}.out"
    print(f"job {job}: {file}\n  squeue --jobs {job}\n  tail -F {output}", flush=True)
    return _wait(job) if wait else 0


def script(settings: LaunchSettings, command: Sequence[str]) -> str:
    """The batch script.

    Args:
        settings: Settings of the launch.
        command: Command of every rank.

    Raises:
        ValueError: If the settings are invalid for SLURM.
    """
    _check(settings, command)
    array = _is_array(settings)
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if array else "$SLURM_JOB_ID"
    cases = (f"    {index}) run=({shlex.join(words)}) ;;" for index, words in enumerate(_runs(settings, command)))
    # A shell on each node expands the variables of its own task, such as $SLURM_NODEID. The command is passed to it as
    # arguments, so that nothing in the command is expanded twice.
    on_node = shlex.quote(f'exec {_supervisor(settings)} "$@"')
    again = (
        "# It has saved, or got SIGUSR2 or SIGTERM before it could. A cancelled job is not requeued.",
        f'case "$code" in {PREEMPTED} | 140 | 143) scontrol requeue Incomplete "{job}" ;; esac',
    )
    lines = [
        "#!/bin/bash",
        *_head(settings),
        "",
        *preamble(settings),
        "",
        *(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", ""] if array else []),
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f'export EVERTUNE_MASTER="$first:$(({settings.port} + SLURM_JOB_ID % {_PORTS}))"',
        # A restart is a run of its own: no supervisor of the last one may join its rendezvous.
        f'export EVERTUNE_RUN_ID="$SLURM_JOB_NAME-{job}-${{SLURM_RESTART_COUNT:-0}}"',
        "",
        "trap : TERM USR2  # the supervisors get these signals too; this shell waits for them",
        " \\\n    ".join([*map(shell_words, _srun(settings)), ""]) + f"sh -c {on_node} sh \\",
        f"    {shlex.join(command)}" + (' "${run[@]}"' if array else ""),
        "code=$?",
        *(again if settings.slurm.requeue else ()),
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _head(settings: LaunchSettings) -> Iterator[str]:
    """The ``#SBATCH`` lines."""
    slurm, array = settings.slurm, _is_array(settings)
    gpus = slurm.gpus_per_node
    options: dict[str, Any] = {
        "job-name": settings.name,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": (_gpus(settings) if gpus is None else gpus) or None,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "output": f"{settings.log_dir}/%x-{'%A_%a' if array else '%j'}.out",
        "open-mode": "append",  # a requeued job continues its log
        "requeue" if slurm.requeue else "no-requeue": "",
        # With min_nodes, the job must survive the loss of a node.
        "no-kill": None if settings.min_nodes is None else "",
        "signal": f"USR2@{math.ceil(settings.grace)}",
        "array": _indices(settings) if array else None,
    }
    for name, value in (options | slurm.options).items():
        if value is not None:
            yield f"#SBATCH --{name}" + (f"={shlex.quote(str(value))}" if str(value) else "")


def _gpus(settings: LaunchSettings) -> int:
    """Default number of GPUs of a node: one for each process, unless the processes run on CPUs."""
    if settings.processes_per_node is not None:
        return settings.processes_per_node
    return settings.processes if gpu_count() else 0


def _srun(settings: LaunchSettings) -> Iterator[list[str]]:
    """The srun command that starts the supervisors, in one or two lines.

    ``--kill-on-bad-exit=0 --wait=0``: srun must not end the other supervisors when one ends.
    """
    words = ["srun", "--ntasks=$SLURM_NNODES", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"]
    if settings.slurm.cpus_per_task is not None:
        words.append(f"--cpus-per-task={settings.slurm.cpus_per_task}")  # srun does not take it from the job
    if settings.min_nodes is not None:
        words.append("--no-kill")
    yield words
    if (container := _in_pyxis(settings)) is not None:
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in ["$PWD", *container.mounts]]
        image = f"--container-image={container.image}"
        yield [image, f"--container-mounts={','.join(mounts)}", "--container-workdir=$PWD"]


def _in_pyxis(settings: LaunchSettings) -> Container | None:
    container = settings.container
    return container if container is not None and container.runtime == "pyxis" else None


def _supervisor(settings: LaunchSettings) -> str:
    """The supervisor's command line, without the command of the ranks, with one option per line."""
    words = settings.node_command([], node_rank="$SLURM_NODEID", master="$EVERTUNE_MASTER", run_id="$EVERTUNE_RUN_ID")
    words[words.index("--master") + 1] = "$EVERTUNE_MASTER"  # the port is part of it
    if _in_pyxis(settings):  # srun starts the container, in which this machine's interpreter does not exist
        words[0] = "python" if words[0] == sys.executable else words[0]
    else:
        words = contained(settings, words)
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([word])
        else:
            lines[-1].append(word)
    return " \\\n        ".join(map(shell_words, lines))


def _is_array(settings: LaunchSettings) -> bool:
    return bool(settings.slurm.seeds or settings.slurm.sweep)


def _combinations(settings: LaunchSettings) -> list[dict[str, Any]]:
    """The settings of each run of an array, by name: all combinations of the seeds and of the swept values."""
    axes: dict[str, list[Any]] = {"seed_everything": settings.slurm.seeds} if settings.slurm.seeds else {}
    axes |= settings.slurm.sweep
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _indices(settings: LaunchSettings) -> str:
    parallel = settings.slurm.parallel
    return f"0-{len(_combinations(settings)) - 1}" + (f"%{parallel}" if parallel else "")


def _runs(settings: LaunchSettings, command: Sequence[str]) -> Iterator[list[str]]:
    """The arguments of each run of an array: the values that it sets, and its own output folder."""
    out = _out(command)
    for index, chosen in enumerate(_combinations(settings)):
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in chosen.items()}
        parts = [f"{key.rpartition('.')[2].removesuffix('_everything')}={text}" for key, text in texts.items()]
        # The index keeps names apart that are equal after this; 100 characters are short enough for a file name.
        name = re.sub(r"[^\w.=+-]+", "_", "-".join([str(index), *parts]))[:100]
        yield [*(f"--{key}={text}" for key, text in texts.items()), f"--out={out}/{name}"]


def _out(command: Sequence[str]) -> str:
    """The output folder of a ``fit``, found as its own parser finds it: default, configuration, option."""
    out = "evertune-run"
    for file in config_files(command):
        content = yaml.safe_load(file.read_text())
        if isinstance(content, Mapping):
            out = content.get("out", out)
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--out":
            out = following
        elif word.startswith("--out="):
            out = word.partition("=")[2]
    return out.rstrip("/")


def _check(settings: LaunchSettings, command: Sequence[str]) -> None:
    """Refuse settings that SLURM, or the script, cannot carry out.

    Raises:
        ValueError: With the name and value of the setting.
    """
    slurm = settings.slurm
    if not re.fullmatch(r"[\w.+-]+", settings.name):
        raise ValueError(f"name must be letters, digits and `.+-_`, as it is part of file names, got {settings.name!r}")
    for name, least in {"gpus_per_node": 0, "cpus_per_task": 1, "parallel": 1}.items():
        value = getattr(slurm, name)
        if value is not None and value < least:
            raise ValueError(f"slurm.{name} must be at least {least}, got {value}")
    limit = None if slurm.time is None else _seconds(slurm.time)
    if limit is not None and limit <= settings.grace + _EARLY:
        raise ValueError(
            f"slurm.time must be longer than grace={settings.grace:g} and {_EARLY} seconds, got {slurm.time!r}: SLURM "
            "may ask the job to stop that long before its time limit"
        )
    if settings.port + _PORTS > 2**16:
        raise ValueError(
            f"port must be at most {2**16 - _PORTS}, as each job uses one of the {_PORTS} ports from there on, got "
            f"{settings.port}"
        )
    for name in slurm.options:
        if name in _OWN:
            raise ValueError(f"slurm.options must not set {name!r}, which follows from {_OWN[name]}")
    for key, values in slurm.sweep.items():
        if not values:
            raise ValueError(f"slurm.sweep must have at least one value for {key!r}, got an empty list")
    if _is_array(settings) and command[0] != "fit":
        raise ValueError(
            f"slurm.seeds and slurm.sweep are for `fit` only, got {command[0]!r}: a registry runs one update at a time"
        )
    if slurm.parallel is not None and not _is_array(settings):
        raise ValueError("slurm.parallel limits an array: give slurm.seeds or slurm.sweep with it")


def _seconds(text: str) -> float | None:
    """A time limit in seconds; None without a limit.

    Example:
        >>> _seconds("1-12:00:00"), _seconds("90"), _seconds("1:30"), _seconds("UNLIMITED")
        (129600, 5400, 90, None)
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "-1", "0"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"slurm.time must be as in '90' (minutes), '12:00:00' or '1-12:00:00', got {text!r}")
    days, *numbers = (int(group) if group else 0 for group in match.groups())
    if match[1] or match[4]:  # hours come first
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, numbers[0], numbers[1]
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _wait(job: str) -> int:
    """Wait until a job, or all jobs of an array, have ended for good.

    Returns:
        The highest exit code.
    """

    def send(number: signal.Signals) -> None:
        words = ["--signal=USR2"] if number == signal.SIGUSR2 else []
        subprocess.run(["scancel", *words, job], check=False)

    shown = ""
    with forwarded(send):
        while True:
            asked = subprocess.run(
                ["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=False
            )
            # SLURM forgets a job some minutes after its end (MinJobAge).
            if "Invalid job id" in asked.stderr:
                raise ValueError(f"SLURM no longer knows job {job}, nor how it ended")
            states = [_facts(line) for line in asked.stdout.splitlines() if line]
            status = ", ".join(sorted({_status(state) for state in states}))
            if status and status != shown:
                print(f"job {job}: {status}", flush=True)
                shown = status
            if states and all(state["JobState"] in _ENDED for state in states):
                return max(map(_exit_code, states))
            time.sleep(_POLL)  # also when SLURM does not answer: its controller may be restarting


def _facts(line: str) -> dict[str, str]:
    """The fields of a line of ``scontrol show job``."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _status(job: Mapping[str, str]) -> str:
    """A job's state, and the reason why it is pending."""
    return job["JobState"] + ("" if job["Reason"] == "None" else f" ({job['Reason']})")


def _exit_code(job: Mapping[str, str]) -> int:
    """A job's exit code as a shell reports it; 1 if it was cancelled in the queue and so has none."""
    code, number = map(int, job["ExitCode"].split(":"))
    if job["JobState"] == "COMPLETED":
        return code
    return code or (128 + number if number else 1)
