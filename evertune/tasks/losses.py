"""The loss of single examples, for modules that offer no other score."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evertune.utils.batches import batch_size_of, take

if TYPE_CHECKING:
    from evertune._lightning import pl

_PASS_SCORE = "pass score=, a callable (module, batch) -> tensor [batch]"


def negative_losses(module: pl.LightningModule, batch: Any, reason: Exception | None = None) -> Tensor:
    """The negative loss that ``training_step`` returns for each example alone: float32 ``[batch]``.

    Runs ``training_step`` once per example, in the current mode, on a copy of the module's attributes, with logging
    disabled and with copies of its metrics, so that the evaluation is not counted in them.

    Args:
        module: Module with a ``training_step`` that returns a loss, or a dict with it.
        batch: Batch on the module's device.
        reason: Why there is no better score; part of the error message if there is no loss either.

    Raises:
        TypeError: If ``training_step`` cannot be used: it steps the optimizer itself, takes an iterator, returns no
            scalar loss, or its loss compares the examples of a batch.
    """
    why = "" if reason is None else f"{reason}; and "
    step = _training_step(module, why)
    size = batch_size_of(batch)
    losses = [_loss(step(take(batch, [row], size)), module, why) for row in range(size)]
    # A mean over the batch keeps its value when the example is repeated, and a sum doubles. Any other loss
    # (contrastive, batch norm) depends on the other examples.
    twice = _loss(step(take(batch, [0, 0], size)), module, why)
    if not any(torch.allclose(twice, factor * losses[0], rtol=1e-2, atol=1e-5, equal_nan=True) for factor in (1, 2)):
        raise TypeError(
            f"{why}the loss of {type(module).__name__} depends on which examples are in a batch together (alone "
            f"{losses[0]:.4g}, beside its own copy {twice:.4g}), so that a single example has none; {_PASS_SCORE}"
        )
    return -torch.stack(losses)


def _training_step(module: pl.LightningModule, why: str) -> Any:
    """``training_step`` of a copy of the module, as a function of the batch."""
    name = type(module).__name__
    if not module.automatic_optimization:
        raise TypeError(f"{why}the training_step of {name} steps the optimizer itself; {_PASS_SCORE}")
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise TypeError(f"{why}the training_step of {name} takes an iterator; {_PASS_SCORE}")
    # Shares the parameters, but setting an attribute in training_step or logging does not reach the original.
    twin: Any = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin)["_modules"] = {key: _apart(part) for key, part in module._modules.items()}
    vars(twin).update(log=_ignore, log_dict=_ignore)
    extra = (0,) if len(parameters) > 1 else ()
    return lambda batch: twin.training_step(batch, *extra)


def _apart(part: nn.Module | None) -> nn.Module | None:
    """A copy of a metric, whose counts must not change; any other module itself."""
    is_metric = part is not None and any(base.__module__.startswith("torchmetrics") for base in type(part).__mro__)
    return copy.deepcopy(part) if is_metric else part


def _loss(output: Any, module: pl.LightningModule, why: str) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{why}the training_step of {type(module).__name__} gives {got}, not a loss; {_PASS_SCORE}")
    return loss.detach().float().reshape(())


def _ignore(*_: Any, **__: Any) -> None:
    """Replaces ``module.log``."""
