"""The manifest of a checkpoint inside an update: the layout of the fit that wrote it, and the digests of its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evertune._lightning import either, pl
from evertune.shards.support import is_fsdp2
from evertune.strategies.deepspeed import EvertuneDeepSpeed
from evertune.utils.files import write_atomically
from evertune.utils.typed_json import from_json, to_json

MANIFEST = "checkpoint.json"

Weights = Literal["replicated", "portable", "deepspeed"]


@dataclass(frozen=True)
class Layout:
    """How the weights and the examples of an optimizer step are distributed over the processes.

    Args:
        processes: Number of processes.
        weights: How the weights are saved: whole (``"replicated"``), in parts that any number of processes can read
            (``"portable"``), or as DeepSpeed saves them (``"deepspeed"``).
        zero_stage: Stage of ZeRO; 0 without DeepSpeed (where ``"portable"`` is FSDP2).
        batch_size: Examples in a batch of one process; None if the loader has no batch size.
        accumulation: Batches in an optimizer step.

    Example:
        >>> Layout(processes=2, weights="replicated", zero_stage=0, batch_size=8, accumulation=3).step_size
        48
    """

    processes: int
    weights: Weights
    zero_stage: int
    batch_size: int | None
    accumulation: int

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Layout:
        """The layout of a running fit."""
        strategy = trainer.strategy
        stage = 0
        weights: Weights = "replicated"
        if isinstance(strategy, either("DeepSpeedStrategy")):
            assert isinstance(strategy.config, dict)
            stage, weights = strategy.config["zero_optimization"]["stage"], "deepspeed"
            if isinstance(strategy, EvertuneDeepSpeed) and strategy.can_be_portable:
                weights = "portable"
        elif is_fsdp2(trainer):
            weights = "portable"
        return cls(
            processes=trainer.world_size,
            weights=weights,
            zero_stage=stage,
            batch_size=getattr(trainer.train_dataloader, "batch_size", None),
            accumulation=trainer.accumulate_grad_batches,
        )

    @property
    def step_size(self) -> int | None:
        """Examples in an optimizer step; None if the loader has no batch size."""
        return None if self.batch_size is None else self.processes * self.batch_size * self.accumulation

    def can_read(self, saved: Layout) -> bool:
        """Whether a fit in this layout can load weights that were saved in another."""
        if self.weights != "deepspeed":
            return self.weights == saved.weights
        return (self.weights, self.processes, self.zero_stage) == (saved.weights, saved.processes, saved.zero_stage)

    def has_same_batches(self, saved: Layout) -> bool:
        """Whether each process reads the same batches in both layouts."""
        ours = self.processes, self.batch_size, self.accumulation
        return ours == (saved.processes, saved.batch_size, saved.accumulation)

    def describe_processes(self) -> str:
        """For messages: "2 processes with ZeRO-3"."""
        own = " and DeepSpeed's own checkpoints" * (self.weights == "deepspeed")
        zero = f"with ZeRO-{self.zero_stage}{own}" if self.zero_stage else "without ZeRO"
        zero = "with FSDP2" if self.weights == "portable" and not self.zero_stage else zero
        return f"{self.processes} process{'es' * (self.processes > 1)} {zero}"

    def describe_step(self) -> str:
        """For messages: the factors of :attr:`step_size`."""
        return f"{self.processes} (processes) x {self.batch_size} (batch_size) x {self.accumulation}"


@dataclass(frozen=True)
class CheckpointManifest:
    """What the file ``checkpoint.json`` holds.

    Args:
        layout: Layout of the fit that wrote the checkpoint.
        files: SHA-256 of each file, in hexadecimal, by its path in the folder.
    """

    layout: Layout
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> CheckpointManifest:
        """Read the manifest in the folder of a checkpoint's step.

        Raises:
            ValueError: If the manifest is damaged or of another version.
        """
        path = folder / MANIFEST
        try:
            return from_json(cls, json.loads(path.read_bytes()))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged or of another version ({error}); delete the checkpoint and restart the update"
            ) from None

    def write(self, folder: Path) -> None:
        """Write the manifest, atomically."""
        write_atomically(folder / MANIFEST, json.dumps(to_json(self), indent=1).encode())
