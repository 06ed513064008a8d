"""What every drift detector is: records go in one after the other, and now and then it says that the world changed."""

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

    Only the order of the records matters, never how they are cut into batches. Bad input is refused before it changes
    anything. Memory is bounded. A subclass writes :meth:`_observe`, :meth:`_clear`, :meth:`state_dict` and
    :meth:`load_state_dict`.

    Attributes:
        drift_detected: whether a record of the last :meth:`update` completed a test that raised the alarm.
        score: the statistic of the last test (of the first alarm, where the last :meth:`update` raised one); the
            larger, the more has changed. NaN before the first test.
        threshold: an alarm is a score above it. NaN until the detector is armed.
        p_value: the p-value of the same test; NaN before the first, and for detectors that have none.
        n_seen: records seen since the start or the last :meth:`reset`.
        n_tests: tests made since then.
        detected_at: ``n_seen`` at the last alarm (the record that raised it is number ``detected_at - 1``), or None.
    """

    def __init__(self) -> None:
        self.n_features: int | None = None
        self.reset()

    def update(self, x: Any) -> None:
        """Look at one record or several.

        Args:
            x: a number; one record ``[n_features]``; or several in order ``[records, n_features]``. A tensor, an array
                or nested lists; they are detached and used as float32 on the CPU.

        Raises:
            ValueError: for an empty batch, NaN or infinite features, another number of features than before, or more
                than two dimensions. The detector is left as it was.
        """
        records = self.validated(x)
        self.n_features = records.shape[1]
        self.drift_detected = False
        self._observe(records)

    def reset(self) -> None:
        """Forget everything seen: the next records are the new reference."""
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
        """Take valid records ``[records, n_features]``; keep ``n_seen`` and the attributes of a test up to date."""

    @abstractmethod
    def _clear(self) -> None:
        """Drop what :meth:`_observe` has gathered."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume mid-stream: tensors, numbers and strings only."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`: no later decision differs.

        Raises:
            ValueError: when the state was saved by a detector with other settings.
        """

    def validated(self, x: Any) -> Tensor:
        """Records as :meth:`update` takes them, ``[records, n_features]``, float32 on the CPU; nothing is looked at.

        Raises:
            ValueError: as :meth:`update` does.
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
        """Record one test, made after record number ``n_seen``; the first alarm of an update stands."""
        self.n_tests += 1
        if not self.drift_detected:
            self.score, self.p_value = score, p_value
            if score > self.threshold:
                self.drift_detected, self.detected_at = True, self.n_seen


def settings_of(configured: object) -> dict[str, float | str]:
    """The arguments of an object's constructor, read from its attributes of the same names.

    What a state is saved with: numbers and strings only, so None becomes 0, and several numbers become text.
    """

    def plain(value: Any) -> float | str:
        setting: float | str = ", ".join(map(str, value)) if isinstance(value, tuple) else value or 0
        return setting

    return {name: plain(getattr(configured, name)) for name in inspect.signature(type(configured)).parameters}


def check_settings(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse a state that was saved with other settings.

    Raises:
        ValueError: naming the first that differs.
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(f"the state was saved with {name}={saved.get(name)}, this has {value}")
