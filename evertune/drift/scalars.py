"""River's detectors of one number per record (a loss, a confidence, a length), with a stated false-alarm rate."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune.drift.paths import (
    AdaptiveWindowPaths,
    Array,
    HoeffdingPaths,
    PageHinkleyPaths,
    Paths,
    standard,
    threshold_of_detector,
)
from evertune.drift.reference import ReferenceDetector
from evertune.utils.extras import library

_CUT_CONFIDENCE = 0.001  # River's default: where HDDM sets its cuts
_MIN_BLOCKS = 50  # fewer independent blocks show too little of how a sum varies
_MIN_RUN = 10  # minimum average run length in blocks
_MIN_EVENTS = 10  # with fewer rare events, chance decides how rare they look: up to twice as many false alarms


class _RiverDetector(ReferenceDetector):
    """The base class of the detectors below.

    The reference is standardised and fed to River's detector as its past; the records that follow are standardised in
    the same way. River's detector resets itself after an alarm unless its flag is cleared, which is done here.
    """

    _kept: tuple[str, ...] = ("_centre", "_scale", "_numbers")

    def __init__(self, arl: float, reference_size: int, block_size: int, seed: int) -> None:
        library("river.drift", "drift")
        super().__init__(arl, reference_size, block_size, seed)
        if reference_size < _MIN_BLOCKS * block_size:
            raise ValueError(
                f"a reference of {reference_size} records is too small with block_size={block_size}: reference_size "
                f"must be at least {_MIN_BLOCKS * block_size}"
            )
        if not _MIN_RUN * block_size <= self.arl < math.inf:
            raise ValueError(f"arl must be at least {_MIN_RUN * block_size} with block_size={block_size}, got {arl}")

    def validated(self, x: Any) -> Tensor:
        shape = torch.as_tensor(x).shape
        if len(shape) in {1, 2} and shape[-1] > 1:
            raise ValueError(
                f"{type(self).__name__} watches one number a record, got shape {list(shape)}: pass several records as "
                "x.reshape(-1, 1), and vectors to a detector of vectors, such as MMD"
            )
        return super().validated(x)

    def _clear(self) -> None:
        super()._clear()
        self._centre, self._scale = 0.0, 1.0  # mean and standard deviation of the reference
        self._river: Any = None

    def _arm(self, reference: Tensor, generator: torch.Generator) -> None:
        values = reference[:, 0].double()
        _check_events(values)
        self._centre, self._scale = (value.item() for value in standard(values))
        self.threshold = threshold_of_detector(
            values, self._paths, self._transformed, self.arl, self.block_size, generator
        )
        self._river = self._new()
        for value in self._values(reference):
            self._river.update(value)
            self._river._drift_detected = False

    def _watch(self, records: Tensor) -> None:
        river = self._river
        for value in self._values(records):
            river.update(value)
            self.n_seen += 1
            self._test(self._statistic(), math.nan)
            river._drift_detected = False

    def _values(self, records: Tensor) -> list[float]:
        values: list[float] = self._transformed((records[:, 0].double().numpy() - self._centre) / self._scale).tolist()
        return values

    def _transformed(self, standardised: Array) -> Array:
        return standardised

    @property
    def _numbers(self) -> Tensor:
        """The state of River's detector."""
        return torch.empty(0) if self._river is None else self._saved()

    @_numbers.setter
    def _numbers(self, numbers: Tensor) -> None:
        self._river = self._new() if len(numbers) else None
        if len(numbers):
            self._load(numbers)

    @abstractmethod
    def _paths(self, streams: int) -> Paths:
        """A simulation of the same detector on many streams."""

    @abstractmethod
    def _new(self) -> Any:
        """River's detector in its initial state."""

    @abstractmethod
    def _statistic(self) -> float:
        """The score after the last record."""

    @abstractmethod
    def _saved(self) -> Tensor:
        """The state of River's detector as numbers."""

    @abstractmethod
    def _load(self, numbers: Tensor) -> None:
        """Bring a new detector of River into the state that :meth:`_saved` returned."""


def _check_events(values: Tensor) -> None:
    """Refuse a reference in which almost all values are the same: the rate of the others cannot be estimated from it.

    A reference without any other value is accepted, as any other value is then a change.
    """
    distinct, counts = values.unique(return_counts=True)
    events = len(values) - int(counts.max())
    if 0 < events < _MIN_EVENTS:
        raise ValueError(
            f"only {events} of the {len(values)} records of the reference differ from {distinct[counts.argmax()]:g}, "
            f"too few to keep a rate of false alarms: {_MIN_EVENTS} are needed, so reference_size must be about "
            f"{math.ceil(len(values) * _MIN_EVENTS / events)}"
        )


class PageHinkley(_RiverDetector):
    """Detects a shift of the mean of one number, up or down, at a stated false-alarm rate; the quickest of the three.

    The Page-Hinkley test (Page 1954) as implemented by River: it sums by how much records are above (below) the mean of
    all records, minus ``delta`` each, and measures how far the sum has risen from its lowest value. The threshold of
    River's class is calibrated from the reference, and nothing is forgotten (``alpha=1``): with River's default
    ``alpha``, false alarms become more and more frequent.

    The reference is resampled to simulate other references and the streams that may follow, and the threshold keeps the
    mean run length over both. This assumes that records before a change are like those of the reference, in the same
    order or, with ``block_size=1``, in any order.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = PageHinkley(arl=1_000, reference_size=200)
        >>> detector.update(torch.randn(400, 1, generator=generator))
        >>> detector.armed, detector.drift_detected
        (True, False)
        >>> detector.update(torch.randn(100, 1, generator=generator) + 1.0)  # the mean moves by one sigma
        >>> detector.drift_detected, detector.detected_at
        (True, 409)

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm. Default: 10,000.
        reference_size: Number of records in the reference. Default: 500.
        block_size: Number of consecutive records that are resampled together: a few times the stretch over which they
            are correlated, but fewer than the ``threshold / delta`` records over which a sum builds up, as a reference
            contains few blocks and seldom an extreme one. The reference must contain at least 50 blocks. Default: 1,
            for independent records.
        delta: Half the shift that is detected the quickest, in standard deviations of the reference. The default of
            0.25 suits shifts between a half and one.
        seed: Seed of the resampling.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small or has too few rare events (the
            message names the size needed).
        ModuleNotFoundError: If River is not installed (``pip install "evertune[drift]"``).
    """

    def __init__(
        self,
        arl: float = 10_000,
        *,
        reference_size: int = 500,
        block_size: int = 1,
        delta: float = 0.25,
        seed: int = 0,
    ) -> None:
        if not delta >= 0:
            raise ValueError(f"delta must be 0 or more, in standard deviations of the reference, got {delta}")
        self.delta = float(delta)
        super().__init__(arl, reference_size, block_size, seed)

    def _paths(self, streams: int) -> Paths:
        return PageHinkleyPaths(streams, self.delta)

    def _new(self) -> Any:
        river = library("river.drift", "drift")
        return river.PageHinkley(min_instances=1, delta=self.delta, threshold=math.inf, alpha=1.0)

    def _statistic(self) -> float:
        river = self._river
        rise, fall = river._sum_increase - river._min_increase, river._max_decrease - river._sum_decrease
        return float(rise if rise > fall else fall)

    def _saved(self) -> Tensor:
        river = self._river
        sums = (river._sum_increase, river._min_increase, river._sum_decrease, river._max_decrease)
        return torch.tensor([river._x_mean.n, river._x_mean.get(), *sums], dtype=torch.float64)

    def _load(self, numbers: Tensor) -> None:
        river, values = self._river, numbers.tolist()
        river._x_mean = type(river._x_mean)._from_state(*values[:2])
        river._sum_increase, river._min_increase, river._sum_decrease, river._max_decrease = values[2:]


class HDDM(_RiverDetector):
    """Detects a shift of the mean of one number, up or down, by a bound on means, at a stated false-alarm rate.

    The drift detection method based on Hoeffding's bounds (HDDM_A; Frias-Blanco et al. 2015) as implemented by River.
    It compares the mean of the records up to a cut, which is set where the mean was lowest (highest) by its confidence
    bound, with the mean of all records. The bounds are for values in [0, 1]: records are standardised by the reference
    and passed through a logistic function, so that outliers have little influence. ``score`` is the exponent of the
    bound: the logarithm of two over the confidence at which River's detector would have raised an alarm. The confidence
    of the cuts is River's default.

    The threshold is calibrated as in :class:`PageHinkley`, under the same assumptions.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = HDDM(arl=1_000, reference_size=200)
        >>> detector.update(torch.randn(400, 1, generator=generator))
        >>> detector.update(torch.randn(100, 1, generator=generator) + 1.0)  # the mean moves by one sigma
        >>> detector.drift_detected, detector.detected_at
        (True, 412)

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm. Default: 10,000.
        reference_size: Number of records in the reference. Default: 500.
        block_size: Number of consecutive records that are resampled together; see :class:`PageHinkley`.
        seed: Seed of the resampling.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small or has too few rare events (the
            message names the size needed).
        ModuleNotFoundError: If River is not installed (``pip install "evertune[drift]"``).
    """

    def __init__(self, arl: float = 10_000, *, reference_size: int = 500, block_size: int = 1, seed: int = 0) -> None:
        super().__init__(arl, reference_size, block_size, seed)

    def _transformed(self, standardised: Array) -> Array:
        values: Array = 1 / (1 + np.exp(-standardised.clip(-500, 500)))
        return values

    def _paths(self, streams: int) -> Paths:
        return HoeffdingPaths(streams, math.log(1 / _CUT_CONFIDENCE))

    def _new(self) -> Any:
        binary = library("river.drift", "drift").binary
        river = binary.HDDMA(_CUT_CONFIDENCE, _CUT_CONFIDENCE, two_sided_test=True)
        mean = river._z
        mean.clone = lambda **_: type(mean)._from_state(mean.n, mean.get())  # River's own takes 15 microseconds
        return river

    def _statistic(self) -> float:
        river, exponent = self._river, 0.0
        whole = river._z
        for cut, rise in (
            (river._x_min, whole._mean - river._x_min._mean),
            (river._x_max, river._x_max._mean - whole._mean),
        ):
            if rise > 0 and cut.n < whole.n:
                exponent = max(exponent, 2 * rise * rise * cut.n * whole.n / (whole.n - cut.n))
        return exponent

    def _saved(self) -> Tensor:
        river = self._river
        numbers = [number for mean in (river._z, river._x_min, river._x_max) for number in (mean.n, mean.get())]
        return torch.tensor(numbers, dtype=torch.float64)

    def _load(self, numbers: Tensor) -> None:
        river, values = self._river, numbers.tolist()
        river._z.n, river._z._mean = values[:2]
        river._x_min, river._x_max = (type(river._z)._from_state(*values[i : i + 2]) for i in (2, 4))


class ADWIN(_RiverDetector):
    """Detects a shift of the mean of one number, and adapts to it, at a stated false-alarm rate.

    Adaptive windowing (Bifet & Gavalda 2007) as implemented by River: a compressed window of past records is cut where
    the means of its older and newer parts differ. It is slower than :class:`PageHinkley`, but the window continues from
    the cut without a new reference, and is tested again once it has grown beyond ``reference_size`` records.

    River's ``delta`` is calibrated from the reference like the threshold of :class:`PageHinkley`, under the same
    assumptions; it holds for the first alarm. If River has cut the window, ``score`` is the distance between the mean
    of the rest and that of the reference, in standard deviations; otherwise it is 0. The threshold is 0.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> detector = ADWIN(arl=1_000, reference_size=200)
        >>> detector.update(torch.randn(400, 1, generator=generator))
        >>> detector.update(torch.randn(100, 1, generator=generator) + 1.0)  # the mean moves by one sigma
        >>> detector.drift_detected, detector.detected_at
        (True, 408)

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm. Default: 10,000.
        reference_size: Number of records in the reference. Default: 500.
        block_size: Number of consecutive records that are resampled together; see :class:`PageHinkley`.
        clock: Number of records from one test to the next. Default: 8.
        seed: Seed of the resampling.

    Raises:
        ValueError: If a setting is out of its range, or the reference is too small or has too few rare events (the
            message names the size needed).
        ModuleNotFoundError: If River is not installed (``pip install "evertune[drift]"``).
    """

    _kept = ("_centre", "_scale", "_delta", "_numbers")

    def __init__(
        self,
        arl: float = 10_000,
        *,
        reference_size: int = 500,
        block_size: int = 1,
        clock: int = 8,
        seed: int = 0,
    ) -> None:
        if clock < 1:
            raise ValueError(f"clock must be positive, got {clock}")
        self.clock = clock
        super().__init__(arl, reference_size, block_size, seed)

    def _clear(self) -> None:
        super()._clear()
        self._delta = math.nan

    def _paths(self, streams: int) -> Paths:
        return AdaptiveWindowPaths(streams, self.clock, max_buckets=5, min_window_length=5)

    def _new(self) -> Any:
        if math.isnan(self._delta):
            self._delta = math.exp(-self.threshold - 1e-9)  # strictly above the statistics of a quiet stream
            self.threshold = 0.0
        return library("river.drift", "drift").ADWIN(
            self._delta, self.clock, max_buckets=5, min_window_length=5, grace_period=self.reference_size
        )

    def _watch(self, records: Tensor) -> None:
        river, clock = self._river, self.clock
        for value in self._values(records):
            river.update(value)
            self.n_seen += 1
            if self.n_seen % clock == 0:
                self._test(self._statistic(), math.nan)
                river._drift_detected = False

    def _statistic(self) -> float:
        return abs(self._river.estimation) if self._river._drift_detected else 0.0

    def _saved(self) -> Tensor:
        # The window is a compiled object: its pickled bytes are saved as a tensor of numbers.
        return torch.frombuffer(bytearray(self._river._helper.__getstate__()), dtype=torch.uint8)

    def _load(self, numbers: Tensor) -> None:
        self._river._helper.__setstate__(bytes(numbers.tolist()))
