"""Detectors that need only sums of a feature map over the records, which ranks can add up."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from evertune.drift.reference import ReferenceDetector

_CHUNK = 2_048  # records mapped at once


class SumDetector(ReferenceDetector):
    """Sums a feature map over stretches of a fixed number of records, and tests the sums.

    A subclass implements :meth:`_fit`, :meth:`_map` and :meth:`_take`.

    Args:
        stretch: Number of records in a sum.
        arl: Average run length: the mean number of records from arming to a false alarm.
        reference_size: Number of records in the reference.
        block_size: Number of consecutive records that are resampled together.
        seed: Seed of all that the detector draws.
    """

    _kept: tuple[str, ...] = ("_mean", "_window", "_filled")

    def __init__(self, stretch: int, arl: float, reference_size: int, block_size: int, seed: int) -> None:
        self.stretch = stretch
        super().__init__(arl, reference_size, block_size, seed)

    def _clear(self) -> None:
        super()._clear()
        self._mean = torch.empty(0)  # mean of the reference in the feature map
        self._window = torch.empty(0)  # sum over the records of the unfinished stretch
        self._filled = 0  # number of records in it

    @abstractmethod
    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        """Choose the feature map."""

    @abstractmethod
    def _map(self, records: Tensor) -> Tensor:
        """The feature map: ``[records, n_map]`` in float64.

        In double precision, the effect of splitting records into batches is far below any difference between scores.
        """

    def _mapped(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """Choose the feature map and store the reference's mean in it; returns the mapped reference ``[records,
        n_map]``."""
        self._fit(reference, generator)
        mapped = torch.cat([self._map(part) for part in reference.split(_CHUNK)])
        self._mean = mapped.mean(0)
        self._window = torch.zeros_like(self._mean)
        return mapped

    def sums(self, records: Tensor, positions: Tensor, count: int) -> Tensor | None:
        """The contribution of some of the next ``count`` records to the sums of the stretches that these will fill.

        Ranks that hold different records of the same stream add up their results and pass the total to
        :meth:`update_sums`. All ranks then make the same decision as a single process that sees every record.

        Args:
            records: Records ``[records, n_features]`` in any order; may be empty.
            positions: Position of each record among the next ``count`` records of the stream.
            count: Number of the next records on all ranks together.

        Returns:
            Sums ``[stretches, n_map]`` in float64; None until the reference is complete, as :meth:`update` needs the
            records themselves then.

        Raises:
            ValueError: As for :meth:`update`.
        """
        if not self.armed:
            return None
        return self._sums(self.validated(records) if len(records) else records, positions, count)

    def _sums(self, records: Tensor, positions: Tensor, count: int) -> Tensor:
        stretches = (self._filled + positions) // self.stretch
        sums = torch.zeros((self._filled + count - 1) // self.stretch + 1, len(self._mean), dtype=torch.float64)
        for part, stretch in zip(records.split(_CHUNK), stretches.split(_CHUNK), strict=True):
            if len(part):
                sums.index_add_(0, stretch, self._map(part))
        return sums

    def update_sums(self, sums: Tensor, count: int) -> None:
        """Process the next ``count`` records, given their :meth:`sums`."""
        self.drift_detected = False
        self._take(sums, count)

    def _watch(self, records: Tensor) -> None:
        self._take(self._sums(records, torch.arange(len(records)), len(records)), len(records))

    @abstractmethod
    def _take(self, sums: Tensor, count: int) -> None:
        """Process the :meth:`sums` of the next ``count`` records; count them in ``n_seen``, and call ``_test``."""
