"""How a command is launched on one machine or many: the section ``launch`` of its YAML, and options over it."""

from __future__ import annotations

import shlex
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL) of a run that was asked to stop, has saved, and goes on when it is started again."""

DECIDED = (0, 2, 3, 4, 5)
"""Exit codes of commands that are no crash: another try would end in the same way."""

_GROUPS = {"torchrun", "slurm", "kubernetes"}


@dataclass(frozen=True, kw_only=True)
class Container:
    """Where the processes run instead of on the bare machine.

    Args:
        image: a file (``evertune.sif``) or the name of an OCI image.
        runtime: ``"apptainer"`` or ``"pyxis"`` (SLURM's ``srun --container-image``).
        mounts: folders of the machine to see inside, as ``"/data"`` or ``"/data:/inside"``.
    """

    image: str
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    mounts: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TorchrunSettings:
    """Nodes that are reached over SSH.

    Args:
        hosts: their names, the first of which is the meeting point; one entry for each node.
        hostfile: a file with a name in each line, instead of ``hosts``. What follows the name (``slots=8``) is the
            number of processes there and must be the same everywhere.
        ssh: the command that runs a command elsewhere. Empty: nothing is run, each node's command is printed.
        folder: where each node runs it; by default this folder, which all nodes then must have.
    """

    hosts: list[str] = field(default_factory=list)
    hostfile: str | None = None
    ssh: str = "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30"
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What is asked of SLURM. What has no option here goes into ``options`` as sbatch knows it.

    Args:
        time: limit, as in ``"1-12:00:00"``.
        partition: where to.
        account: on whose account.
        qos: quality of service.
        gpus_per_node: by default ``processes_per_node``; 0 asks for none.
        cpus_per_task: processor cores for all processes of a node.
        memory: of a node, as in ``"480G"``.
        options: more lines for the head of the script, as in ``{"constraint": "h100"}``.
        seeds: one run for each, as a job array.
        sweep: one run for each combination of values, as in ``{"model.init_args.learning_rate": [1e-5, 2e-5]}``.
        parallel: runs of an array at one time at most; None for all.
        requeue: put the job back into the queue when it is preempted or its time is up.
    """

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    parallel: int | None = None
    requeue: bool = True


@dataclass(frozen=True, kw_only=True)
class KubernetesSettings:
    """What is asked of Kubernetes.

    Args:
        image: of the containers.
        kind: ``"jobset"`` (JobSet) or ``"pytorchjob"`` (Kubeflow's Training Operator).
        namespace: where the job lives.
        gpus_per_node: by default ``processes_per_node``; 0 asks for none.
        cpu: of each pod, as in ``"16"``.
        memory: of each pod, as in ``"480Gi"``.
        shared_memory: size of ``/dev/shm``, through which loader processes hand over batches.
        volumes: claim to path, as in ``{"training-data": "/data"}``.
        service_account: of the pods.
        node_selector: labels of the machines.
        queue: of Kueue.
    """

    image: str = "evertune"
    kind: Literal["jobset", "pytorchjob"] = "jobset"
    namespace: str | None = None
    gpus_per_node: int | None = None
    cpu: str | None = None
    memory: str | None = None
    shared_memory: str = "16Gi"
    volumes: dict[str, str] = field(default_factory=dict)
    service_account: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    queue: str | None = None


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """How a command is launched.

    Args:
        name: of the job.
        nodes: machines.
        min_nodes: go on with so few when others are lost; by default a lost node is waited for.
        processes_per_node: one for each GPU; by default the GPUs of this machine, or 1.
        port: where the processes meet, on the first node.
        python: the interpreter on the nodes.
        environment: variables to set.
        modules: environment modules to load.
        setup: lines of shell that come before, as in ``["source /opt/venv/bin/activate"]``.
        container: see :class:`Container`.
        log_dir: for the output of every rank, and the stacks of those that hang; all nodes should see it.
        shared_folders: must be the same on all nodes; the preflight looks.
        interface: the network device between the nodes, as in ``"ib0"``; by default NCCL and gloo choose.
        preflight: look at every node before training.
        max_restarts: times that a crash is started over, from the last checkpoint.
        hang_timeout: seconds without progress inside a training step after which all ranks are started over.
        silence_timeout: the same outside of training steps: while models load, are saved and are evaluated.
        grace: seconds before the limit (or after a request to stop) in which a checkpoint must be done.
        torchrun: see :class:`TorchrunSettings`.
        slurm: see :class:`SlurmSettings`.
        kubernetes: see :class:`KubernetesSettings`.

    Raises:
        ValueError: when a number is out of its range.
    """

    name: str = "evertune"
    nodes: int = 1
    min_nodes: int | None = None
    processes_per_node: int | None = None
    port: int = 29500
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    container: Container | None = None
    log_dir: str = "evertune-logs"
    shared_folders: list[str] = field(default_factory=list)
    interface: str | None = None
    preflight: bool = True
    max_restarts: int = 3
    hang_timeout: float = 45.0
    silence_timeout: float = 1800.0
    grace: float = 120.0
    torchrun: TorchrunSettings = field(default_factory=TorchrunSettings)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)

    def __post_init__(self) -> None:
        for name in ("nodes", "min_nodes", "processes_per_node", "hang_timeout", "silence_timeout", "grace"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must not be negative, got {self.max_restarts}")
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes must be at most nodes={self.nodes}, got {self.min_nodes}")
        if not 0 < self.port < 2**16:
            raise ValueError(f"port must be between 1 and 65535, got {self.port}")

    @property
    def processes(self) -> int:
        """Processes on each node."""
        if self.processes_per_node is not None:
            return self.processes_per_node
        import torch

        return max(torch.cuda.device_count(), 1)

    def variables(self) -> dict[str, str]:
        """Environment variables of every process: those asked for, over defaults for NCCL and gloo."""
        defaults = {
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }
        if self.interface:
            defaults |= {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return defaults | self.environment

    def node_command(self, command: Sequence[str], *, node_rank: str, master: str, run_id: str) -> list[str]:
        """What runs on one node: its supervisor, which starts the ranks and watches them.

        Args:
            command: what every rank runs, without the program's name, as in ``["fit", "--config", "stream.yaml"]``.
            node_rank: which node this is, or the shell's expression for it, as in ``"$SLURM_NODEID"``.
            master: name or address of the first node, or an expression for it.
            run_id: the same on all nodes, other than that of any other run.

        Returns:
            Words for a shell; those with an expression in it must stay unquoted or stand in double quotes: see
            :func:`shell_words`.
        """
        words = [self.python, "-m", "evertune.launch.supervisor.node"]
        words += ["--nodes", str(self.nodes), "--node_rank", node_rank, "--processes", str(self.processes)]
        words += ["--master", f"{master}:{self.port}", "--run_id", run_id, "--log_dir", self.log_dir]
        if self.min_nodes is not None:
            words += ["--min_nodes", str(self.min_nodes)]
        words += ["--max_restarts", str(self.max_restarts), "--grace", f"{self.grace:g}"]
        words += ["--hang_timeout", f"{self.hang_timeout:g}", "--silence_timeout", f"{self.silence_timeout:g}"]
        if self.preflight:
            words += ["--preflight"]
            for folder in self.shared_folders:
                words += ["--shared", folder]
        return [*words, "--", *command]


def shell_words(words: Sequence[str]) -> str:
    """A line of shell; a word with ``$`` is put in double quotes, so that the shell fills it in.

    Example:
        >>> shell_words(["run", "--rank", "$SLURM_NODEID", "two words"])
        'run --rank "$SLURM_NODEID" \\'two words\\''
    """
    return " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in words)


def read_settings(options: Sequence[str], command: Sequence[str], where: str) -> tuple[LaunchSettings, bool, bool]:
    """The settings of a launch: the section ``launch`` of the command's ``--config`` files, and options over it.

    Args:
        options: of ``evertune launch <where>``.
        command: what is launched, with its ``--config``.
        where: the launcher's name, for messages.

    Returns:
        The settings, and whether ``--dry_run`` and ``--wait`` were given.

    Raises:
        SystemExit: when an option is unknown or bad, with a message.
    """
    parser = ArgumentParser(
        prog=f"evertune launch {where}",
        usage="%(prog)s [options] -- COMMAND ...",
        description="The options may stand in the section `launch` of the command's --config file as well.",
        exit_on_error=False,
    )
    parser.add_class_arguments(LaunchSettings)
    parser.add_argument("--dry_run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--wait", action="store_true", help="until it has ended, and exit with its exit code")
    for action in parser._actions:  # what other launchers need may be there, and is not shown
        if action.dest.partition(".")[0] in _GROUPS - {where}:
            action.help = SUPPRESS
    try:
        section = parser.parse_object(launch_section(command))
    except ArgumentError as error:
        parser.exit(2, f"{parser.prog}: the section `launch` of the configuration: {error}\n")
    try:
        config = parser.parse_args(list(options), namespace=section)
        dry_run, wait = config.pop("dry_run"), config.pop("wait")
        return LaunchSettings(**vars(parser.instantiate_classes(config))), dry_run, wait
    except (ArgumentError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def config_files(command: Sequence[str]) -> list[Path]:
    """The files that a command's ``--config`` names, in order.

    Example:
        >>> [file.name for file in config_files(["fit", "--config", "a.yaml", "--config=b.yaml"])]
        ['a.yaml', 'b.yaml']
    """
    files = []
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word in ("--config", "-c"):
            files.append(Path(following))
        elif word.startswith("--config="):
            files.append(Path(word.partition("=")[2]))
    return files


def launch_section(command: Sequence[str]) -> dict[str, Any]:
    """The section ``launch`` of the files that a command's ``--config`` names; later files win.

    Raises:
        SystemExit: when a file cannot be read.
    """
    merged: dict[str, Any] = {}
    for file in config_files(command):
        try:
            content = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            sys.exit(f"evertune launch: {file}: {error}")
        section = (content.get("launch") if isinstance(content, Mapping) else None) or {}
        groups = {name: section.get(name, {}) for name in _GROUPS} if isinstance(section, Mapping) else {}
        for name, value in {"launch": section, **groups}.items():
            if not isinstance(value, Mapping):
                sys.exit(f"evertune launch: {file}: the section `{name}` must be a mapping, got {value!r}")
        merged = _merged(merged, section)
    return merged


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
