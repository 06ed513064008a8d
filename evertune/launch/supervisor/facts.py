"""Facts that a node reports before training, and their comparison between nodes."""

from __future__ import annotations

import hashlib
import platform
import resource
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

_PACKAGES = ("evertune", "torch", "pytorch-lightning", "transformers", "deepspeed")
_CLOCKS = 5.0  # seconds that clocks may be apart
_SHARED_MEMORY = 2**30  # bytes; containers get 64 MB by default


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a node.

    Args:
        host: Host name.
        run_id: Identifier of the run that the node was started for.
        software: Versions by package name; None if not installed.
        configs: SHA-256 of each configuration file; None if it does not exist.
        gpus: Name of each GPU.
        driver: Version of the GPU driver.
        clock: Seconds since 1970 when the node reported; converted by node 0 to seconds ahead of its own clock.
        free_memory: Available memory in bytes.
        shared_memory: Size of ``/dev/shm`` in bytes.
        open_files: Maximum number of open files of a process.
    """

    host: str
    run_id: str
    software: dict[str, str | None]
    configs: dict[str, str | None] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    driver: str | None = None
    clock: float = 0.0
    free_memory: int = 0
    shared_memory: int = 0
    open_files: int = 0

    @property
    def gpu_names(self) -> str:
        """The GPUs for people, as in ``"8 x NVIDIA H100"``."""
        return ", ".join(f"{self.gpus.count(name)} x {name}" for name in dict.fromkeys(self.gpus)) or "none"

    def called(self, rank: int) -> str:
        """Name of this node in messages."""
        return f"node {rank} (host {self.host})"


def read_facts(run_id: str, configs: Sequence[str]) -> Facts:
    """The facts of this node.

    Args:
        run_id: Identifier of the run.
        configs: Paths of the configuration files.
    """
    import torch

    # NVML would need another package; the kernel module states its version in a file.
    driver = Path("/sys/module/nvidia/version")
    return Facts(
        host=socket.gethostname(),
        run_id=run_id,
        software={
            "Python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
            "CUDA": torch.version.cuda,
        },
        configs={name: _sha256(Path(name)) for name in configs},
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        driver=driver.read_text().strip() if driver.is_file() else None,
        free_memory=_free_memory(),
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def compare(facts: Mapping[int, Facts], processes: int) -> tuple[list[str], list[str]]:
    """Differences that prevent the nodes from training together, and differences that only deserve a warning.

    Args:
        facts: Facts of each node by its rank, including node 0; clocks in seconds ahead of node 0.
        processes: Processes on each node.

    Returns:
        Problems and warnings, a sentence each.

    Example:
        >>> from dataclasses import replace
        >>> nodes = {0: Facts(host="a", run_id="1", software={"torch": "2.9"}, shared_memory=2**34)}
        >>> nodes[1] = replace(nodes[0], host="b", software={"torch": "2.8"})
        >>> compare(nodes, processes=1)
        (['node 1 (host b): torch 2.8, node 0 has 2.9'], [])
    """
    problems: list[str] = []
    warnings: list[str] = []
    first, any_gpus = facts[0], any(one.gpus for one in facts.values())
    for rank, one in facts.items():
        who = one.called(rank)
        if one.run_id != first.run_id:
            problems.append(f"{who}: belongs to run {one.run_id}, node 0 to {first.run_id}")
        for name in first.software | one.software:
            here, there = one.software.get(name), first.software.get(name)
            if here != there:
                problems.append(f"{who}: {name} {here or 'is not installed'}, node 0 has {there or 'none'}")
        for name in first.configs | one.configs:
            here, there = one.configs.get(name), first.configs.get(name)
            if here is None:
                problems.append(f"{who}: cannot read {name}")
            elif there is not None and here != there:
                problems.append(f"{who}: {name} differs from that on node 0 (sha256 {here[:8]}, {there[:8]})")
        if any_gpus and len(one.gpus) < processes:
            problems.append(f"{who}: has {len(one.gpus)} GPUs for {processes} processes")
        if abs(one.clock) > _CLOCKS:
            side = "ahead of" if one.clock > 0 else "behind"
            warnings.append(f"{who}: its clock is {abs(one.clock):.0f} s {side} that of node 0")
        for name, mine, other in (
            ("GPUs", one.gpu_names, first.gpu_names),
            ("driver", one.driver, first.driver),
            ("open files (ulimit -n)", one.open_files, first.open_files),
        ):
            if mine != other:
                warnings.append(f"{who}: {name} {mine}, node 0 has {other}")
        if one.shared_memory < _SHARED_MEMORY:
            size = f"{one.shared_memory / 2**20:.0f} MiB"
            warnings.append(f"{who}: /dev/shm has {size}: DataLoader workers and NCCL need more")
    return problems, warnings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sha256(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


def _free_memory() -> int:
    """Bytes that are available without swapping (Linux)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
