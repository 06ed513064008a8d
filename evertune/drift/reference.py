"""Detectors that take the first records as their reference, and resume in the middle of a stream from their state."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from evertune.drift.detector import Detector, check_settings, settings_of

_COUNTERS = ("n_features", "n_seen", "n_tests", "detected_at", "drift_detected", "score", "threshold", "p_value")


class ReferenceDetector(Detector):
    """Gathers a reference, is armed with it, and then watches the records that follow.

    A subclass implements :meth:`_arm` and :meth:`_watch`, lists the attributes of its state in :attr:`_kept`, and
    creates them in :meth:`_clear`. It stores each argument of its constructor in an attribute of the same name before
    it calls this constructor: these are its settings, and a state that was saved with other settings is refused.

    Args:
        arl: Average run length: the mean number of records from arming to a false alarm.
        reference_size: Number of records in the reference.
        block_size: Number of consecutive records that are resampled together.
        seed: Seed of all that the detector draws.

    Raises:
        ValueError: If ``arl`` or a size is not positive, or ``reference_size`` is not a multiple of ``block_size``.
    """

    _kept: tuple[str, ...] = ()
    """Names of the attributes that are part of the state: tensors, numbers or strings."""
    _reference: Tensor

    def __init__(self, arl: float, reference_size: int, block_size: int, seed: int) -> None:
        for name, value in {"arl": float(arl), "reference_size": reference_size, "block_size": block_size}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if reference_size % block_size:
            raise ValueError(f"block_size must divide reference_size, got {block_size} for {reference_size}")
        self.arl, self.reference_size, self.block_size, self.seed = float(arl), reference_size, block_size, seed
        self._config = settings_of(self)
        super().__init__()

    @property
    def armed(self) -> bool:
        """Whether the reference is complete, so that records are tested."""
        return not math.isnan(self.threshold)

    def _observe(self, records: Tensor) -> None:
        if not self.armed:
            n = min(len(records), self.reference_size - self.n_seen)
            taken, records = records[:n], records[n:]
            self._reference = torch.cat([self._reference, taken]) if self.n_seen else taken.clone()
            self.n_seen += len(taken)
            if self.n_seen == self.reference_size:
                self._arm(self._reference, torch.Generator().manual_seed(self.seed))
                self._reference = torch.empty(0)
        if len(records):
            self._watch(records)

    def _clear(self) -> None:
        self._reference = torch.empty(0)  # [records, n_features] until armed

    @abstractmethod
    def _arm(self, reference: Tensor, generator: torch.Generator) -> None:
        """Learn from the reference ``[reference_size, n_features]``, and set the threshold."""

    @abstractmethod
    def _watch(self, records: Tensor) -> None:
        """Process at least one record after the reference; count it in ``n_seen``, and call ``_test``."""

    def state_dict(self) -> dict[str, Any]:
        """The state for resuming in the middle of a stream: tensors, numbers and strings only."""
        kept = {name: getattr(self, name) for name in ("_reference", *self._kept)}
        kept = {name.lstrip("_"): value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()}
        return {"config": dict(self._config), **{name: getattr(self, name) for name in _COUNTERS}, **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`, with the same decisions as without the interruption.

        Raises:
            ValueError: If the state was saved by a detector with other settings.
        """
        check_settings(self._config, state_dict["config"])
        for name in _COUNTERS:
            setattr(self, name, state_dict[name])
        for name in ("_reference", *self._kept):
            value = state_dict[name.lstrip("_")]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
