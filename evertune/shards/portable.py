"""A checkpoint under ZeRO or FSDP2 that loads on any number of processes, at any stage of ZeRO, without pickle.

Every rank writes its fragments of the fp32 masters, of the optimizer's state and of the frozen weights as safetensors.
Rank 0 writes the replicated state as a file for ``torch.load(weights_only=True)``. No rank ever holds more than its own
part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl
from evertune.shards.fragments import FragmentState, saved_shapes
from evertune.shards.opened import frozen_shards_of, shards_of
from evertune.shards.optimizer_state import OptimizerState, PortableShards
from evertune.shards.shards import ParameterShards
from evertune.shards.support import is_deepspeed
from evertune.utils.ranks import is_writer, rank_and_world_size

REPLICATED = "replicated.pt"
_WEIGHTS, _FROZEN = "weights", "frozen"
_NOT_FRAGMENTS = ("state_dict", "optimizer_states")


def save(trainer: pl.Trainer, checkpoint: Mapping[str, Any], folder: Path, *, frozen: bool = True) -> None:
    """Write a checkpoint. Call on every rank.

    Args:
        trainer: Trainer in training.
        checkpoint: Lightning's checkpoint; its weights and optimizer states are left out.
        folder: Folder to write, the same on all ranks.
        frozen: Whether to write the frozen weights too. Default: True.

    Raises:
        ValueError: If the optimizer's state cannot be moved to other ranks.
    """
    shards = _shards(trainer)
    optimizer = shards.optimizer_state()
    FragmentState.of(shards, {"value": shards.values(), **optimizer.tensors}).save(folder / _WEIGHTS)
    still = frozen_shards_of(trainer)
    if frozen and still.shapes:
        FragmentState.of(still, {"value": still.values()}).save(folder / _FROZEN)
    if is_writer():
        told = {
            "lightning": {key: value for key, value in checkpoint.items() if key not in _NOT_FRAGMENTS},
            "optimizer": vars(replace(optimizer, tensors={})),
            **_of_engine(trainer),
        }
        torch.save(told, folder / REPLICATED)
    trainer.strategy.barrier("a portable checkpoint")


def is_portable(folder: Path) -> bool:
    """Whether :func:`save` wrote the checkpoint in a folder."""
    return (folder / REPLICATED).is_file()


def load(trainer: pl.Trainer, folder: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Restore weights, optimizer and engine from a checkpoint. Call on every rank, once the strategy is set up.

    Args:
        trainer: Trainer about to train, on any number of processes, under ZeRO of any stage or FSDP2.
        folder: Folder that :func:`save` wrote.
        weights_only: As for ``torch.load``. Default: True.

    Returns:
        Lightning's part of the checkpoint.

    Raises:
        ValueError: If a file is damaged, or the module has other weights than the saved one.
    """
    shards, still = _shards(trainer), frozen_shards_of(trainer)
    parts: list[tuple[str, ParameterShards]] = [(_WEIGHTS, shards)]
    if (folder / _FROZEN).is_dir():
        parts.append((_FROZEN, still))
    for name, expected in parts:
        _check_together(trainer, folder / name)
        _check_shapes(folder / name, expected)
    told = torch.load(folder / REPLICATED, map_location="cpu", weights_only=weights_only)

    def read(kind: str) -> list[Tensor]:
        return FragmentState.load(folder / _WEIGHTS, shards, [kind]).tensors[kind]

    shards.load(read, OptimizerState(**told["optimizer"]))
    if len(parts) > 1:
        still.set_values(FragmentState.load(folder / _FROZEN, still).tensors["value"])
    if is_deepspeed(trainer):
        _restore_engine(trainer.strategy.model, told)
    lightning: dict[str, Any] = told["lightning"]
    return lightning


def _shards(trainer: pl.Trainer) -> PortableShards:
    shards = shards_of(trainer)
    assert isinstance(shards, PortableShards)
    return shards


def _of_engine(trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """The counters of DeepSpeed's engine, or what they would be."""
    if not is_deepspeed(trainer):
        return {"engine": {"global_steps": trainer.global_step, "skipped_steps": 0}, "loss_scaler": {}}
    engine: Any = trainer.strategy.model
    return {
        "engine": {"global_steps": engine.global_steps, "skipped_steps": engine.skipped_steps},
        "loss_scaler": _numbers(_loss_scaler(engine)),
    }


def _restore_engine(engine: Any, told: Mapping[str, Mapping[str, Any]]) -> None:
    vars(_loss_scaler(engine)).update(told["loss_scaler"])
    engine.global_steps, engine.skipped_steps = told["engine"]["global_steps"], told["engine"]["skipped_steps"]
    # DeepSpeed derives the accumulation boundary from micro_steps, which depend on the current accumulation.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    engine.global_samples = engine.global_steps * engine.train_batch_size()


def _loss_scaler(engine: Any) -> Any:
    """The loss scaler, whose type follows from the configuration; an empty namespace if there is none."""
    return getattr(engine.optimizer, "loss_scaler", SimpleNamespace())


def _numbers(scaler: object) -> dict[str, Any]:
    """The counters and settings of a loss scaler."""
    return {name: value for name, value in vars(scaler).items() if isinstance(value, bool | int | float)}


def _check_together(trainer: pl.Trainer, folder: Path) -> None:
    """Verify the digests of the files, each on one rank; a damaged file is an error on all ranks."""
    problem = ""
    try:
        FragmentState.check(folder, rank_and_world_size())
    except (ValueError, FileNotFoundError) as error:
        problem = str(error)
    # If only one rank raised, the others would hang in the collectives of the load.
    if not trainer.strategy.reduce_boolean_decision(not problem, all=True):
        raise ValueError(problem or f"a file of {folder} is damaged or missing: the message of another rank says which")


def _check_shapes(folder: Path, shards: ParameterShards) -> None:
    saved = saved_shapes(folder)
    if saved != shards.shapes:
        name = min(name for name in saved.keys() | shards.shapes.keys() if saved.get(name) != shards.shapes.get(name))
        here, there = (list(shapes[name]) if name in shapes else "not there" for shapes in (shards.shapes, saved))
        raise ValueError(
            f"the weights in {folder} are not those of this module: {name} is {there} in the checkpoint and {here} in "
            "the module; resume with the same module and trainable parameters"
        )
