"""All weights of a user's module, gathered in one file."""

from __future__ import annotations

from pathlib import Path

from evertune._lightning import pl
from evertune.lightning_modules import saving
from evertune.utils.ranks import barrier, is_writer


def save_weights(trainer: pl.Trainer, path: str | Path) -> None:
    """Write all weights and buffers of a trainer's module to one safetensors file. Call on every rank.

    Works during and after a fit, on one device, DDP, ZeRO-1, 2 and 3, and FSDP2. Under ZeRO-3 and FSDP2 each rank holds
    a part of the weights, which are gathered one at a time. They are written in the precision in which the module holds
    them, and shared weights are written once, under their first name. The file exists when the call returns on any rank
    (on a file system that all of them share).

    Args:
        trainer: Trainer that has fitted the module, or is fitting it.
        path: File to write; its folder is created if missing. ``safetensors.torch.load_model(module, path)`` reads it.

    Raises:
        ValueError: If the trainer has no module yet.

    Example::

        trainer.fit(module, data)
        evertune.save_weights(trainer, "model.safetensors")
        ...
        safetensors.torch.load_model(MyModule(), "model.safetensors")
    """
    module = trainer.strategy.lightning_module
    if module is None:
        raise ValueError("the trainer has no module whose weights could be saved; call fit first")
    path = Path(path)
    draft = path.with_name(f".{path.name}.part")
    if is_writer():
        path.parent.mkdir(parents=True, exist_ok=True)
    saving.save_weights(module, draft)
    if is_writer():
        draft.replace(path)
    barrier()
