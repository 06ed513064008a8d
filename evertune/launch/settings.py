"""Settings of a launch, from the section ``launch`` of the command's YAML, overridden by command-line options."""

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

from evertune.utils.gpus import gpu_count

DECIDED = (0, 2, 3, 4, 5)
"""Exit codes that are results, not crashes: a retry would end the same way."""

_GROUPS = {"torchrun", "slurm", "kubernetes"}


@dataclass(frozen=True, kw_only=True)
class Container:
    """The container in which the processes run.

    Args:
        image: Path of an image file (``evertune.sif``) or name of an OCI image.
        runtime: ``"apptainer"`` or ``"pyxis"`` (SLURM's ``srun --container-image``).
        mounts: Folders of the host to mount, as ``"/data"`` or ``"/data:/inside"``.
    """

    image: str
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    mounts: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TorchrunSettings:
    """Nodes that are reached over SSH.

    Args:
        hosts: Host names, one for each node. The first is the rendezvous.
        hostfile: A file with one host name per line, instead of ``hosts``. A name may be followed by the number of
            processes on that host (``slots=8``), which must be the same for all hosts.
        ssh: The command that runs a command on another host. Empty: nothing is run; each node's command is printed.
        folder: Working directory on each node; by default the current one, which must then exist on all nodes.
    """

    hosts: list[str] = field(default_factory=list)
    hostfile: str | None = None
    ssh: str = "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30"
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """The resources requested from SLURM. Options of sbatch that are not listed here go into ``options``.

    Args:
        time: Time limit, as in ``"1-12:00:00"``.
        partition: Partition of the job.
        account: Account that the job is charged to.
        qos: Quality of service.
        gpus_per_node: GPUs requested for each node; by default ``processes_per_node``. 0 requests none.
        cpus_per_task: CPU cores for all processes of a node together.
        memory: Memory of each node, as in ``"480G"``.
        options: Further ``#SBATCH`` options, as in ``{"constraint": "h100"}``.
        seeds: Submit a job array with one run for each of these seeds.
        sweep: Submit a job array with one run for each combination of these values, as in
            ``{"model.init_args.learning_rate": [1e-5, 2e-5]}``.
        parallel: Maximum number of runs of an array at the same time; None for no limit.
        requeue: Requeue the job when it is preempted or reaches its time limit.
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
class KubernetesServeSettings:
    """The servers of ``evertune launch kubernetes -- serve``.

    Args:
        replicas: Fewest servers. Default: 2, so that one can be replaced while the other answers.
        max_replicas: Most servers.
        cpu_target: Percent of the requested cores (``kubernetes.cpu``) that the autoscaler keeps in use on average.
        port: Port of the Service; that of the containers is ``server.port`` of the command.
        keys_secret: Name of the Secret whose entry ``keys.json`` holds the hashes of the API keys, as ``evertune keys
            add`` writes it.
        env_secret: Name of a Secret whose entries become environment variables, such as the credentials of an object
            store.

    Raises:
        ValueError: If a number is out of range.
    """

    replicas: int = 2
    max_replicas: int = 8
    cpu_target: int = 70
    port: int = 80
    keys_secret: str | None = None
    env_secret: str | None = None

    def __post_init__(self) -> None:
        if self.replicas <= 0:
            raise ValueError(f"replicas must be positive, got {self.replicas}")
        if self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas must be at least replicas={self.replicas}, got {self.max_replicas}")
        if not 0 < self.cpu_target <= 100:
            raise ValueError(f"cpu_target must be between 1 and 100 percent, got {self.cpu_target}")
        if not 0 < self.port < 2**16:
            raise ValueError(f"port must be between 1 and 65535, got {self.port}")


@dataclass(frozen=True, kw_only=True)
class KubernetesSettings:
    """The resources requested from Kubernetes.

    Args:
        image: Image of the containers.
        kind: ``"jobset"`` (JobSet) or ``"pytorchjob"`` (Kubeflow's Training Operator).
        namespace: Namespace of the job; by default that of the current context of kubectl.
        gpus_per_node: GPUs requested for each pod; by default ``processes_per_node``. 0 requests none.
        cpu: CPU cores of each pod, as in ``"16"``.
        memory: Memory of each pod, as in ``"480Gi"``.
        shared_memory: Size of ``/dev/shm``, through which DataLoader workers pass batches.
        volumes: Mount path of each persistent volume claim, as in ``{"training-data": "/data"}``.
        service_account: Service account of the pods.
        node_selector: Labels that a machine must have.
        queue: Name of the local queue of Kueue.
        serve: Settings of :class:`KubernetesServeSettings`, if the command is ``serve``.
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
    serve: KubernetesServeSettings = field(default_factory=KubernetesServeSettings)


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """How a command is launched.

    Args:
        name: Name of the job.
        nodes: Number of nodes.
        min_nodes: Continue with this many nodes when others are lost; by default, wait for a lost node to return.
        processes_per_node: Processes on each node, one per GPU; by default the number of GPUs of this machine, or 1.
        port: Rendezvous port on the first node.
        python: Python interpreter on the nodes.
        environment: Environment variables to set.
        modules: Environment modules to load.
        setup: Shell lines to run before the command, as in ``["source /opt/venv/bin/activate"]``.
        container: The container to run in, see :class:`Container`; by default none.
        log_dir: Folder for the output of every rank and the stack traces of hung ranks; share it between the nodes.
        shared_folders: Folders that must be the same on all nodes; the preflight checks it.
        interface: Network interface between the nodes, as in ``"ib0"``; by default NCCL and gloo choose one.
        preflight: Check every node before training.
        max_restarts: Number of times that a crashed run is restarted from its last checkpoint.
        hang_timeout: Seconds without progress inside a training step after which all ranks are restarted.
        silence_timeout: Seconds without progress outside of training steps (while the model is loaded, saved or
            evaluated) after which all ranks are restarted.
        grace: Seconds before the time limit, or after a request to stop, within which a checkpoint must be saved.
        torchrun: Settings of :class:`TorchrunSettings`.
        slurm: Settings of :class:`SlurmSettings`.
        kubernetes: Settings of :class:`KubernetesSettings`.

    Raises:
        ValueError: If a number is out of range.
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
        return max(gpu_count(), 1)

    def variables(self) -> dict[str, str]:
        """Environment variables of every process: defaults for NCCL and gloo, overridden by ``environment``."""
        defaults = {
            "OMP_NUM_THREADS": "1",  # as torchrun sets it: the ranks of a node share its cores
            "PYTHONFAULTHANDLER": "1",  # a rank that crashes in C code leaves a stack trace
            "TOKENIZERS_PARALLELISM": "false",  # threads of tokenizers do not survive the fork of DataLoader workers
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that times out ends its rank
        }
        if self.interface:
            defaults |= {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return defaults | self.environment

    def node_command(self, command: Sequence[str], *, node_rank: str, master: str, run_id: str) -> list[str]:
        """The command that runs on one node: its supervisor, which starts the ranks and watches them.

        Args:
            command: Command of every rank, without the program's name: ``["fit", "--config", "stream.yaml"]``.
            node_rank: Rank of this node, or the shell expression for it, as in ``"$SLURM_NODEID"``.
            master: Name or address of the first node, or a shell expression for it.
            run_id: Identifier of the run: the same on all nodes, different from that of any other run.

        Returns:
            Words for a shell. Words that contain an expression must be left unquoted or put in double quotes: see
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
    """A shell line; a word with ``$`` is put in double quotes, so that the shell expands it.

    Example:
        >>> shell_words(["run", "--rank", "$SLURM_NODEID", "two words"])
        'run --rank "$SLURM_NODEID" \\'two words\\''
    """
    return " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in words)


def read_settings(options: Sequence[str], command: Sequence[str], where: str) -> tuple[LaunchSettings, bool, bool]:
    """The settings of a launch: the section ``launch`` of the command's ``--config`` files, overridden by options.

    Args:
        options: Options of ``evertune launch <where>``.
        command: Command to launch, with its ``--config``.
        where: Name of the launcher, for messages.

    Returns:
        The settings, and whether ``--dry_run`` and ``--wait`` were given.

    Raises:
        SystemExit: With a message, if an option is unknown or invalid.
    """
    parser = ArgumentParser(
        prog=f"evertune launch {where}",
        usage="%(prog)s [options] -- COMMAND ...",
        description="All options can also be set in the section `launch` of the command's --config file.",
        exit_on_error=False,
    )
    parser.add_class_arguments(LaunchSettings)
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, and exit")
    parser.add_argument("--wait", action="store_true", help="wait until it has ended, and exit with its exit code")
    for action in parser._actions:  # sections of other launchers are accepted, but not shown in the help
        if action.dest.partition(".")[0] in _GROUPS - {where}:
            action.help = SUPPRESS
    # The section first, and the options over it: each error then names where the bad value comes from.
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
    """The files given by a command's ``--config``, in order.

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
    """The merged section ``launch`` of a command's ``--config`` files; later files take precedence.

    Raises:
        SystemExit: If a file cannot be read, or its section is not a mapping.
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
