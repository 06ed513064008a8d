"""The hooks of every continual-learning method: the start and the end of an experience, and a term of the loss."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from evertune._lightning import Callback, pl, rank_zero_warn
from evertune.callbacks.consolidation import end_experience_after_training, record_checkpoints

_KEEPING = ("save", "load", "state_dict", "load_state_dict")


class ContinualCallback(Callback):
    """A Lightning callback that learns across experiences.

    An experience starts with ``fit`` and ends when ``fit`` completes, so a plain ``Trainer`` needs no other call. A
    ``DriftTrigger`` ends one and starts the next in the middle of a ``fit``. A ``fit`` that raises or is interrupted
    ends no experience: the learning state stays as it was before. Neither does ``fast_dev_run``.

    The end of an experience is one step for all continual callbacks of a trainer: if one of them fails, the others are
    put back too (:meth:`undo_point`). At the end of a ``fit`` it comes after every ``on_train_end``, so that it sees
    the final weights; a callback that saves what has been learned does so in ``on_fit_end``.

    A method that overrides :meth:`on_experience_end` has learning state and must persist it: it also overrides
    ``save``, ``load``, ``state_dict`` and ``load_state_dict``, or inherits them from
    :class:`~evertune.callbacks.WeightMethod`. Otherwise it is rejected in ``setup``. A callback that only observes sets
    ``keeps_nothing = True``.

    Attributes:
        experience_index: Number of experiences that this callback has completed.
        keeps_nothing: Whether nothing is lost when this callback is neither saved nor loaded.
        across_experiences: Whether a ``ContinualTrainer`` keeps this object for its whole stream.
        time_part: What the time of :meth:`on_experience_end` counts as: one of the parts of ``History.breakdown``.
    """

    across_experiences = True
    experience_index: int = 0
    time_part: str = "other"
    keeps_nothing: bool = False
    _batch: Any = None  # the current batch, kept only if loss_term is overridden
    _has_trained = False  # in this fit

    @classmethod
    def bytes_per_weight(cls) -> int | None:
        """Bytes of state that the method keeps per trainable weight that a rank updates, for ``evertune plan``.

        None if this depends on the constructor's arguments.
        """
        return 0

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Called before the first step on a new experience: restore and allocate state here."""

    def on_experience_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Called after the last step on an experience, while the strategy is still set up: consolidate here."""

    def undo_point(self) -> Callable[[], None]:
        """Return a function that puts this callback back as it is now. Called before an experience ends.

        By default, it puts the attributes back; lists, dicts, sets and tensors in them are copied. Override it to put
        back what is elsewhere: in files, or in other objects that ``on_experience_end`` changes in place.
        """
        before = tree_map(_copied, vars(self))

        def undo() -> None:
            vars(self).clear()
            vars(self).update(before)

        return undo

    def loss_term(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Tensor | None:
        """A term to add to the training loss, or None if there is none at this step.

        Called once per micro-batch on every rank, after ``training_step`` and before the backward pass, in the
        precision of the training step (under autocast, if it uses that). Reach the weights by calling the module, which
        also works under ZeRO-3; a penalty on the weights themselves belongs in
        :class:`~evertune.callbacks.WeightMethod`. The loss that the module logs does not include the term.

        Args:
            trainer: Trainer in training, with automatic optimization.
            module: The user's module, in training mode.
            batch: The batch that ``training_step`` received, on the device. With ``Replay``, the new examples come
                first, followed by the replayed ones.

        Returns:
            A scalar in the unit of the training loss: a mean over the examples of the batch. Like the loss, it is then
            divided by ``accumulate_grad_batches``, multiplied by the loss scale of mixed precision and averaged over
            the ranks, so return it undivided and unscaled.

        Example::

            class LogitDecay(ContinualCallback):
                def loss_term(self, trainer, module, batch):
                    return 0.01 * module(batch[0]).square().mean()
        """
        return None

    def save(self, directory: str | Path) -> None:
        """Write the learning state to a folder (safetensors, Arrow and JSON). Call on every rank."""

    def load(self, directory: str | Path) -> None:
        """Read the learning state that :meth:`save` wrote, at any world size. Call on every rank."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reject a method that would lose what it learns, or whose loss term would never be added."""
        _check_method(self, pl_module)
        if stage == "fit":
            record_checkpoints(trainer)
            self._has_trained = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _check_method(self, pl_module)  # again, for subclasses whose setup does not call this one's
        self.on_experience_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch for :meth:`loss_term`."""
        if _overrides(self, "loss_term"):
            self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add :meth:`loss_term` to the loss, in place."""
        if not _overrides(self, "loss_term"):
            return
        if self._batch is None:
            raise RuntimeError(
                f"{type(self).__name__} has no batch for its loss_term: call super().on_train_batch_start(...) in its "
                "on_train_batch_start"
            )
        with trainer.precision_plugin.train_step_context():
            term = self.loss_term(trainer, pl_module, self._batch)
        if term is None:
            return
        if term.numel() != 1:
            raise ValueError(
                f"{type(self).__name__}.loss_term returned a tensor of shape {list(term.shape)}; return a scalar, the "
                "mean over the examples of the batch"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # Lightning has already scaled the loss by it
        scale = 1.0 if scaler is None else scaler.get_scale()
        # In place: Lightning runs the backward pass on this very tensor and offers no hook that returns another one.
        # The loss has already been divided by the accumulation and multiplied by the loss scale, so the term gets the
        # same factors.
        loss.add_(term.reshape(()), alpha=scale / trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Release the batch."""
        self._batch = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_trained = True
        # An interrupted experience must not be consolidated.
        if not trainer.interrupted:
            methods = [callback for _, callback in named_callbacks(trainer)]
            end_experience_after_training(methods, trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of a fit that resumed from the end of another one, and trained nothing."""
        _, first = next(named_callbacks(trainer))
        if trainer.ckpt_path is not None and not self._has_trained and self is first:
            rank_zero_warn(
                f"nothing was trained or consolidated: the fit that wrote {trainer.ckpt_path} was complete (epoch "
                f"{trainer.current_epoch}, step {trainer.global_step}). To learn new data from it, raise max_epochs or "
                "max_steps; or start a new fit, with the weights and with what each callback wrote with save()"
            )


def named_callbacks(trainer: pl.Trainer) -> Iterator[tuple[str, ContinualCallback]]:
    """The continual callbacks of a trainer, with the names of the folders that hold their state."""
    seen: Counter[str] = Counter()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ContinualCallback):
            name = type(callback).__name__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name}-{seen[name]}", callback


def _check_method(method: ContinualCallback, module: pl.LightningModule) -> None:
    name = type(method).__name__
    missing = [hook for hook in _KEEPING if not _overrides(method, hook)]
    if _overrides(method, "on_experience_end") and missing and not method.keeps_nothing:
        raise ValueError(
            f"{name} overrides on_experience_end but not {', '.join(missing)}: what it learns would be lost between "
            "processes and with a checkpoint. Derive it from evertune.callbacks.WeightMethod, override them, or set "
            "keeps_nothing = True on the class if there is nothing to keep"
        )
    if _overrides(method, "loss_term") and not module.automatic_optimization:
        raise ValueError(
            f"{name} adds a term to the loss, which needs automatic optimization; add it in the module's own "
            "training_step instead"
        )


def _overrides(method: ContinualCallback, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(ContinualCallback, hook)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, set) else value
