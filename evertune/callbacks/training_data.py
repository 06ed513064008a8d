"""The training data of a fit, read outside of training: which classes it has, and batches of chosen examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evertune._lightning import isolate_rng, pl
from evertune.callbacks.replay.callback import Replay
from evertune.callbacks.trained import reads_by_index
from evertune.utils.batches import targets_of, to_device

SharesOf = Callable[[Tensor], Tensor]

_CHUNK = 256
_ADVICE = "leave it out, or train from a DataLoader over a map-style dataset"
_TARGETS: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
"""The targets of the examples of each training loader."""


class TrainingData:
    """The examples and the collate function of the training loader of a fit, without the replayed examples.

    Args:
        trainer: Trainer in training, from ``on_train_start`` on.
        who: Name of the callback that needs the data, for the error messages.
        needs: What it needs of them and when, for the error messages.

    Raises:
        ValueError: If there are several training loaders, or the loader cannot be read by index.
    """

    def __init__(
        self, trainer: pl.Trainer, who: str, needs: str = "the classes of the training data before training"
    ) -> None:
        loader: Any = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or not reads_by_index(trainer, loader):
            kind = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
            raise ValueError(
                f"{who} needs {needs}, and cannot read this {kind} by index: {_ADVICE} with no sampler of your own"
            )
        self._trainer, self._who = trainer, who
        self._loader = loader
        self.dataset: Any = loader.dataset
        self.collate: Callable[[list[Any]], Any] = getattr(loader.collate_fn, "collate_fn", loader.collate_fn)

    def batch(self, indices: Sequence[int]) -> Any:
        """The batch of some examples, on the module's device."""
        return self.batch_of([self.dataset[index] for index in indices])

    def batch_of(self, examples: list[Any]) -> Any:
        """The batch of examples that the dataset or a memory gave."""
        with isolate_rng():
            return to_device(self._trainer, self.collate(examples))

    def targets(self, examples: Any = None, shares_of: SharesOf | None = None) -> Tensor:
        """The targets of all training examples, or of a memory's: class numbers, or 0 and 1 for each class.

        One pass over the examples without the model, on every rank. The targets of the training examples are kept for
        the other callbacks of the fit.

        Args:
            examples: Examples of a memory. Default: those of the training data.
            shares_of: Function from the targets of a batch to what is returned of them, float ``[batch, classes]``: the
                share of each class in each example, for targets at many positions.

        Returns:
            int64 ``[examples]``, or float ``[examples, classes]`` if an example has any number of classes. On the CPU.

        Raises:
            ValueError: If the targets are neither.
        """
        if examples is not None or shares_of is not None:
            return self._targets(self.dataset if examples is None else examples, shares_of or self._checked)
        if self._loader not in _TARGETS:
            _TARGETS[self._loader] = self._targets(self.dataset, self._checked)
        return _TARGETS[self._loader]

    def class_shares(self, shares_of: SharesOf | None = None) -> Tensor:
        """The expected share of each class in a batch of this fit, new and replayed examples together.

        Args:
            shares_of: Function as in :meth:`targets`; the mean share over the examples is returned then.

        Returns:
            float64 ``[classes]``, up to the last class that the training data or the memory has; with several labels
            per example, the share of the examples that have each.

        Raises:
            ValueError: If the targets are not classes, or examples join a batch whose classes are not counted
                (``Replay(extra=...)``, :class:`MIR`).
        """
        replay, targets = Replay.of(self._trainer), self.targets(shares_of=shares_of)
        if replay is not None and replay.extra is not None:
            raise ValueError(
                f"{self._who} counts the new and the replayed examples of each class, not those of "
                "Replay(extra=...); leave one of them out"
            )
        if replay is not None and replay.candidates > 1:
            raise ValueError(
                f"{self._who} needs to know how often each class is replayed, and MIR replays some more often than "
                "others; use Replay"
            )
        in_new = self._drawn(targets)
        if replay is None or not len(replay.memory) or not replay.replay_ratio:
            return in_new
        in_memory = class_counts(self.targets(replay.memory.view, shares_of)) / len(replay.memory)
        in_new, in_memory = same_length(in_new, in_memory)
        return (in_new + replay.replay_ratio * in_memory) / (1 + replay.replay_ratio)

    def _drawn(self, targets: Tensor) -> Tensor:
        """The share of each class among the new examples that are drawn, which a sampler may balance."""
        weights = getattr(self._loader.sampler, "weights", None)
        if not isinstance(weights, np.ndarray):
            return class_counts(targets) / len(targets)
        each = torch.from_numpy(weights / weights.sum())
        return each @ targets.double() if targets.ndim == 2 else torch.bincount(targets, weights=each)

    def _targets(self, data: Any, read: SharesOf) -> Tensor:
        chunks = []
        for start in range(0, len(data), _CHUNK):
            batch = self.batch_of([data[index] for index in range(start, min(start + _CHUNK, len(data)))])
            try:
                targets = targets_of(batch)
            except TypeError as error:
                raise ValueError(
                    f"{self._who} needs the class of every example: {error}; {_ADVICE} whose batches have targets"
                ) from None
            chunks.append(read(targets).cpu())
        return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64)

    def _checked(self, targets: Any) -> Tensor:
        if isinstance(targets, Tensor):
            whole = not targets.is_floating_point()
            if targets.ndim == 1 and whole and bool((targets >= 0).all()):
                return targets
            if targets.ndim == 2 and bool(((targets == 0) | (targets == 1)).all()):
                return targets.float()
        got = f"shape {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(
            f"{self._who} needs targets that are class numbers [batch], or 0 and 1 [batch, classes]; got {got}"
        )


def class_counts(targets: Tensor, n_classes: int = 0) -> Tensor:
    """The number of examples of each class: float64 ``[classes]``, at least ``n_classes`` long.

    Example:
        >>> class_counts(torch.tensor([0, 2, 2])), class_counts(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), 3)
        (tensor([1., 0., 2.], dtype=torch.float64), tensor([1., 2., 0.], dtype=torch.float64))
    """
    if targets.ndim == 2:
        counts = targets.double().sum(0)
        return torch.cat([counts, counts.new_zeros(max(0, n_classes - len(counts)))])
    return torch.bincount(targets, minlength=n_classes).double()


def same_length(*counts: Tensor) -> list[Tensor]:
    """Numbers of classes, filled up with zeros to the length of the longest."""
    longest = max(len(one) for one in counts)
    return [nn.functional.pad(one, (0, longest - len(one))) for one in counts]
