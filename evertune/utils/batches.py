"""What evertune reads from a batch and a module when nobody tells it otherwise.

Every method that needs more than the loss takes a callable with one of these as its default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evertune._lightning import pl

TARGET_KEYS = ("labels", "label", "targets", "target")
"""The keys under which a mapping batch may hold its targets, in order of preference."""


def logits_of(module: pl.LightningModule, batch: Any) -> Tensor:
    """Class scores of a batch: ``module(inputs)``, the targets left out.

    A mapping is passed as keyword arguments, a tuple or list without its last item as positional ones.
    The output may be a tensor, or have ``logits`` as an attribute or key (as in transformers).

    Raises:
        TypeError: when no logits can be found in the output; pass your own ``logits=`` callable then.
    """
    if isinstance(batch, Mapping):
        output = module(**{key: value for key, value in batch.items() if key not in TARGET_KEYS})
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        output = module(*(batch[:-1] if len(batch) > 1 else batch))
    else:
        output = module(batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"cannot find logits in the output of {type(module).__name__} ({type(output).__name__}); "
            "pass logits=, a callable (module, batch) -> tensor"
        )
    return logits


def targets_of(batch: Any) -> Any:
    """The targets of a batch or an example: under one of ``TARGET_KEYS`` of a mapping, or the last item of a tuple.

    Raises:
        TypeError: when there are none.
    """
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return batch[key]
        raise TypeError(f"no targets among the keys {sorted(map(str, batch))}; expected one of {list(TARGET_KEYS)}")
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
        return batch[-1]
    raise TypeError(f"cannot find targets in a {type(batch).__name__}")


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """A collated batch as a training step gets it: through the module's transfer hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def batch_size_of(batch: Any) -> int:
    """How many examples a batch holds: the length of the first tensor found in it.

    Raises:
        TypeError: when it holds no tensor.
    """
    for leaf in torch.utils._pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    raise TypeError(f"cannot tell the batch size of a {type(batch).__name__} without tensors")
