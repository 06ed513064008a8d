"""Where inputs, targets and logits usually are in the batches and modules of a project."""

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
"""The names under which a batch may hold its targets, in order of preference."""

_PASS_LOGITS = "pass logits=, a callable (module, batch) -> tensor"


class NoLogitsError(TypeError):
    """A module gives nothing in which logits can be found."""


def output_of(module: pl.LightningModule, batch: Any) -> Any:
    """What a module gives for the inputs of a batch.

    A mapping is passed as keyword arguments: those that ``forward`` knows, the targets only where it cannot do without
    them (an argument without a default; an encoder-decoder of transformers without ``decoder_input_ids``). The fields
    of a dataclass or a named tuple are passed the same way. Of a tuple or list all items but the last are passed as
    positional arguments. A ``forward`` with one argument that is not in the batch by name takes the batch as a whole.

    Raises:
        NoLogitsError: when the module has no ``forward``.
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
    """Class scores of a batch: the output of :func:`output_of`, or ``logits`` in it as an attribute or a key.

    Raises:
        NoLogitsError: a TypeError, when no logits can be found in the output; pass your own ``logits=`` callable then.
    """
    return logits_in(output_of(module, batch), module)


def logits_in(output: Any, module: pl.LightningModule) -> Tensor:
    """The logits in what a module gave, as :func:`logits_of` looks for them."""
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
        TypeError: when there are none.
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


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """A collated batch as a training step gets it: through the module's transfer hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_transfer(trainer.lightning_module, batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def has_targets(batch: Any) -> bool:
    """Whether :func:`targets_of` finds any."""
    try:
        targets_of(batch)
    except TypeError:
        return False
    return True


def name_of(value: Any) -> str | None:
    """A string for what names a class or an example; None for what does not (a vector, a fraction).

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
    """How many examples a batch holds: the length of the first tensor found in it.

    Raises:
        TypeError: when it holds no tensor.

    Example:
        >>> batch_size_of({"texts": ["a", "b"], "x": torch.zeros(2, 7)})
        2
    """
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    raise TypeError(f"cannot tell the batch size of a {type(batch).__name__} without tensors")


def take(batch: Any, rows: list[int], size: int) -> Any:
    """Pick examples of a batch, or of any collection: the given rows of every tensor that has ``size`` of them.

    Lists of ``size`` strings, numbers or mappings have one item for each example, so their items are picked too.

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
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    named = _by_name(batch)
    if named is None:
        return batch
    taken = {key: take(value, rows, size) for key, value in named.items()}
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **taken)
    return type(batch)(taken)


def _by_name(batch: Any) -> Mapping[str, Any] | None:
    """The parts of a batch by name, where they have names."""
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
    """Whether ``forward`` has one argument, for the whole batch."""
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return False
    return parameters[0].name == "batch" or (named is not None and parameters[0].name not in named)


def _is_encoder_decoder(module: torch.nn.Module) -> bool:
    return any(getattr(getattr(part, "config", None), "is_encoder_decoder", False) for part in module.modules())
