"""The logits of the training step's own forward pass, for terms of the loss: no second forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evertune._lightning import pl
from evertune.callbacks.base import ContinualCallback
from evertune.shards.opened import shards_of
from evertune.shards.support import is_deepspeed
from evertune.tasks.base import IGNORED, Outputs, task_of
from evertune.utils.batches import batch_size_of, targets_of
from evertune.utils.evaluation import evaluation_mode, trial

_of: WeakKeyDictionary[Any, StepLogits] = WeakKeyDictionary()
_ADVICE = (
    "let forward take the batch and return the logits that training_step uses, give the module a task (a Task whose "
    "outputs() returns them), or pass head=, the name of the submodule that returns them"
)

EXCLUDED = -1e4
"""A logit whose probability is 0 in every precision, and its gradient."""


class StepLogits:
    """What the output layer gives in the training step, before other callbacks adjust it. One for each trainer.

    The output layer is the submodule whose output the logits are. It is found by one forward pass on the first batch:
    the innermost one that returns the very tensor that the module's task calls the logits; the module itself, if there
    is none.
    """

    @classmethod
    def of(cls, trainer: pl.Trainer) -> StepLogits:
        """The one that all callbacks of a trainer share."""
        return _of.setdefault(trainer, cls())

    def __init__(self) -> None:
        # Only the name of the module's class: it holds its trainer, which the entry in _of must not keep alive.
        self._kind = ""
        self._name = ""  # of the output layer
        self.n_classes = 0
        """Number of logits that the output layer gives, rows allocated ahead included."""
        self._shift = False  # each position predicts the next one's target
        self._handle: RemovableHandle | None = None
        self._weights: Tensor | None = None
        self._weighed = False
        self._excluded: tuple[slice, Tensor] | None = None
        self._seen: list[tuple[Tensor, Tensor | None]] = []  # the logits of this step, and what came into the layer

    # --- finding the output layer

    def start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, who: str, head: str | None) -> None:
        """Find the output layer and note what it gives from here on; later calls do nothing. Call on every rank.

        Args:
            batch: The first batch, on the device, before its training step.
            who: Name of the callback, for the error messages.
            head: Name of the output layer; None to find it.

        Raises:
            ValueError: If it cannot be found, or texts are packed.
        """
        if self._handle is not None:
            if head not in (None, self._name):
                raise ValueError(f"{who} has head={head!r}, another callback takes the logits from {self._name!r}")
            return
        if getattr(module, "packing", False):
            raise ValueError(
                f"{who} reads logits where the model computes them, and there packing=True puts several texts into a "
                "row: leave packing out"
            )
        self._kind = type(module).__name__
        with trial(f"{who} cannot find the logits of {type(module).__name__}", _ADVICE):
            with trainer.precision_plugin.val_step_context():
                self._find(module, batch, head)
            adjusted = any(getattr(one, "adjusts_logits", False) for one in trainer.callbacks)  # type: ignore[attr-defined]
            if adjusted and not self._name:
                raise ValueError(
                    "another callback adjusts the output of its head, and the logits are computed from that output; "
                    f"leave that callback or {who} out"
                )
        if is_deepspeed(trainer):
            shards_of(trainer).release()
        # Before all other hooks: adjustments of the logits come after it, wherever the callbacks stand.
        self._handle = module.get_submodule(self._name).register_forward_hook(self._note, prepend=True)

    def _find(self, module: pl.LightningModule, batch: Any, head: str | None) -> None:
        given: list[tuple[str, Tensor]] = []
        names = {part: name for name, part in module.named_modules() if name and head in (None, name)}
        if head is not None and head not in names.values():
            raise ValueError(f"it has no submodule {head!r}")

        def note(part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 1:
                given.append((names[part], output))

        handles = [part.register_forward_hook(note) for part in names]
        try:
            with evaluation_mode(module):
                logits = task_of(module).outputs(module, batch).logits
        finally:
            for handle in handles:
                handle.remove()
        storage = logits.untyped_storage().data_ptr()
        same = [one for one in given if one[1].untyped_storage().data_ptr() == storage or one[0] == head]
        if head is not None and not same:
            raise ValueError(f"its submodule {head!r} gives no tensor [batch, ..., classes] in a forward pass")
        self._name, whole = same[0] if same else ("", None)
        self.n_classes = (logits if whole is None else whole).shape[-1]
        self._shift = whole is not None and logits.ndim == 3 and logits.shape[1] == whole.shape[1] - 1

    def features_of(self, module: pl.LightningModule, batch: Any) -> Tensor:
        """What comes into the output layer for a batch outside of training, ``[batch, features]``.

        Raises:
            ValueError: If it is not such a tensor.
        """
        found: list[Any] = []
        layer = module.get_submodule(self._name)
        handle = layer.register_forward_hook(lambda part, inputs, output: found.append(inputs[0] if inputs else None))
        try:
            task_of(module).outputs(module, batch)
        finally:
            handle.remove()
        return _vectors(found[0] if len(found) == 1 else None)

    # --- a step

    def weigh(self, weights: Tensor | None) -> None:
        """Multiply the gradient of each example through the logits in the step that begins.

        This changes what is learned from the examples, and not the value of the loss.

        Args:
            weights: One factor for each example, ``[batch]``; None for 1.
        """
        self._weights, self._weighed = weights, weights is None

    def exclude(self, examples: slice, classes: Tensor) -> None:
        """Leave classes out of the loss of some examples in the step that begins: their logits become very small.

        Args:
            examples: Rows of the examples in the batch.
            classes: Which classes, bool ``[n_classes]``.
        """
        self._excluded = examples, classes

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Let the training step run again inside: what its output layer gives there is apart from the first pass."""
        first, self._seen = self._seen, []
        try:
            yield
        finally:
            self._seen = first

    def end(self) -> None:
        """A training step has ended: release what it gave."""
        self._seen.clear()
        self._weights, self._weighed, self._excluded = None, True, None

    def _note(self, part: nn.Module, inputs: Any, output: Any) -> Any:
        if not (part.training and torch.is_grad_enabled()):
            return None
        # Under DDP and DeepSpeed, the module itself is called for its training_step, too.
        if isinstance(output, Mapping) and "loss" in output and not self._name:
            return None
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None and isinstance(output, Mapping):
            logits = output.get("logits")
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            return None
        first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        self._seen.append((logits, first))
        if self._weights is None and self._excluded is None:
            return None
        passed = logits
        if self._weights is not None:
            passed = self._weigh(passed, self._weights)
        if self._excluded is not None:
            examples, classes = self._excluded
            out = torch.zeros(passed.shape, dtype=torch.bool, device=passed.device)
            out[examples] = classes[: passed.shape[-1]]
            passed = passed.masked_fill(out, EXCLUDED)
        return _with_logits(output, passed)

    def _weigh(self, logits: Tensor, weights: Tensor) -> Tensor:
        if len(logits) != len(weights):
            raise ValueError(f"the output layer gives {len(logits)} rows for {len(weights)} examples; {_ADVICE}")

        def weigh(gradient: Tensor) -> Tensor:
            self._weighed = True
            return gradient * weights.to(gradient.dtype).reshape(-1, *[1] * (gradient.ndim - 1))

        passed = logits.view_as(logits)
        passed.register_hook(weigh)  # type: ignore[no-untyped-call]
        return passed

    def check(self) -> None:
        """After the training step: it must have used the output layer.

        Raises:
            ValueError: If it has not called the output layer exactly once.
        """
        _ = self._one

    def check_weights(self) -> None:
        """After the backward pass: the loss must have come through the logits.

        Raises:
            ValueError: If the weights had no effect.
        """
        if not self._weighed:
            raise ValueError(f"the loss does not depend on the logits that forward returns; {_ADVICE}")

    @property
    def _one(self) -> tuple[Tensor, Tensor | None]:
        if len(self._seen) != 1:
            times = f"{len(self._seen)} times" if self._seen else "never"
            where = f"its output layer {self._name!r}" if self._name else "itself"
            raise ValueError(f"training_step of {self._kind} called {where} {times}, not once; {_ADVICE}")
        return self._seen[0]

    def logits(self, batch: Any) -> Outputs:
        """The logits of this step, with the gradient; ``counts`` says which positions count.

        Raises:
            ValueError: If the training step has not called the output layer exactly once.
        """
        logits = self._one[0]
        size = batch_size_of(batch)
        if len(logits) != size:
            raise ValueError(f"the output layer gives {len(logits)} rows for {size} examples; {_ADVICE}")
        if logits.ndim == 2:
            return Outputs(logits, None, "categorical")
        targets = targets_of(batch)
        if self._shift:
            logits, targets = logits[:, :-1], targets[:, 1:]
        return Outputs(logits, targets.reshape(logits.shape[:-1]), "categorical")

    def features(self) -> Tensor:
        """What came into the output layer in this step, ``[batch, features]``, with the gradient.

        Raises:
            ValueError: If it is not such a tensor.
        """
        return _vectors(self._one[1])

    def stop(self) -> None:
        """Leave the module as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.end()


class LogitsMethod(ContinualCallback):
    """Base class of callbacks that take the logits of the training step, from the first batch to the end of a fit.

    Attributes:
        head: Name of the submodule that returns them; None to find it.
        takes_tokens: Whether logits may be over the tokens of a text, as only the same text is compared.
    """

    head: str | None = None
    takes_tokens = False
    _over_tokens = False
    _step: StepLogits | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """On the first batch, find the output layer."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._step is None:
            self._start_step(trainer, pl_module, batch)

    def _start_step(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        who, self._over_tokens = type(self).__name__, not task_of(module).fixed_classes
        if self._over_tokens and not self.takes_tokens:
            raise ValueError(
                f"{who} compares logits class by class, but those of {type(module).__name__} are over the tokens of a "
                f"text, whose number varies: leave {who} out; Replay and the methods on weights, such as EWC, work"
            )
        self._step = StepLogits.of(trainer)
        self._step.start(trainer, module, batch, who, self.head)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Release the batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._step is not None:
            self._step.end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module as it was."""
        self._release()
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._release()
        super().on_exception(trainer, pl_module, exception)

    def _release(self) -> None:
        if self._step is not None:
            self._step.stop()
            self._step = None


def counted_rows(outputs: Outputs, chosen: slice | Tensor | list[int] = slice(None)) -> tuple[Tensor, Tensor]:
    """The logits of some examples of a batch, one row for each position that counts.

    Returns:
        The rows ``[R, classes]``, and their number for each example, int64 ``[examples]``.
    """
    logits = outputs.logits[chosen]
    if logits.ndim == 2:
        return logits, torch.ones(len(logits), dtype=torch.int64, device=logits.device)
    assert outputs.targets is not None
    counts = (outputs.targets != IGNORED)[chosen].reshape(logits.shape[:-1])
    return logits[counts], counts.reshape(len(counts), -1).sum(1)


def _vectors(features: Any) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 2:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"the output layer must get one vector for each example, [batch, features]; it gets {got}")
    return features


def _with_logits(output: Any, logits: Tensor) -> Any:
    """A module's output with other logits."""
    if isinstance(output, Tensor):
        return logits
    if hasattr(output, "_replace"):
        return output._replace(logits=logits)
    if isinstance(output, Mapping):
        output["logits"] = logits  # type: ignore[index]
    else:
        output.logits = logits
    return output
