"""The interface of all drift detectors: they take records one after the other, and raise an alarm when these change."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Detector(ABC):
    """Watches a stream of feature vectors and detects a change of their distribution.

    Only the order of the records matters, not how they are split into batches. Bad input is refused before it changes
    anything. Memory is bounded. A subclass implements :meth:`_observe`, :meth:`_clear`, :meth:`state_dict` and
    :meth:`load_state_dict`.

    Attributes:
        drift_detected: Whether a record of the last :meth:`update` completed a test that raised an alarm.
        score: Statistic of the last test (of the first alarm, if the last :meth:`update` raised one); the larger, the
            more has changed. NaN before the first test.
        threshold: Scores above it are alarms. NaN until the detector is armed.
        p_value: P-value of the same test; NaN before the first test, and for detectors without p-values.
        n_seen: Number of records seen since the start or the last :meth:`reset`.
        n_tests: Number of tests made since then.
        detected_at: ``n_seen`` at the last alarm (the record that raised it is number ``detected_at - 1``), or None.
    """

    def __init__(self) -> None:
        self.n_features: int | None = None
        self.reset()

    def update(self, x: Any) -> None:
        """Process one or several records.

        Args:
            x: A number, one record ``[n_features]``, or several records in order ``[records, n_features]``: a tensor,
                an array or nested lists. They are detached and used as float32 on the CPU.

        Raises:
            ValueError: If the batch is empty, features are NaN or infinite, their number differs from before, or there
                are more than two dimensions. The detector is left unchanged.
        """
        records = self.validated(x)
        self.n_features = records.shape[1]
        self.drift_detected = False
        self._observe(records)

    def reset(self) -> None:
        """Forget everything seen: the next records become the new reference."""
        self.drift_detected = False
        self.score = self.threshold = self.p_value = math.nan
        self.n_seen = self.n_tests = 0
        self.detected_at: int | None = None
        self.n_features = None
        self._clear()

    @property
    @abstractmethod
    def armed(self) -> bool:
        """Whether the reference is complete, so that records are tested."""

    @abstractmethod
    def _observe(self, records: Tensor) -> None:
        """Process valid records ``[records, n_features]``; keep ``n_seen`` and the attributes of a test up to date."""

    @abstractmethod
    def _clear(self) -> None:
        """Drop everything that :meth:`_observe` has gathered."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state for resuming in the middle of a stream: tensors, numbers and strings only."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`, with the same decisions as without the interruption.

        Raises:
            ValueError: If the state was saved by a detector with other settings.
        """

    def validated(self, x: Any) -> Tensor:
        """Records as :meth:`update` takes them, ``[records, n_features]`` in float32 on the CPU, without processing
        them.

        Raises:
            ValueError: As for :meth:`update`.
        """
        records = torch.as_tensor(x).detach().to("cpu", torch.float32)
        if records.ndim > 2:
            raise ValueError(
                f"features must have shape [n_features] or [records, n_features], got {list(records.shape)}"
            )
        records = records.reshape(1, -1) if records.ndim < 2 else records
        if records.numel() == 0:
            raise ValueError(f"there is nothing to look at: the batch of features has shape {list(records.shape)}")
        if self.n_features is not None and records.shape[1] != self.n_features:
            raise ValueError(
                f"the number of features changed from {self.n_features} to {records.shape[1]}; "
                "reset() the detector when the featuriser changes"
            )
        bad = (~records.isfinite()).any(1).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(records)} records have NaN or infinite features, first: {bad[0].item()}"
            )
        return records

    def _test(self, score: float, p_value: float) -> None:
        """Record one test, made after record number ``n_seen``. The first alarm of an update is kept."""
        self.n_tests += 1
        if not self.drift_detected:
            self.score, self.p_value = score, p_value
            if score > self.threshold:
                self.drift_detected, self.detected_at = True, self.n_seen


def settings_of(configured: object) -> dict[str, float | str]:
    """The arguments of an object's constructor, read from its attributes of the same names.

    They are saved with a state, as numbers and strings only: None becomes 0, and several numbers become text.
    """

    def plain(value: Any) -> float | str:
        setting: float | str = ", ".join(map(str, value)) if isinstance(value, tuple) else value or 0
        return setting

    return {name: plain(getattr(configured, name)) for name in inspect.signature(type(configured)).parameters}


def check_settings(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse a state that was saved with other settings.

    Raises:
        ValueError: If a setting differs. The message names the first.
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(f"the state was saved with {name}={saved.get(name)}, this has {value}")
