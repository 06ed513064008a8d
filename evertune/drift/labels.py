"""How often each class comes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evertune.drift.windows import WindowDetector


class LabelShift(WindowDetector):
    """Detects a change in the shares of classes: of labels, or of a model's predictions.

    Pearson's chi-squared statistic (1900) of the classes in a window, given their shares in the reference. A class
    expected less than once in a window counts as expected once: rare classes make no alarm by a single record. Classes
    that the reference does not know count together. The threshold is resampled, not chi-squared's: it holds for small
    windows, rare classes, and a reference that is a sample, too.

    What is guaranteed is what :class:`~evertune.drift.windows.WindowDetector` guarantees: false alarms come once in
    ``arl`` records, on average over references and streams.

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
        arl: average run length: the mean number of records from arming to a false alarm.
        n_classes: classes numbered from 0; larger numbers count together. Default: up to the largest number in the
            reference.
        reference_size: records in the reference.
        window_size: records in a test. Small windows react fast, large ones find small changes.
        block_size: records that are resampled together; over more of them, records should not depend on each other.
        seed: of the resampling and nothing else.

    Raises:
        ValueError: for a setting out of its range, or a reference too small for the false-alarm rate (the size needed
            is named); from :meth:`update`, for what is not a class number.
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
        self._known = 0  # classes; one more place is for all others

    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        self._known = self.n_classes or int(reference.max()) + 1

    def _map(self, records: Tensor) -> Tensor:
        """One-hot: ``[records, classes + 1]``."""
        return torch.nn.functional.one_hot(records[:, 0].clamp(max=self._known).long(), self._known + 1).double()

    def _distance(self, windows: Tensor, references: Tensor) -> Tensor:
        # The expected shares are those of each reference, as they will be in tests: where they are too small, changes
        # look too large.
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
