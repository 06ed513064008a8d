"""A detector of changes in the shares of classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evertune.drift.windows import WindowDetector


class LabelShift(WindowDetector):
    """Detects a change in the shares of classes: of labels, or of a model's predictions.

    The score is Pearson's chi-squared statistic (1900) of the classes in a window, given their shares in the reference.
    A class that is expected less than once in a window counts as expected once, so that a single record of a rare class
    raises no alarm. Classes that are not in the reference count as one. The threshold is resampled and not taken from
    the chi-squared distribution: it also holds for small windows, for rare classes, and for a reference that is itself
    a sample.

    The guarantee is that of :class:`~evertune.drift.windows.WindowDetector`: false alarms occur once in ``arl``
    records, on average over references and streams.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = LabelShift(arl=1_000, reference_size=256, window_size=32)
        >>> detector.update(torch.randint(3, (512, 1), generator=generator))
        >>> detector.drift_detected
        False
        >>> detector.update(torch.randint(2, (64, 1), generator=generator))  # the third class comes no more
        >>> detector.detected_at
        544

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm. Default: 10,000.
        n_classes: Number of classes, numbered from 0; larger numbers count as one more class. Default: up to the
            largest number in the reference.
        reference_size: Number of records in the reference. Default: 512.
        window_size: Number of records in a test. Small windows react fast, large ones detect small changes. Default:
            32.
        block_size: Number of consecutive records that are resampled together. Records that are further apart should be
            independent. Default: 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small for the false-alarm rate (the
            message names the size needed). From :meth:`update`, if a value is not a class number.
    """

    _kept: tuple[str, ...] = (*WindowDetector._kept, "_known")
    _lattice = True
    _distinct = False

    def __init__(
        self,
        arl: float = 10_000,
        n_classes: int | None = None,
        *,
        reference_size: int = 512,
        window_size: int = 32,
        block_size: int = 1,
        seed: int = 0,
    ) -> None:
        if n_classes is not None and n_classes < 1:
            raise ValueError(f"n_classes must be positive, got {n_classes}")
        self.n_classes = n_classes
        super().__init__(arl, reference_size, window_size, block_size, seed)

    def _clear(self) -> None:
        super()._clear()
        self._known = 0  # number of classes; one more place is for all others

    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        self._known = self.n_classes or int(reference.max()) + 1

    def _map(self, records: Tensor) -> Tensor:
        """One-hot: ``[records, classes + 1]``."""
        return torch.nn.functional.one_hot(records[:, 0].clamp(max=self._known).long(), self._known + 1).double()

    def _distance(self, windows: Tensor, references: Tensor) -> Tensor:
        # The expected shares are those of each resampled reference, as in a test: if they are too small by chance,
        # changes look too large, and the threshold must allow for that.
        shares = references + self._mean.to(references.dtype)
        weight = self.window_size / shares.clamp(min=1 / self.window_size)
        squares = windows.square() @ weight.T + (weight * references.square()).sum(1)
        return (squares - 2 * windows @ (weight * references).T).clamp(min=0)

    def validated(self, x: Any) -> Tensor:
        shape = list(torch.as_tensor(x).shape)
        if len(shape) in (1, 2) and shape[-1] > 1:
            raise ValueError(f"class numbers must have shape [records, 1], got {shape}: unsqueeze(1) a vector of them")
        records = super().validated(x)
        bad = ((records < 0) | (records != records.round())).flatten().nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"classes must be whole numbers from 0, got {records[bad[0], 0].item():g} at record {bad[0].item()}"
            )
        return records
