"""Whether what is asked has changed since a version began to answer: its confidence, and the shares of its classes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from evertune.serve.messages import Answer
from evertune.serve.metrics import ServeMetrics
from evertune.serve.settings import DriftSettings

if TYPE_CHECKING:
    from evertune.drift.detector import Detector

_AT_ONCE = 64  # answers that are looked at together

logger = logging.getLogger("evertune.serve")


class AnswerWatch:
    """Watches the answers of production for a lasting change, without labels, in a thread of its own.

    The first answers of a version are the reference. An alarm is logged once for each version, with the event
    ``drift``, and sets ``evertune_serve_drift`` to 1 until another version answers.

    Args:
        settings: See :class:`DriftSettings`.
        metrics: What is reported.

    Raises:
        ModuleNotFoundError: If the extra ``drift`` is not installed.
        ValueError: If the reference is too small for the false-alarm rate.
    """

    def __init__(self, settings: DriftSettings, metrics: ServeMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._detectors = self._new()  # now, so that wrong settings are refused at the start
        self._version: int | None = None
        self._classes: dict[str, int] = {}
        self._waiting: list[Answer] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "evertune-drift")

    def add(self, answers: Sequence[Answer]) -> None:
        """Take answers that were given; they are looked at later."""
        with self._lock:
            self._waiting += answers
            if len(self._waiting) < _AT_ONCE:
                return
            taken, self._waiting = self._waiting, []
        self._thread.submit(self._look, taken)

    def close(self) -> None:
        """End after what has been taken so far."""
        self._thread.shutdown(cancel_futures=True)

    def _new(self) -> dict[str, Detector]:
        from evertune.drift.labels import LabelShift
        from evertune.drift.scalars import PageHinkley

        arl, size = self._settings.arl, self._settings.reference_size
        assert arl is not None
        return {
            "confidence": PageHinkley(arl, reference_size=size),
            "classes": LabelShift(arl, reference_size=size, window_size=_AT_ONCE),
        }

    def _look(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            if answer.version != self._version:
                self._version, self._classes, self._detectors = answer.version, {}, self._new()
                for signal in self._detectors:
                    self._metrics.drift(signal, False)
        current = [answer for answer in answers if answer.version == self._version]
        readings = {
            "confidence": [[answer.confidence] for answer in current],
            "classes": [[self._classes.setdefault(str(answer.label), len(self._classes))] for answer in current],
        }
        for signal, detector in list(self._detectors.items()):
            try:
                detector.update(readings[signal])
            except ValueError as error:  # the reference does not allow it: all answers are the same, say
                del self._detectors[signal]
                words = f"the {signal} of version {self._version} cannot be watched: {error}"
                logger.warning(words, extra={"event": "drift"})
                continue
            if detector.drift_detected:
                del self._detectors[signal]
                self._metrics.drift(signal, True)
                words = f"the {signal} of version {self._version} changed after {detector.n_seen} answers"
                logger.warning(words, extra={"event": "drift", "signal": signal, "version": self._version})
