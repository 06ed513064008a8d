"""Detectors that need no more of the records than sums of a feature map, which ranks can add up."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from evertune.drift.reference import ReferenceDetector

_CHUNK = 2_048  # records mapped at once


class SumDetector(ReferenceDetector):
    """Sums a feature map over stretches of a fixed number of records, and tests by the sums.

    A subclass writes :meth:`_fit`, :meth:`_map` and :meth:`_take`.

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
        self._mean = torch.empty(0)  # of the reference, in the feature map
        self._window = torch.empty(0)  # sum over the records of the stretch begun
        self._filled = 0  # records in it

    @abstractmethod
    def _fit(self, reference: Tensor, generator: torch.Generator) -> None:
        """Choose the feature map."""

    @abstractmethod
    def _map(self, records: Tensor) -> Tensor:
        """The feature map: ``[records, n_map]`` in float64.

        In double precision the cutting of records into batches shows far below any difference between scores.
        """

    def _mapped(self, reference: Tensor, generator: torch.Generator) -> Tensor:
        """Choose the feature map by the reference and take its mean; the reference mapped, ``[records, n_map]``."""
        self._fit(reference, generator)
        mapped = torch.cat([self._map(part) for part in reference.split(_CHUNK)])
        self._mean = mapped.mean(0)
        self._window = torch.zeros_like(self._mean)
        return mapped

    def sums(self, records: Tensor, positions: Tensor, count: int) -> Tensor | None:
        """What some of the next ``count`` records add to the stretches that those will fill.

        Ranks that hold different records of the same stream add up what each of them gets, and give the sum to
        :meth:`update_sums`: then all decide as one process would that sees every record.

        Args:
            records: ``[records, n_features]``, in any order; none is fine, too.
            positions: the place of each among the ``count`` next records of the stream.
            count: of all ranks.

        Returns:
            ``[stretches, n_map]`` in float64, or None as long as the reference is not complete: then :meth:`update`
            needs the records themselves.

        Raises:
            ValueError: as :meth:`update` does.
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
        """Look at the next ``count`` records by their :meth:`sums`."""
        self.drift_detected = False
        self._take(sums, count)

    def _watch(self, records: Tensor) -> None:
        self._take(self._sums(records, torch.arange(len(records)), len(records)), len(records))

    @abstractmethod
    def _take(self, sums: Tensor, count: int) -> None:
        """Take the :meth:`sums` of the next ``count`` records; count them in ``n_seen``, and call ``_test``."""
