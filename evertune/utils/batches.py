"""Where inputs, targets and logits are usually found in the batches and modules of a project."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evertune._lightning import before_transfer

if TYPE_CHECKING:
    from evertune._lightning import pl

TARGET_KEYS = ("labels", "label", "targets", "target")
"""Keys under which a batch may hold its targets, in order of preference."""

_PASS_LOGITS = "pass logits=, a callable (module, batch) -> tensor"


class NoLogitsError(TypeError):
    """A module's output contains no logits."""


def output_of(module: pl.LightningModule, batch: Any) -> Any:
    """The output of a module for the inputs of a batch.

    A mapping is passed as keyword arguments: those that ``forward`` accepts, with the targets only if it requires them
    (an argument without a default; an encoder-decoder of transformers without ``decoder_input_ids``). The fields of a
    dataclass or a named tuple are passed the same way. All items but the last of a tuple or list are passed as
    positional arguments. A ``forward`` with a single argument that is not a key of the batch gets the whole batch.

    Raises:
        NoLogitsError: If the module has no ``forward``.
    """
    if type(module).forward.__qualname__ in ("LightningModule.forward", "_forward_unimplemented"):
        raise NoLogitsError(f"{type(module).__name__} has no forward to find logits by; {_PASS_LOGITS}")
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = _by_name(batch)
    if _takes_the_batch(parameters, named):
        return module(batch)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if named is not None and (takes_any or {p.name for p in parameters} & set(named)):
        needed = {p.name for p in parameters if p.default is p.empty}
        if "decoder_input_ids" not in named and _is_encoder_decoder(module):
            needed |= set(TARGET_KEYS)
        accepted = set(named) if takes_any else {p.name for p in parameters}
        left_out = set(TARGET_KEYS) - needed
        return module(**{key: value for key, value in named.items() if key in accepted and key not in left_out})
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        return module(*(batch[:-1] if len(batch) > 1 and len(required) < len(batch) else batch))
    return module(batch)


def logits_of(module: pl.LightningModule, batch: Any) -> Tensor:
    """Class scores of a batch: the output of :func:`output_of`, or its attribute or key ``logits``.

    Raises:
        NoLogitsError: If the output contains no logits (a TypeError); then pass a custom ``logits=`` callable.
    """
    return logits_in(output_of(module, batch), module)


def logits_in(output: Any, module: pl.LightningModule) -> Tensor:
    """The logits in a module's output, as :func:`logits_of` looks for them."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor):
        found = f"cannot find logits in the output of {type(module).__name__} ({type(output).__name__})"
        raise NoLogitsError(f"{found}; {_PASS_LOGITS}")
    return logits


def targets_of(batch: Any) -> Any:
    """The targets of a batch or an example: under one of ``TARGET_KEYS``, or the last item of a tuple.

    Mappings, dataclasses and named tuples are searched by name.

    Raises:
        TypeError: If there are none.
    """
    named = _by_name(batch)
    for key in TARGET_KEYS:
        if named is not None and key in named:
            return named[key]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 1:
        return batch[-1]
    if named is not None:
        raise TypeError(f"no targets among the keys {sorted(map(str, named))}; expected one of {list(TARGET_KEYS)}")
    raise TypeError(f"cannot find targets in a {type(batch).__name__}")


def without_targets(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs in a batch: all but what is under one of ``TARGET_KEYS``."""
    return {key: value for key, value in batch.items() if key not in TARGET_KEYS}


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """A collated batch after the module's transfer hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_transfer(trainer.lightning_module, batch)
    strategy = trainer.strategy
    # The method of the class: in its place, a callback may have put one that changes the batches of training.
    return type(strategy).batch_to_device(strategy, batch, dataloader_idx=0)


def has_targets(batch: Any) -> bool:
    """Whether :func:`targets_of` finds targets."""
    try:
        targets_of(batch)
    except TypeError:
        return False
    return True


def name_of(value: Any) -> str | None:
    """A string for a value that names a class or an example; None for other values (a vector, a fraction).

    Example:
        >>> name_of(torch.tensor(3)), name_of(["b", "a"]), name_of(0.5)
        ('3', 'a, b', None)
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item() if math.prod(value.shape) == 1 else None
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, list | tuple | set) and all(isinstance(item, str) for item in value):
        return ", ".join(sorted(value))
    return None


def batch_size_of(batch: Any) -> int:
    """The number of examples in a batch: the length of the first tensor in it.

    Raises:
        TypeError: If the batch contains no tensor.

    Example:
        >>> batch_size_of({"texts": ["a", "b"], "x": torch.zeros(2, 7)})
        2
    """
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    raise TypeError(f"cannot tell the batch size of a {type(batch).__name__} without tensors")


def take(batch: Any, rows: list[int], size: int) -> Any:
    """Select examples of a batch or any collection: the given rows of every tensor with ``size`` rows.

    Lists of ``size`` strings, numbers or mappings have one item per example, so their items are selected too.

    Example:
        >>> take({"texts": ["a", "b"], "x": torch.tensor([5, 6])}, [1], 2)
        {'texts': ['b'], 'x': tensor([6])}
    """
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim > 0 and batch.shape[0] == size else batch
    if (
        isinstance(batch, list)
        and len(batch) == size
        and all(isinstance(x, str | int | float | Mapping) for x in batch)
    ):
        return [batch[row] for row in rows]
    if isinstance(batch, list | tuple):
        items = [take(item, rows, size) for item in batch]
        # A namedtuple takes its fields as separate arguments.
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    named = _by_name(batch)
    if named is None:
        return batch
    taken = {key: take(value, rows, size) for key, value in named.items()}
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **taken)
    return type(batch)(taken)


def _by_name(batch: Any) -> Mapping[str, Any] | None:
    """The parts of a batch by name, or None if they have no names."""
    if isinstance(batch, Mapping):
        return batch
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in fields(batch) if field.init}
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        named: Mapping[str, Any] = batch._asdict()
        return named
    return None


def _leaves(batch: Any) -> Iterator[Any]:
    named = _by_name(batch)
    if named is not None:
        batch = list(named.values())
    if isinstance(batch, list | tuple):
        for item in batch:
            yield from _leaves(item)
    else:
        yield batch


def _takes_the_batch(parameters: list[inspect.Parameter], named: Mapping[str, Any] | None) -> bool:
    """Whether ``forward`` has a single argument, for the whole batch."""
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return False
    return parameters[0].name == "batch" or (named is not None and parameters[0].name not in named)


def _is_encoder_decoder(module: torch.nn.Module) -> bool:
    return any(getattr(getattr(part, "config", None), "is_encoder_decoder", False) for part in module.modules())
